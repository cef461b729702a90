#!/bin/sh
# torch 2.13.0: a tensor of float8_e4m3fn or uint16 can be pickled, but not unpickled.
# Expected: pickle.loads(pickle.dumps(x)) is x again, as for bfloat16; or pickle.dumps refuses.
# Happens: dumps works, and loads raises AttributeError, so that what was stored is known to be lost only when it is read. torch.save
#   and torch.load of the same tensors work.
# Seen:
#   torch 2.13.0
#   bfloat16: pickle as before, torch.save as before
#   float8_e4m3fn: pickle AttributeError, torch.save as before
#   uint16: pickle AttributeError, torch.save as before
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$folder/run.py" <<'PY'
import io
import pickle

import torch


def through_pickle(x):
    return pickle.loads(pickle.dumps(x))


def through_save(x):
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    return torch.load(buffer)


def outcome(way, x):
    try:
        return "as before" if torch.equal(way(x).view(torch.uint8), x.view(torch.uint8)) else "another"
    except AttributeError as error:
        return type(error).__name__


print(f"torch {torch.__version__.partition('+')[0]}")
found = []
for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.uint16):
    x = torch.tensor([1.0, 2.0, 3.0]).to(dtype)
    found.append((outcome(through_pickle, x), outcome(through_save, x)))
    print(f"{str(dtype).removeprefix('torch.')}: pickle {found[-1][0]}, torch.save {found[-1][1]}")
lost = ("AttributeError", "as before")
raise SystemExit(found != [("as before", "as before"), lost, lost])
PY
"$folder/venv/bin/python" "$folder/run.py"
