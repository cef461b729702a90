"""Bytes that come into a rank of groups that do not exist."""

from __future__ import annotations

import pytest
import torch

from subquad import cli
from subquad.distributed import traffic


@pytest.mark.parametrize("ranks", [2, 4, 16])
@pytest.mark.parametrize("name", [name for name in traffic.FORMULAS if name not in traffic.OTHERS])
def test_counts_are_what_formulas_say(name: str, ranks: int) -> None:
    assert traffic.counted(name, ranks) == traffic.FORMULAS[name](traffic.SMALL, 8 * ranks, ranks)
    assert not torch.distributed.is_initialized()


def test_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(traffic, "RANKS", (2, 4))
    assert cli.main(["bench", "distributed"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "!=" not in "".join(lines)
    large = {tuple(line.split()[:2]): line.split()[2:] for line in lines if line.strip().startswith("1048576")}
    assert large["1048576", "64"][1:4] == ["3.98", "0.0234", "4.01"]  # the same for any number of tokens
    assert large["1048576", "64"][6:8] == ["8.04", "12.1"]
    monkeypatch.setitem(traffic.FORMULAS, "convolution", lambda *_: 1)
    assert cli.main(["bench", "distributed"]) == 1
