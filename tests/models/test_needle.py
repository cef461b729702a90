"""The example that learns where to look: with the gradient of the gate it does, and without it does not."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

PATH = Path(__file__).resolve().parents[2] / "examples" / "superlinear_needle.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("superlinear_needle", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_window_cannot_see_and_chance_cannot_choose(example: ModuleType) -> None:
    """No question sees a token of the stretch that it asks about in its window, and spans hold a part of the text."""
    config, tokens = example.CONFIG, example.STRETCHES * example.LENGTH
    nearest = example.LENGTH + 1  # from the first question to the last stretch that is asked about
    assert config.window_len() < nearest and config.window_len() >= example.QUESTIONS
    assert config.max_keys(tokens) - config.window_len() < 0.3 * tokens
    topics, numbers, answers = example.texts(4, torch.Generator().manual_seed(1))
    for row in range(4):
        for place, answer in enumerate(answers[row], start=tokens):
            stretch = numbers[row, :tokens][topics[row, :tokens] == topics[row, place]]
            assert len(stretch) == example.LENGTH and bool((stretch == answer).all())


@pytest.mark.parametrize("options", [["--quick"], ["--quick", "--steps", "2"]])
def test_it_runs(
    example: ModuleType, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(PATH), *options])
    steps: list[int] = []
    real = example.trained
    monkeypatch.setattr(example, "trained", lambda learns, count: (steps.append(count), real(learns, 1))[1])
    example.main()
    assert (
        "The search learns:" in capsys.readouterr().out and steps == [int(options[-1]) if len(options) > 1 else 5] * 2
    )


@pytest.mark.full
@pytest.mark.slow
def test_the_gate_teaches_the_search(example: ModuleType) -> None:
    models = {learns: example.trained(learns) for learns in (True, False)}
    start = {name: value for name, value in _fresh(example).items() if "q_search_proj" in name or "k_proj" in name}
    for learns, model in models.items():
        for name, value in start.items():
            same = torch.equal(model.state_dict()[name], value)
            assert same == ("k_proj" in name or not learns), name
    assert example.accuracy(models[True]) > example.LEARNS
    assert example.accuracy(models[False]) < example.FROZEN


def _fresh(example: ModuleType) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found: dict[str, torch.Tensor] = example.Reader().state_dict()
    return found
