"""Programs on two to four gloo processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parent / "programs"
EXAMPLES = Path(__file__).parents[2] / "examples"


def torchrun(program: Path, size: int, *options: str) -> str:
    """What the ranks print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, str(program), *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        out, err = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        process.terminate()  # which ends the ranks, too; groups of a mesh would let them wait for half an hour
        out, err = process.communicate()
    assert process.returncode == 0, f"{out}\n{err[-3000:]}"
    return out


@pytest.mark.heavy
@pytest.mark.parametrize("size", [2, 3, 4])
def test_operators(size: int) -> None:
    lines = torchrun(PROGRAMS / "operators.py", size).splitlines()
    assert len(lines) == 18 and all(line.startswith("ok ") for line in lines), lines


@pytest.mark.heavy
def test_models() -> None:
    pytest.importorskip("transformers")
    lines = torchrun(PROGRAMS / "models.py", 3).splitlines()
    assert len(lines) == 36 and all(line.startswith("ok ") for line in lines), lines


@pytest.mark.heavy
def test_training_and_checkpoints(tmp_path: Path) -> None:
    """Saved by four processes, over two dimensions; loaded by three, in other ways."""
    pytest.importorskip("transformers")
    lines = torchrun(PROGRAMS / "parallel.py", 4, str(tmp_path)).splitlines()
    assert len(lines) == 12 and all(line.startswith("ok ") for line in lines), lines
    lines = torchrun(PROGRAMS / "checkpoint.py", 3, str(tmp_path)).splitlines()
    assert len(lines) == 12 and all(line.startswith("ok ") for line in lines), lines


@pytest.mark.heavy
def test_the_page_about_it(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    page = (EXAMPLES.parent / "docs" / "distributed.md").read_text()
    start = page.index("# torchrun --nproc-per-node 2 split.py")
    code = page[start : page.index("```", start)] + "import os, sys\nsys.stdout.flush()\nos._exit(0)\n"  # see programs
    (tmp_path / "split.py").write_text(code)
    assert torchrun(tmp_path / "split.py", 2).count("'model.layers.1.self_attn', 'model.layers.1.mlp'") == 2


@pytest.mark.heavy
def test_a_rank_that_dies_is_noticed() -> None:
    assert "raised True" in torchrun(PROGRAMS / "dies.py", 2)


@pytest.mark.heavy
def test_the_example() -> None:
    pytest.importorskip("transformers")
    text = torchrun(EXAMPLES / "context_parallel.py", 2, "--quick")
    assert "the curves are the same" in text
