"""Gemma 3 270M, the real model: layers that slide over 512 tokens, one head of keys and values of dimension 256, a GELU gate."""

from __future__ import annotations

import copy
import functools
import importlib.util
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import subquad
from subquad.calibration import CatsCalibrator, track_sparsity
from subquad.demo import gemma
from subquad.demo.measure import weight_bytes
from subquad.demo.model import Subject, cache_name, texts, windows
from subquad.integrations.transformers import SinkConfig, convert, register, revert
from subquad.nn import CATSMLP, QuantisedCATSMLP
from subquad.testing import backend_params

from .streaming import Stream

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*native kernels are not in use")]
LENGTH, SCORED = 640, 160  # tokens of a text, of which the last are predicted from beyond the window


@functools.cache
def _load() -> Subject:
    return gemma.load("cpu", "float32")


@pytest.fixture
def subject() -> Iterator[Subject]:
    """The model as it is; what tests convert they put back."""
    if importlib.util.find_spec(gemma.PACKAGE) is None:  # one that is there but broken is a failure
        pytest.skip(f"the weights are not installed: {gemma.INSTALL}")
    found = _load()
    found.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        yield found
    revert(found.model)


@pytest.fixture
def ids(subject: Subject) -> torch.Tensor:
    """Of the manual's second half, [1, LENGTH]."""
    return windows(subject.tokenizer, texts()[1], 2 * LENGTH, LENGTH, "cpu", subject.first)[0]


def loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Nats per token of the last SCORED tokens."""
    logits = model(ids, logits_to_keep=SCORED + 1).logits[0, :-1]
    return F.cross_entropy(logits, ids[0, -SCORED:])


def test_the_model_is_that_of_the_file(subject: Subject, ids: torch.Tensor) -> None:
    """Sizes, tokens, and that it speaks English."""
    config = subject.model.config
    assert (config.num_hidden_layers, config.num_key_value_heads, config.head_dim) == (18, 1, 256)
    assert config.layer_types.count("full_attention") == 3 and config.sliding_window == 512
    assert subject.model.lm_head.weight is subject.model.model.embed_tokens.weight
    words = subject.tokenizer("Paris is the  capital.")["input_ids"]
    assert words[0] == subject.first == 2 and subject.tokenizer.decode(words[1:]) == "Paris is the  capital."
    text = "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is"
    asked = torch.tensor([subject.tokenizer(text)["input_ids"]])
    assert subject.tokenizer.decode(subject.model(asked).logits[0, -1].argmax()).strip() == "Madrid"
    assert loss(subject.model, ids) < 3.0


@backend_params("interval_attention", "native")
def test_attention_beyond_the_window(subject: Subject, ids: torch.Tensor, backend: str) -> None:
    """Logits of a text longer than the window; of rows padded to it; and greedy text whose cache slides meanwhile."""
    register()
    model, padded = subject.model, torch.cat([torch.zeros_like(ids[:, :100]), ids[:, :-100]], 1)
    mask = (torch.arange(LENGTH) >= 100)[None].long()
    found: dict[str, list[torch.Tensor]] = {}
    for implementation in ("eager", "subquad"):
        model.set_attn_implementation(implementation)
        with subquad.use_backend(backend):
            text = model.generate(ids[:, :500], max_new_tokens=20, do_sample=False, eos_token_id=None)
            logits = model(ids, logits_to_keep=200).logits, model(padded, attention_mask=mask, logits_to_keep=20).logits
        found[implementation] = [*logits, text[0, 500:]]
    for ours, theirs in zip(found["subquad"][:2], found["eager"][:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4 * float(theirs.abs().max()))
    assert torch.equal(found["subquad"][2], found["eager"][2])


@backend_params("cats_mlp", "native")
def test_cats_with_a_gelu_gate(subject: Subject, ids: torch.Tensor, backend: str) -> None:
    """Dense without a threshold, for a text and for one token; as sparse as calibrated, and still a language model."""
    model, name = subject.model, cache_name(subject.model)
    want, stock = loss(model, ids), model(ids[:, :32], logits_to_keep=1).logits
    with subquad.use_backend(backend):
        convert(model, mlp="cats")
        mlps = [module for module in model.modules() if isinstance(module, CATSMLP)]
        assert len(mlps) == 18 and {module.activation for module in mlps} == {"gelu_tanh"}
        torch.testing.assert_close(loss(model, ids), want, rtol=1e-5, atol=0)
        cache = model(ids[:, :31], use_cache=True, logits_to_keep=1)[name]
        last = model(ids[:, 31:32], **{name: cache}).logits
        torch.testing.assert_close(last, stock, rtol=0, atol=1e-4 * float(stock.abs().max()))
        with CatsCalibrator(model) as calibrator:
            for text in windows(subject.tokenizer, texts()[0], 1200, 400, "cpu", subject.first):
                model(text, logits_to_keep=1)
        calibrator.apply(0.3)
        with track_sparsity(model) as tracker:
            sparse = loss(model, ids)
    assert tracker.sparsity is not None and abs(tracker.sparsity - 0.3) < 0.05
    assert 1e-4 < abs(sparse - want) < 0.5


def test_sinks_on_a_model_that_slides(subject: Subject, ids: torch.Tensor) -> None:
    """Layers that see all keep sinks and a window, the others their own: the loop by hand, its cache and converted layers."""
    model, name = subject.model, cache_name(subject.model)
    kinds = model.config.layer_types
    want = Stream(model, [(0, 512) if kind == "sliding_attention" else (4, 12) for kind in kinds])
    logits = want.logits(ids[0, :40].tolist())[-8:]
    cache = subquad.SinkCache(model, 4, 12)
    tokens = ids[:, :40].split(1, 1)
    ours = torch.cat([model(token, **{name: cache}).logits[0] for token in tokens])[-8:]
    torch.testing.assert_close(ours, logits, rtol=0, atol=2e-4 * float(logits.abs().max()))
    convert(model, attention=SinkConfig(sink_tokens=4, window=12))
    ours = model(ids[:, :40], logits_to_keep=8).logits[0]
    torch.testing.assert_close(ours, logits, rtol=0, atol=2e-4 * float(logits.abs().max()))
    revert(model)
    plain = model(ids[:, :40], logits_to_keep=8).logits[0]
    assert (plain - logits).abs().max() > 1e-2 * logits.abs().max()  # there was something to forget


def test_weights_in_few_bits(subject: Subject, ids: torch.Tensor) -> None:
    """Eight bits say what the model says. The file's own blocks are of types without a kernel, and refused by name."""
    want, bytes_ = loss(subject.model, ids), weight_bytes(subject.model)
    message = (
        r"model\.layers\.0\.\S+: gguf_file: expected blk\.0\.\S+ in blocks of Q8_0, Q4_0, Q4_1 or dense, got Q\d_[0K]"
    )
    with pytest.raises(ValueError, match=message):
        convert(subject.model, weights="gguf", gguf_file=gemma.weights_file())
    assert all(type(module).__module__.startswith(("torch.", "transformers.")) for module in subject.model.modules())
    small = copy.deepcopy(subject.model)
    assert not convert(small, mlp="cats", weights="int8").left
    assert sum(isinstance(module, QuantisedCATSMLP) for module in small.modules()) == 18
    assert weight_bytes(small) < 0.27 * bytes_
    assert abs(loss(small, ids) - want) < 0.03


def test_a_demo_of_it(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole demo, on its first layers and a few tokens."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from rich.console import Console

    from subquad.demo import run

    monkeypatch.setattr(run, "_prepare_native", lambda device: "left out in this test")
    part = Subject(subject.name, shortened(subject.model, 6), subject.tokenizer, None, subject.first, subject.families)
    settings = run.Settings(256, 256, 128, 4, 3, 5, 192, 32, 16, ())
    code = run.run(lambda: part, settings, tmp_path, "cpu", "float32", Console(file=io.StringIO()))
    report = json.loads((tmp_path / "report.json").read_text())
    assert code == 0 and report["check"]["passed"]
    assert [row["name"] for row in report["variants"]] == [
        "dense", "CATS 30%", "CATS 50%", "CATS 70%", "int8, CATS 50%", "our attention",
    ]  # fmt: skip


def shortened(model: Any, layers: int) -> Any:
    """The first layers as a model of their own, with a window that short texts fill."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.layer_types, config.sliding_window = layers, config.layer_types[:layers], 16
    with torch.device("meta"):
        short = type(model)(config)
    own = dict(short.named_parameters())
    state = {name: x for name, x in model.named_parameters() if name in own}
    return type(model).from_pretrained(None, config=config, state_dict=state).eval().requires_grad_(False)
