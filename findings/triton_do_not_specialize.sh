#!/bin/sh
# Triton 3.9.0: `do_not_specialize` does not reach the numbers of a tuple.
# Expected: a kernel that lists its argument is compiled once for every value, in a tuple or not.
# Happens: of a NamedTuple every number is specialised (1 becomes a constant), so calls that differ in it compile again.
# Seen (3.6.0, 3.7.0, 3.8.0 and 3.9.0 alike):
#   plain: i32
#   tuple: constexpr
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q triton==3.9.0
cat > "$folder/run.py" <<'PY'
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import MockTensor


class NoGpu:
    """What compiling without a GPU needs of a driver."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Sizes(NamedTuple):
    rows: Any


@triton.jit(do_not_specialize=["rows"])
def plain(out_ptr, rows):
    tl.store(out_ptr, rows)


@triton.jit(do_not_specialize=["sizes"])
def in_tuple(out_ptr, sizes):
    tl.store(out_ptr, sizes.rows)


driver.set_active(NoGpu())
out = MockTensor(tl.int32)
number = plain.warmup(out, 1, grid=(1,)).src.signature["rows"]
member = in_tuple.warmup(out, Sizes(1), grid=(1,)).src.signature["sizes"][0]
print(f"triton {triton.__version__}\nplain: {number}\ntuple: {member}")
raise SystemExit((number, member) != ("i32", "constexpr"))
PY
TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/run.py"
