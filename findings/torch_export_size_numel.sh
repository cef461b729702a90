#!/bin/sh
# torch 2.13.0: torch.export refuses a dynamic dimension of a module that asks a torch.Size for numel().
# Expected: x.shape[:-1].numel() and math.prod(x.shape[:-1]) are the same number, a symbol where a dimension is dynamic; both export.
# Happens: numel() of a Size gives the number of the example, so that export (strict=False, the default) reports that the code
#   specialised the dimension. math.prod, strict=True and torch.compile(dynamic=True) keep the symbol.
# Seen:
#   torch 2.13.0
#   Size.numel: UserError, strict exported
#   math.prod: exported, strict exported
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$folder/run.py" <<'PY'
import logging
import math

import torch

logging.disable(logging.ERROR)


class Numel(torch.nn.Module):
    def forward(self, x):
        return x.reshape(x.shape[:-1].numel(), x.shape[-1]) * 2


class Prod(torch.nn.Module):
    def forward(self, x):
        return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) * 2


def outcome(module, **options):
    try:
        rows = {"x": {0: torch.export.Dim("rows", min=2)}}
        exported = torch.export.export(module, (torch.randn(3, 5, 8),), dynamic_shapes=rows, **options)
    except Exception as error:
        return type(error).__name__
    return "exported" if exported.module()(torch.randn(4, 5, 8)).shape == (20, 8) else "another"


print(f"torch {torch.__version__.partition('+')[0]}")
found = []
for name, module in (("Size.numel", Numel()), ("math.prod", Prod())):
    found += [outcome(module), outcome(module, strict=True)]
    print(f"{name}: {found[-2]}, strict {found[-1]}")
raise SystemExit(found != ["UserError", "exported", "exported", "exported"])
PY
"$folder/venv/bin/python" "$folder/run.py"
