"""The distillation in examples/distill on a tiny model, and its weights from file to model."""

from __future__ import annotations

import functools
import io
import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

from rich.console import Console  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import subquad  # noqa: E402
from subquad.demo.distilled import digest, load_distilled, save_distilled  # noqa: E402
from subquad.demo.model import Subject  # noqa: E402
from subquad.integrations.transformers import LawcatConfig, convert  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("peft", reason="peft is not installed")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from distill import recipe, run

    yield recipe, run
    for name in [name for name in sys.modules if name.split(".")[0] == "distill"]:
        del sys.modules[name]


def tiny(seed: int = 0, width: int = 32, heads: int = 4, spread: float = 0.3) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=64, num_hidden_layers=3, num_attention_heads=heads, num_key_value_heads=heads // 2,
        vocab_size=64, max_position_embeddings=512, initializer_range=spread,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def texts(run: Any) -> dict[str, torch.Tensor]:
    """Texts with something to learn: each repeats itself after more than a window."""
    torch.manual_seed(1)
    return {name: torch.randint(64, (90,)).repeat(12) for name in run.SHARES}


def errors(student: nn.Module, ids: torch.Tensor) -> float:
    with torch.no_grad(), subquad.attention_transfer(student) as transfer:
        student.model(ids, use_cache=False)
        return transfer.loss().item()


def trained(run: Any, recipe: Any, model: nn.Module, folder: Path, seconds: float) -> tuple[nn.Module, Any]:
    student, progress = recipe.student_of(model), run.Progress(seconds / 60, transfer=0.5)
    run.time = SimpleNamespace(monotonic=functools.partial(next, itertools.count(0.0, 0.1)))  # a reading takes 0.1 s
    windows = run.Windows(texts(run), (192, 128), 0)
    run.train(Subject("tiny", model, None), student, windows, progress, folder, Console(file=io.StringIO()))
    return student, progress


def test_feature_maps_start_near_softmax(example: Any) -> None:
    recipe, run = example
    from distill.start import start

    model = tiny(width=64, heads=2, spread=0.1)  # heads wide enough for groups, scores as flat as those of real texts
    windows = run.Windows(texts(run), (256,), 0)
    plain, student = recipe.student_of(model), recipe.student_of(model)
    start(student, model, [windows[0], windows[1]], seed=0)
    assert errors(student, windows[2]) < 0.6 * errors(plain, windows[2])
    factor = student.model.layers[0].self_attn.window_factor.sigmoid()
    assert torch.allclose(factor, torch.tensor(math.exp(-3.0)))


def test_a_run_is_saved_resumed_and_loaded(example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, run = example
    model = tiny()
    before = {name: p.clone() for name, p in model.named_parameters()}
    monkeypatch.setattr(run, "EVERY", 0.0)
    _, first = trained(run, recipe, model, tmp_path, 2.0)
    student, progress = trained(run, recipe, model, tmp_path, 3.0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())  # the teacher stays what it is
    assert progress.steps[0] >= first.steps[0] and progress.steps[1] > first.steps[1] > 0
    assert progress.curve[: len(first.curve)] == first.curve and len(progress.curve) == sum(progress.steps)
    state = torch.load(tmp_path / run.STATE, weights_only=True)
    named = dict(student.named_parameters())
    assert state["stage"] == 2 and any("lora_B" in name for name in state["parameters"])
    assert all(torch.equal(value, named[name]) for name, value in state["parameters"].items())

    from distill.export import parameters_of

    path = tmp_path / "weights.safetensors"
    save_distilled(path, parameters_of(state), recipe.CONFIG, recipe.ALPHA / recipe.RANK, digest(model))
    assert {p.dtype for p in load_file(path).values()} == {torch.bfloat16}
    loaded, ids = tiny(), torch.randint(64, (1, 150))
    assert len(load_distilled(loaded, path)) == 3
    with torch.no_grad():
        want, found, stock = (m(ids).logits for m in (student, loaded, model))
    off = (found - want).abs().max()
    assert off < 0.1 * (want - stock).abs().max() and off < 0.05 * want.abs().max()  # bfloat16 in the file


class Tokenizer:
    """Characters as tokens."""

    eos_token_id = 63

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % 61 for c in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], **options: object) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([self(messages[0]["content"], False)["input_ids"]])}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(64 + i) for i in ids)


