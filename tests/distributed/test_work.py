"""The benchmark of a rank's own work: that it checks what it times, and says what it found. No time is judged."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from subquad import cli
from subquad.bench.timing import Plan
from subquad.distributed import work

from .threads import on_ranks

CASE = work.Case(40, 2, 8)
PLAN = Plan(rounds=2, warmup=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_rank_beside_one_process(dtype: torch.dtype) -> None:
    ratios = work.local_work(work.Case(40, 2, 8, dtype), PLAN)
    assert [ratio.name.rsplit(", ")[-1] for ratio in ratios] == ["forward", "backward"]
    assert all(ratio.ours > 0 < ratio.one for ratio in ratios)


def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("subquad.distributed.gated_linear_attention")
    monkeypatch.setattr(module, "_walk", lambda call, rows, begin: (begin, begin[..., :1]))
    with pytest.raises(AssertionError, match="relative L2 error"):
        work.local_work(CASE, PLAN)


def test_processes_beside_one() -> None:
    for ratios in on_ranks(2, lambda rank: work.beside_one(rank, CASE, PLAN)):
        assert [ratio.name for ratio in ratios] == [
            f"2 processes, {CASE}, {way}" for way in ("forward", "forward and backward")
        ]
        assert all(ratio.ours > 0 < ratio.one for ratio in ratios)


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(work, "QUICK", (CASE,))
    assert cli.main(["bench", "distributed", "--case", "work", "--quick", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.endswith("of one process") for line in lines)
    assert cli.main(["bench", "distributed", "--case", "bytes"]) == 2
    assert "expected 'work' or 'processes', got 'bytes'" in capsys.readouterr().err
