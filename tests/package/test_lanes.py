"""What the lanes have, and how a run ends in time."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*options: str) -> str:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:randomly", "--benchmark-disable"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def collected(lane: str) -> set[str]:
    text = run("-v", "--collect-only", "--lane", lane, "tests/ops/feature_map/test_feature_map.py")
    return {line.split("[")[-1].rstrip("]>") for line in text.splitlines() if "test_generic[" in line}


@pytest.mark.heavy
def test_numbers_in_every_dtype_and_the_rest_of_what_is_emulated_in_one() -> None:
    whole, full = collected("whole"), collected("full")
    assert whole < full
    for dtype in ("fp32", "bf16", "fp16"):
        assert {
            f"feature_map-{check}-{name}-{dtype}" for check in ("forward", "gradients") for name in ("triton", "simt")
        } <= whole
        assert (f"feature_map-nan-triton-{dtype}" in whole) == (dtype == "fp32")
        assert f"feature_map-nan-triton-{dtype}" in full


@pytest.mark.heavy
def test_a_run_that_is_out_of_time_tells_what_it_left() -> None:
    text = run("--minutes", "0", "tests/package/test_rope.py")
    assert (
        re.search(r"^\d\d tests of this lane were NOT RUN: the 0 minutes were over", text, re.M)
        and "passed" not in text
    )