def test_export_writes_weights_numbers_and_documents(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    recipe, run = example
    from distill import export
    from distill.texts import Corpus

    document = tmp_path / "lawcat.md"
    document.write_text(f"before\n{export.MARKS[0]}\nold\n{export.MARKS[1]}\nafter\n", encoding="utf-8")
    for name, value in {"WEIGHTS": tmp_path / "weights", "DOCUMENT": document, "LENGTH": 96, "TOKENS": 4}.items():
        monkeypatch.setattr(export, name, value)
    model = tiny()
    trained(run, recipe, model, tmp_path, 0.5)
    subject = Subject("tiny", model, Tokenizer())
    corpus = Corpus({}, {"one": "abc d" * 200, "two": "xyz, " * 200})
    export.export(subject, corpus, tmp_path / run.STATE, Console(file=io.StringIO()), 0)
    path = tmp_path / "weights" / export.DISTILLED
    report = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    softmax, linear, hybrid = report["models"]
    assert softmax["relative"] == {"one": 1.0, "two": 1.0, "all": 1.0} and linear["relative"]["all"] != 1.0
    assert hybrid["perplexity"]["all"] not in (linear["perplexity"]["all"], softmax["perplexity"]["all"])
    assert report["bytes"] == path.stat().st_size and path.with_suffix(".png").stat().st_size > 1000
    assert f"{linear['relative']['all']:.3f} |" in (tmp_path / "weights" / "README.md").read_text(encoding="utf-8")
    told = document.read_text(encoding="utf-8")
    assert (
        told.startswith("before\n") and told.endswith("\nafter\n") and "old" not in told.split("after")[0].split("\n")
    )
    assert "all layers linear" in told
    converted = load_distilled(tiny(), path)
    assert len(converted) == 3


def test_layers_of_a_hybrid_that_stay_softmax_have_no_lora(tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "weights.safetensors"
    made = weights(model, path)
    kept = model.model.layers[1].self_attn
    old = {name: p.data_ptr() for name, p in kept.named_parameters()}
    shared = model.model.layers[0].self_attn.q_proj.weight
    values = shared.clone()
    assert load_distilled(model, path, [0, 2]) == ["model.layers.0.self_attn", "model.layers.2.self_attn"]
    assert model.model.layers[1].self_attn is kept and {n: p.data_ptr() for n, p in kept.named_parameters()} == old
    assert torch.equal(shared, values)  # whoever shares it keeps it
    a, b = (made[f"model.layers.0.self_attn.q_proj.lora_{x}"].bfloat16().float() for x in "AB")
    torch.testing.assert_close(
        model.model.layers[0].self_attn.q_proj.weight, values + 2.0 * b @ a
    )  # 2.0: the file's scale


def weights(model: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    """Some distilled weights of a model."""
    config = LawcatConfig(window_size=16)
    made = tiny()
    convert(made, attention=config)
    found = {name: torch.randn_like(p) for name, p in subquad.trainable_parameters(made).items()}
    for i in range(3):
        for name, (out, width) in {"q_proj": (32, 32), "k_proj": (16, 32), "o_proj": (32, 32)}.items():
            prefix = f"model.layers.{i}.self_attn.{name}.lora_"
            found |= {f"{prefix}A": torch.randn(4, width), f"{prefix}B": torch.randn(out, 4)}
    save_distilled(path, found, config, 2.0, digest(model))
    return found


def test_another_model_or_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    weights(tiny(), path)
    other = tiny(seed=1)
    modules = [id(m) for m in other.modules()]
    with pytest.raises(ValueError, match=r"model: expected the one that weights\.safetensors was made for"):
        load_distilled(other, path)
    tensors = load_file(path)
    save_file(tensors, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="path: expected weights of format 'subquad-lawcat-1', got None"):
        load_distilled(other, tmp_path / "plain.safetensors")
    assert [id(m) for m in other.modules()] == modules


def test_a_file_that_lacks_or_adds_parameters_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    found = weights(tiny(), path)
    gone = "model.layers.2.self_attn.conv_q.weight"
    for change, message in (
        ({gone: None}, rf"path: expected {gone}"),
        ({gone: torch.zeros(32, 3)}, rf"path: expected {gone} of shape"),
        ({"model.layers.9.self_attn.conv_q.weight": torch.zeros(2)}, "path: expected no "),
    ):
        changed = {name: value for name, value in (found | change).items() if value is not None}
        model = tiny()
        modules = [id(m) for m in model.modules()]
        save_distilled(path, changed, LawcatConfig(window_size=16), 2.0, digest(model))
        with pytest.raises(ValueError, match=message):
            load_distilled(model, path)
        assert [id(m) for m in model.modules()] == modules
