#!/bin/sh
# Triton 3.6.0 beside NumPy 2.4: its interpreter cannot run a loop whose bound is an argument of the kernel.
# Expected: the sum of 0, 1, 2, as with NumPy 2.3 and as with Triton 3.9 beside either.
# Happens: TypeError, since the interpreter makes an int of an array of one dimension, which NumPy no longer does.
# Seen (NumPy 2.4.6 and 2.3.5):
#   triton 3.6.0, numpy 2.4.6: TypeError: only 0-dimensional arrays can be converted to Python scalars
#   triton 3.6.0, numpy 2.3.5: 3
#   triton 3.9.0, numpy 2.4.6: 3
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/run.py" <<'PY'
import numpy
import torch
import triton
import triton.language as tl


@triton.jit
def count(out_ptr, n):
    total = 0
    for i in range(n):
        total += i
    tl.store(out_ptr, total)


out = torch.zeros(1, dtype=torch.int32)
try:
    count[(1,)](out, 3)
    result = str(out.item())
except Exception as error:
    cause = error.__cause__ or error
    result = f"{type(cause).__name__}: {cause}"
print(f"triton {triton.__version__}, numpy {numpy.__version__}: {result}")
PY
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
try() { # try TRITON NUMPY EXPECTED
  "$folder/venv/bin/pip" install -q "triton==$1" "numpy==$2"
  found=$(TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/run.py")
  echo "$found"
  case $found in *"$3"*) ;; *) exit 1 ;; esac
}
try 3.6.0 2.4.6 "only 0-dimensional arrays"
try 3.6.0 2.3.5 ": 3"
try 3.9.0 2.4.6 ": 3"
