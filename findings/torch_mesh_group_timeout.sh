#!/bin/sh
# torch 2.13.0: groups of a DeviceMesh of several dimensions have the default timeout of 30 minutes, whatever init_process_group was given.
# Expected: the timeout of the group that the mesh was made over, as a mesh has no argument for one. A mesh of one dimension over all ranks
#   has it, for it takes the default group itself.
# Happens: with 7 seconds in init_process_group a rank that waits in a collective of mesh["a"], of two dimensions, would wait for half an
#   hour before it says that another one is missing.
# Seen:
#   torch 2.13.0
#   default group 0:00:07
#   mesh of one dimension 0:00:07
#   mesh of two dimensions 0:30:00 0:30:00
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$folder/run.py" <<'PY'
import datetime
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh


def timeout(group):
    return group._get_backend(torch.device("cpu")).options._timeout


def run(rank, store):
    wanted = datetime.timedelta(seconds=7)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4, timeout=wanted)
    line = init_device_mesh("cpu", (4,), mesh_dim_names=("all",))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    if rank == 0:
        print("default group", timeout(dist.group.WORLD))
        print("mesh of one dimension", timeout(line.get_group("all")))
        print("mesh of two dimensions", *(timeout(mesh.get_group(name)) for name in ("a", "b")))
    dist.destroy_process_group()


if __name__ == "__main__":
    print("torch", torch.__version__.split("+")[0], flush=True)
    torch.multiprocessing.spawn(run, (sys.argv[1],), nprocs=4)
PY
"$folder/venv/bin/python" "$folder/run.py" "$folder/store" > "$folder/out"
cat "$folder/out"
cat > "$folder/expected" <<'OUT'
torch 2.13.0
default group 0:00:07
mesh of one dimension 0:00:07
mesh of two dimensions 0:30:00 0:30:00
OUT
diff "$folder/expected" "$folder/out"
