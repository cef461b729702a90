"""`subquad bench decode`: what it checks before it times, what it names as absent."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from subquad import cli
from subquad.bench import decode
from subquad.bench.timing import Plan
from subquad.nn import QuantisedLinear

from ..models.compiled import Graphs

pytest.importorskip("transformers", minversion="5")
FAST = Plan(rounds=2, warmup=1, budget=20.0)
pytestmark = [pytest.mark.heavy, pytest.mark.filterwarnings("ignore:subquad. quantised")]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are traced, and run as they are."""
    from subquad.generation import graph

    torch._dynamo.reset()
    monkeypatch.setattr(graph, "BACKEND", Graphs())


@pytest.mark.usefixtures("uncompiled")
def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    assert cli.main(["bench", "decode", "--quick", "--rounds", "2", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "stock, eager: " in shown and "tokens/s" in shown and "llama.cpp: not measured" in shown
    results = json.loads(file.read_text())["results"]
    assert [entry["case"] for entry in results] == [
        f"tiny-s{sparsity}-{kind}" for kind in ("eager", "compiled") for sparsity in decode.SPARSITIES
    ]
    assert all(set(entry["ratios"]) == {"stock, eager", "stock, compiled"} for entry in results)
    assert all(entry["error"] <= 1e-5 for entry in results if entry["params"]["sparsity"] == 0)


@pytest.mark.usefixtures("uncompiled")
def test_wrong_steps_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = QuantisedLinear.forward
    monkeypatch.setattr(QuantisedLinear, "forward", lambda self, x: forward(self, x) * 1.5)
    results = decode.run(decode.tiny(), FAST)
    assert all(result.failure and not result.times for result in results)


@pytest.mark.usefixtures("uncompiled")
def test_thresholds_are_those_of_their_case() -> None:
    """One model, whose MLPs get others before every step."""
    subject = decode.tiny()
    model, activate = decode.few_bits(subject, subject.ids[:512])
    found = {}
    decoders = {
        sparsity: decode.Decoder(model, subject.ids[:80], True, before=call) for sparsity, call in activate.items()
    }
    for _ in range(6):  # in turns, beyond the steps that look at guards
        found = {sparsity: decoder() for sparsity, decoder in decoders.items()}
    for sparsity, call in activate.items():
        call()
        want = model(input_ids=subject.ids[None, : decode.PROMPT + 6]).logits[:, -1]
        torch.testing.assert_close(found[sparsity], want, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found[0.0], found[0.7], rtol=1e-2)


@pytest.mark.usefixtures("uncompiled")
def test_llama_cpp_is_a_peer_where_it_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fed: list[list[int]] = []

    class Llama:
        def __init__(self, path: str, **options: Any) -> None:
            assert path == str(tmp_path / "m.gguf") and options["n_threads"] == torch.get_num_threads()

        def eval(self, tokens: list[int]) -> None:
            fed.append(tokens)

    ids = torch.arange(decode.PROMPT + 20)
    file = tmp_path / "m.gguf"
    subject = decode.Subject("m", None, {}, ids, file)
    assert decode.llama_cpp(file, ids) is None and "absent; pip install" in decode.absent(subject)[0]
    library = SimpleNamespace(Llama=Llama, __spec__=object())
    monkeypatch.setitem(sys.modules, "llama_cpp", library)
    call = decode.llama_cpp(file, ids)
    assert call is not None and not decode.absent(subject)
    call()
    assert fed == [list(range(decode.PROMPT)), [decode.PROMPT]]


def test_arguments_that_mean_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "decode", "--quick", "--backend", "native"]) == 2
    assert "decode" in capsys.readouterr().err
    assert cli.main(["bench", "decode", "--quick", "--rounds", "5000"]) == 2
    assert "rounds: expected" in capsys.readouterr().err
