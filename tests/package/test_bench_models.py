"""`subquad bench models`: a prompt, packed documents and LAWCAT's steps, checked before they are timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from subquad import cli
from subquad.bench import models
from subquad.bench.measure import OURS
from subquad.bench.timing import Plan

transformers = pytest.importorskip("transformers", minversion="5")


@pytest.mark.backend("interval_attention", "native")
def test_command(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    assert cli.main(["bench", "models", "--quick", "--rounds", "2", "--json", str(file)]) == 0
    results = json.loads(file.read_text())["results"]
    assert [entry["case"] for entry in results] == ["tiny-prefill-256", "tiny-packed-256", "tiny-lawcat-decode-512"]
    assert [set(entry["ratios"]) for entry in results] == [
        {models.SDPA},
        {models.DENSE, models.ALONE},
        {"after 128 tokens"},
    ]
    assert all(entry["error"] <= 1e-5 for entry in results)


def test_documents_that_see_each_other_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "DOCUMENTS", 1)  # one call for all documents is not what sixteen calls compute
    model, ids = models._model(models.TINY, 64), torch.randint(1000, (1, 64))
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda x, position_ids=None, **more: forward(x, position_ids=positions(position_ids), **more)
    )

    def positions(given: torch.Tensor | None) -> torch.Tensor | None:
        return None if given is None else given % 32  # two documents, where `alone` has one

    result = models._packed("a case", model, ids, Plan(rounds=1, warmup=0))
    assert result.failure is not None and OURS not in result.times
