#!/bin/sh
# torch 2.13.0: clip_grad_norm_ of DTensors and plain tensors together raises an error after it has scaled some of the gradients.
# Expected: all gradients are scaled (get_total_norm with foreach=False knows the norm of such a mixture), or an error comes first and
#   leaves them alone. A model of which a part is sharded has both.
# Happens: with one dtype the default refuses the norm and changes nothing. With foreach=False, or the default and two dtypes, the norm
#   is right, the DTensors are scaled by it, and then the plain gradients cannot be: RuntimeError, one part clipped and one not. A plain
#   gradient of one element is clipped like all others.
# Seen (the gradients have the norms 6 and 8, and 1 is asked for):
#   torch 2.13.0
#   one dtype: RuntimeError, norms after it 6.0 and 8.0
#   one dtype, foreach=False: RuntimeError, norms after it 0.6 and 8.0
#   two dtypes: RuntimeError, norms after it 0.6 and 8.0
#   one element: 10.0, norms after it 0.6 and 0.8
#   total norm of the mixture, foreach=False: 10.0
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$folder/run.py" <<'PY'
import warnings

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

warnings.filterwarnings("ignore", "Found a non-scalar tensor with numel=1")


def parameter(gradient):
    made = torch.nn.Parameter(torch.zeros_like(gradient))
    made.grad = gradient
    return made


def outcome(sharded, plain, sharded_first=True, **options):
    parameters = [sharded, plain] if sharded_first else [plain, sharded]
    try:
        result = f"{clip_grad_norm_(parameters, 1.0, **options).full_tensor():.1f}"
    except RuntimeError as error:
        result = type(error).__name__
    return f"{result}, norms after it {sharded.grad.full_tensor().norm():.1f} and {plain.grad.norm():.1f}"


dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))


def sharded():
    return parameter(distribute_tensor(torch.full((4,), 3.0), mesh, [Shard(0)]))


def plain(dtype=torch.float32):
    return parameter(torch.full((4,), 4.0, dtype=dtype))


mixture = [sharded().grad, plain().grad]
found = {
    "one dtype": outcome(sharded(), plain()),
    "one dtype, foreach=False": outcome(sharded(), plain(), foreach=False),
    "two dtypes": outcome(sharded(), plain(torch.bfloat16), sharded_first=False),
    "one element": outcome(sharded(), parameter(torch.tensor([8.0]))),
    "total norm of the mixture, foreach=False": f"{get_total_norm(mixture, foreach=False).full_tensor():.1f}",
}
dist.destroy_process_group()
print(f"torch {torch.__version__.partition('+')[0]}")
for case, result in found.items():
    print(f"{case}: {result}")
half = "RuntimeError, norms after it 0.6 and 8.0"
untouched = "RuntimeError, norms after it 6.0 and 8.0"
raise SystemExit(list(found.values()) != [untouched, half, half, "10.0, norms after it 0.6 and 0.8", "10.0"])
PY
"$folder/venv/bin/python" "$folder/run.py"
