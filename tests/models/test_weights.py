"""Whole models in few bits: what is exchanged and what is left, memory, other conversions, saving, errors."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import subquad
from subquad.convert import restore
from subquad.integrations.transformers import (
    CatsConfig,
    LawcatConfig,
    SinkConfig,
    convert,
    load_converted,
    revert,
    to_dense,
)
from subquad.nn import CATSMLP, QuantisedCATSMLP, QuantisedDown, QuantisedEmbedding, QuantisedLinear
from subquad.nn._codes import Codes

from . import tiny

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = [
    pytest.mark.usefixtures("no_gradients"),
    pytest.mark.filterwarnings("ignore:.*native kernels are not in use"),  # any backend will do
]
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"mlp_bias": True, "attention_bias": True},
    "Mistral": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Gemma": {"head_dim": 16},
    "Gemma3Text": {"head_dim": 16, "sliding_window": 4},
    "Phi3": {},
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
FORMATS = pytest.mark.parametrize("weights", ["int8", "int4", "int4_min"])


def build(family: str = "Llama", tied: bool = True, **sizes: Any) -> Any:
    options = FAMILIES[family] if family != "Llama" or "bias" in sizes else {}
    sizes.pop("bias", None)
    return tiny.build(family, **options | sizes, tie_word_embeddings=tied)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def memory(model: nn.Module) -> int:
    tensors = (*model.parameters(), *model.buffers())
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def identity(model: nn.Module) -> dict[str, Any]:
    """What all or nothing means: the very modules, originals included, and their parameters."""
    modules = dict(model.named_modules(remove_duplicate=False))
    originals = {name: m.original for name, m in modules.items() if getattr(m, "original", None) is not None}
    return {
        "modules": {name: id(m) for name, m in modules.items()},
        "originals": {name: {n: id(c) for n, c in o.named_children()} for name, o in originals.items()},
        "parameters": {name: (id(p), p.stride()) for name, p in model.named_parameters(remove_duplicate=False)},
        "config": copy.deepcopy(getattr(model.config, "subquad", None)),
    }


# --- what is exchanged ----------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mlp", [None, "cats"])
@FORMATS
def test_a_model_is_that_of_its_codes(family: str, mlp: str | None, weights: str, ids: torch.Tensor) -> None:
    model = build(family, bias=True)
    want = model(ids).logits
    report = convert(model, mlp=mlp, weights=weights)
    assert not report.left and not any(isinstance(m, (nn.Linear, nn.Embedding)) for m in model.modules())
    mlps = [layer.mlp for layer in model.model.layers]
    assert all(isinstance(m, QuantisedCATSMLP) for m in mlps) == (mlp is not None)
    assert ("model.layers.0.mlp" in report) == (mlp is not None) and "model.layers.0.self_attn.o_proj" in report
    assert {"lm_head", "model.embed_tokens"} <= set(report) and len(report) == len(set(report))
    got = model(ids).logits
    assert distance(got, want) < (0.05 if weights == "int8" else 0.6)
    to_dense(model)
    assert not any(isinstance(module, Codes) for module in model.modules())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert distance(model(ids).logits, got) < 1e-5


@pytest.mark.parametrize(("weights", "most"), [("int8", 0.27), ("int4", 0.15), ("int4_min", 0.17)])
@pytest.mark.parametrize("mlp", [None, "cats"])
def test_memory(mlp: str | None, weights: str, most: float) -> None:
    """Bytes of parameters and buffers, and nothing keeps the dense weights."""
    model = build()
    full = memory(model)
    old = [weakref.ref(p) for name, p in model.named_parameters() if "norm" not in name]
    convert(model, attention="sink", mlp=mlp, weights=weights)
    assert memory(model) <= most * full
    gc.collect()
    assert not [ref for ref in old if ref() is not None]


def test_a_mixed_format() -> None:
    model = build()
    convert(model, mlp="cats", weights="int4", gate_weights="int8")
    assert {m.formats for m in model.modules() if isinstance(m, QuantisedCATSMLP)} == {("int8", "int4", "int4")}
    assert model.model.layers[0].self_attn.q_proj.format == "int4"


@pytest.mark.parametrize("attention", ["sink", "lawcat", "superlinear"])
@pytest.mark.parametrize("together", [True, False])
def test_projections_inside_our_attention(attention: str, together: bool, ids: torch.Tensor) -> None:
    model = build()
    if together:
        report = convert(model, attention=attention, weights="int8")
    else:
        convert(model, attention=attention)
        report = convert(model, weights="int8")
    layers = [layer.self_attn for layer in model.model.layers]
    new = {id(p) for layer in layers for p in layer.new_parameters().values()}
    for layer in layers:
        assert all(isinstance(getattr(layer, name), QuantisedLinear) for name in PROJECTIONS)
        assert all(isinstance(getattr(layer.original, name), QuantisedLinear) for name in PROJECTIONS)
        left = [m for m in layer.modules() if isinstance(m, nn.Linear)]
        assert all(id(m.weight) in new for m in left)
    assert report.new_parameters == (
        sum(p.numel() for m in layers for p in m.new_parameters().values()) if together else 0
    )
    got = model(ids).logits
    dense = copy.deepcopy(model)
    to_dense(dense)
    assert distance(dense(ids).logits, got) < 1e-5
    assert len(revert(model)) == 3
    assert all(
        isinstance(getattr(layer.self_attn, n), QuantisedLinear) for layer in model.model.layers for n in PROJECTIONS
    )


def test_layers() -> None:
    model = build(tied=False)
    report = convert(model, mlp="cats", weights="int4", layers=[0, -1])
    assert isinstance(model.lm_head, nn.Linear) and isinstance(model.model.embed_tokens, nn.Embedding)
    assert {name.split(".")[2] for name in report} == {"0", "2"} and len(report) == 10
    assert not any(isinstance(m, Codes) for m in model.model.layers[1].modules())
    report = convert(model, weights="int8", layers=["model.layers.1.self_attn", "lm_head"])
    assert sorted(report) == ["lm_head", *(f"model.layers.1.self_attn.{n}" for n in sorted(PROJECTIONS))]


def test_nothing_is_rounded_that_nobody_named() -> None:
    model = build()
    with pytest.raises(ValueError, match=r"layers: expected none whose weight is tied to 'model.embed_tokens'"):
        convert(model, weights="int8", layers=["lm_head"])
    with pytest.raises(TypeError, match="threshold: unknown option of weights"):
        convert(model, weights="int8", threshold=0.1)
    assert not any(isinstance(m, Codes) for m in model.modules())
    convert(model, weights="int4", layers=["model.layers.0.mlp.down_proj"])
    before = model.state_dict()
    with pytest.raises(ValueError, match="expected a weight in few bits like down_proj, got a dense one"):
        convert(model, mlp="cats")
    assert model.state_dict().keys() == before.keys() and isinstance(model.model.layers[1].mlp.up_proj, nn.Linear)


def test_ids_are_checked_as_a_dense_embedding_does() -> None:
    model = build()
    convert(model, weights="int8")
    for wrong in (torch.tensor([[1, -1]]), torch.tensor([[1, 160]])):
        with pytest.raises(IndexError):
            model(wrong)


def test_what_has_no_groups_is_left_and_named(ids: torch.Tensor) -> None:
    model = build(hidden_size=72, intermediate_size=96, head_dim=16, tied=False)
    report = convert(model, mlp="cats", weights="int8")
    assert sorted(report) == [f"model.layers.{i}.{n}" for i in range(3) for n in ("mlp", "self_attn.o_proj")]
    assert report.left["model.layers.0.mlp.gate_proj"] == "in_features: expected a multiple of 32, got 72"
    assert report.left["model.layers.0.mlp.down_proj"] == "out_features: expected a multiple of 32, got 72"
    assert "lm_head" in report.left and type(model.model.layers[0].mlp) is CATSMLP
    model(ids)


def test_what_has_hooks_is_left_and_named(ids: torch.Tensor) -> None:
    model = build()
    model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: None)
    model.lm_head.register_forward_pre_hook(lambda *_: None)
    report = convert(model, weights="int8")
    assert set(report.left) == {"model.layers.1.self_attn.q_proj", "lm_head", "model.embed_tokens"}
    assert "hooks" in report.left["lm_head"] and "tied" in report.left["model.embed_tokens"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model = build()
    model.model.embed_tokens.register_forward_hook(lambda *_: None)
    assert set(convert(model, weights="int8").left) == {"lm_head", "model.embed_tokens"}


def test_an_embedding_of_its_own_stays(ids: torch.Tensor) -> None:
    model = build(tied=False)
    report = convert(model, weights="int8")
    assert isinstance(model.model.embed_tokens, nn.Embedding) and isinstance(model.lm_head, QuantisedLinear)
    assert not report.left


def test_a_tied_embedding_stays_tied(ids: torch.Tensor) -> None:
    model = build()
    convert(model, weights="int4")
    assert isinstance(model.model.embed_tokens, QuantisedEmbedding)
    for moved in (model.half(), copy.deepcopy(model), model.float(), model._apply(lambda t: t.clone())):
        assert moved.lm_head.weight.data_ptr() == moved.model.embed_tokens.weight.data_ptr()
    assert model(ids).logits.dtype == torch.float32
    model.bfloat16()
    assert model(ids).logits.dtype == torch.bfloat16


def test_what_is_used_twice_is_one_module() -> None:
    model = build()
    model.model.layers[2].mlp.up_proj = model.model.layers[0].mlp.up_proj
    model.model.layers[2].self_attn.v_proj.weight = model.model.layers[0].self_attn.v_proj.weight
    convert(model, weights="int8")
    assert model.model.layers[2].mlp.up_proj is model.model.layers[0].mlp.up_proj
    assert model.model.layers[2].self_attn.v_proj.weight is model.model.layers[0].self_attn.v_proj.weight


# --- with CATS ----------------------------------------


def sparse(model: nn.Module, ids: torch.Tensor) -> None:
    with subquad.CatsCalibrator(model) as calibrator:
        model(ids)
    calibrator.apply(0.5)


def test_calibration_sees_the_quantised_gate(ids: torch.Tensor) -> None:
    model = build()
    convert(model, mlp="cats", weights="int4")
    sparse(model, ids)
    with subquad.calibration.track_sparsity(model) as tracker:
        model(ids[:1, :4])
    rows = tracker.report()
    assert all(row.dense_calls == 0 and row.calls == 1 for row in rows) and 0.2 < tracker.sparsity < 0.8
    got = model(ids).logits
    dense = copy.deepcopy(model)
    thresholds = [m.threshold.clone() for m in dense.modules() if isinstance(m, CATSMLP)]
    to_dense(dense)
    convert(dense, mlp="cats")
    for m, threshold in zip((m for m in dense.modules() if isinstance(m, CATSMLP)), thresholds, strict=True):
        m.set_threshold(threshold)
    assert distance(dense(ids).logits, got) < 1e-4


@pytest.mark.parametrize("first", ["mlp", "weights"])
def test_in_either_order(first: str, ids: torch.Tensor) -> None:
    """Codes that are there are taken: scales of the down projection are then those of 32 neurons."""
    model = build()
    if first == "mlp":
        convert(model, mlp=CatsConfig(threshold=0.01, inclusive=True))
        before = type(model.model.layers[0].mlp.original)
        convert(model, weights="int8")
    else:
        convert(model, weights="int8")
        convert(model, mlp=CatsConfig(threshold=0.01, inclusive=True))
        before = None
    for layer in model.model.layers:
        assert isinstance(layer.mlp, QuantisedCATSMLP) and layer.mlp.inclusive
        assert float(layer.mlp.threshold) == pytest.approx(0.01)
        assert layer.mlp.down_proj.shared == (first == "weights")
    got = model(ids).logits
    if before is not None:
        assert len(revert(model)) == 3 and type(model.model.layers[0].mlp) is before
        assert isinstance(model.model.layers[0].mlp.down_proj, QuantisedDown)
    dense = copy.deepcopy(model)
    to_dense(dense)
    assert distance(dense(ids).logits, got) < 0.5


def test_twice_is_once(ids: torch.Tensor) -> None:
    model = build()
    convert(model, mlp="cats", weights="int8")
    before = identity(model)
    assert convert(model, mlp="cats", weights="int8") == [] and identity(model) == before
    assert convert(model, weights="int8") == [] and identity(model) == before


# --- back ----------------------------------------


def test_revert_says_that_dense_weights_are_gone() -> None:
    model = build()
    convert(model, weights="int8")
    with pytest.raises(
        ValueError, match=r"model.embed_tokens: expected a layer that can be put back, .* to_dense\(model\)"
    ):
        revert(model)
    assert restore(model, "mlp") == []
    assert "lm_head" in to_dense(model) and not hasattr(model.config, "subquad")
    assert revert(model) == []
    with pytest.raises(TypeError, match="dtype: expected float32"):
        to_dense(model, torch.int8)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_to_dense_in_the_dtype_of_the_model(dtype: torch.dtype, bias: bool, ids: torch.Tensor) -> None:
    model = build(**({"bias": True} if bias else {})).to(dtype)
    convert(model, mlp="cats", weights="int8")
    if bias:  # what a layer has says it by itself
        layer = model.model.layers[0]
        for part in (layer.self_attn.q_proj, layer.mlp, layer.mlp.down_proj):
            assert {p.dtype for p in part.to_dense().parameters()} == {dtype}
    to_dense(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(ids).logits.isfinite().all()


# --- training ----------------------------------------


def test_gradients_go_through_to_what_learns(ids: torch.Tensor) -> None:
    model = build()
    convert(model, attention=LawcatConfig(), mlp=CatsConfig(threshold=0.01), weights="int4")
    dense = copy.deepcopy(model)
    thresholds = [m.threshold for m in dense.modules() if isinstance(m, CATSMLP)]
    to_dense(dense)
    convert(dense, mlp="cats")
    for m, threshold in zip((m for m in dense.modules() if isinstance(m, CATSMLP)), thresholds, strict=True):
        m.set_threshold(threshold)
    found = []
    for each in (model, dense):
        with torch.enable_grad():
            each(ids, labels=ids).loss.backward()
        new = {n: p for layer in each.model.layers for n, p in layer.self_attn.new_parameters().items()}
        found.append({n: p.grad for n, p in new.items()} | {"norm": each.model.layers[0].input_layernorm.weight.grad})
    assert all(g is not None for g in found[0].values())
    for name, grad in found[0].items():
        assert distance(grad, found[1][name]) < 1e-3, name
    torch.optim.AdamW(model.parameters()).step()
    assert model.requires_grad_(True) is model  # codes are no parameters


# --- saved ----------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"weights": "int8"},
        {"weights": "int4", "mlp": CatsConfig(threshold=0.011)},
        {"weights": "int4_min", "mlp": CatsConfig(threshold=0.011), "attention": LawcatConfig(), "layers": [0, 2]},
        {
            "weights": "int4",
            "gate_weights": "int8",
            "mlp": CatsConfig(threshold=0.01),
            "attention": SinkConfig(window=30),
        },
    ],
    ids=["int8", "cats", "lawcat", "mixed"],
)
def test_saved_and_loaded(options: dict[str, Any], tied: bool, ids: torch.Tensor, tmp_path: Path) -> None:
    model = build(tied=tied)
    convert(model, **options)
    want = model(ids).logits
    model.save_pretrained(tmp_path)
    again = load_converted(tmp_path)
    assert torch.equal(again(ids).logits, want) and again.config.subquad == model.config.subquad
    own, other = model.state_dict(), again.state_dict()
    assert list(own) == list(other) and all(torch.equal(own[k], other[k]) for k in own)
    assert type(again) is type(model) and memory(again) == memory(model)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(load_converted(tmp_path / "again")(ids).logits, want)
    saved = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert saved < memory(model) + 20_000


def test_a_tied_output_layer_keeps_its_bias(ids: torch.Tensor, tmp_path: Path) -> None:
    model = build()
    model.lm_head.bias = nn.Parameter(torch.randn(160))
    convert(model, weights="int8")

    class Biased(transformers.LlamaForCausalLM):  # type: ignore[name-defined,misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.lm_head.bias = nn.Parameter(torch.empty(160))

    model.save_pretrained(tmp_path)
    assert torch.equal(load_converted(tmp_path, Biased)(ids).logits, model(ids).logits)


def test_shared_scales_are_saved(ids: torch.Tensor, tmp_path: Path) -> None:
    model = build()
    convert(model, weights="int4_min")
    convert(model, mlp=CatsConfig(threshold=0.01))
    model.save_pretrained(tmp_path)
    again = load_converted(tmp_path)
    assert again.model.layers[1].mlp.down_proj.shared
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_dtypes_are_saved(ids: torch.Tensor, tmp_path: Path) -> None:
    config = build().config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    convert(model, mlp=CatsConfig(threshold=0.0123), weights="int4")
    model.save_pretrained(tmp_path)
    again = load_converted(tmp_path)
    assert again.dtype == torch.bfloat16 and again.model.layers[0].mlp.threshold.dtype == torch.float32
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert load_converted(tmp_path, dtype=torch.float32)(ids).logits.dtype == torch.float32


def test_a_dense_model_is_not_filled_with_codes(tmp_path: Path) -> None:
    model = build()
    convert(model, weights="int8")
    with pytest.raises(RuntimeError, match="weight"):
        build().load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r"q_proj.weight: expected uint8 codes of format 'int8', got torch.float32"):
        model.load_state_dict(build().state_dict())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_class: expected the class of a model"):
        load_converted(tmp_path, transformers.AutoModelForCausalLM)


def test_it_generates(ids: torch.Tensor) -> None:
    model = build()
    convert(model, mlp=CatsConfig(threshold=0.005), weights="int8")
    found = model.generate(ids[:1], max_new_tokens=5, do_sample=False)
    step = ids[:1]
    for _ in range(5):
        step = torch.cat((step, model(step).logits[:, -1:].argmax(-1)), 1)
    assert found.shape == (1, 14) and (found == step).float().mean() > 0.9


# --- all or nothing ----------------------------------------


def _inf(model: Any) -> None:
    model.model.layers[2].mlp.down_proj.weight.data[1, 1] = torch.inf


def _half_mlp(model: Any) -> None:
    model.model.layers[2].mlp.up_proj.register_forward_hook(lambda *_: None)


class Adapter(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.lora_A = base, nn.Linear(base.in_features, 4, False)
        self.lora_B = nn.Linear(4, base.out_features, False)
        self.in_features, self.out_features = base.in_features, base.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def _adapter(model: Any) -> None:
    model.model.layers[2].self_attn.v_proj = Adapter(model.model.layers[2].self_attn.v_proj)


def _formula(model: Any) -> None:
    mlp = model.model.layers[2].mlp
    mlp.forward = lambda x: 2 * type(mlp).forward(mlp, x)


def _nothing(model: Any) -> None:
    pass


ERRORS: dict[str, tuple[Callable[[Any], None], dict[str, Any], str]] = {
    "inf": (_inf, {}, r"model.layers.2.mlp.down_proj: weight: expected finite numbers"),
    "hook": (_half_mlp, {}, r"model.layers.2.mlp.up_proj: expected a weight in few bits like the others, got .*hooks"),
    "adapter": (_adapter, {}, r"model.layers.2.self_attn.v_proj.base_layer: expected no adapter around it, .*to_dense"),
    "formula": (_formula, {}, r"model.layers.2.mlp: mlp: LlamaMLP does not compute"),
    "threshold": (
        _nothing,
        {"mlp": CatsConfig(threshold=float("nan"))},
        r"model.layers.0.mlp: threshold: expected numbers, got NaN",
    ),
    "number": (_nothing, {"layers": [7]}, r"layers: expected numbers below 3"),
    "name": (_nothing, {"layers": ["x"]}, r"layers: expected numbers below 3"),
}


@pytest.mark.parametrize(
    ("before", "error"),
    [
        (before, error)
        for before in (None, "sink", "cats")
        for error in ERRORS
        if before != "cats"
        or error not in ("formula", "threshold")  # what is CATS has been recognised, and has a threshold
    ],
)
def test_errors_change_nothing(before: str | None, error: str, ids: torch.Tensor) -> None:
    spoil, options, message = ERRORS[error]
    model = build()
    if before is not None:
        convert(model, **({"attention": "sink"} if before == "sink" else {"mlp": "cats"}))
    spoil(model)
    there, want = identity(model), model(ids).logits
    with pytest.raises(ValueError, match=message):
        convert(model, **({"mlp": "cats", "attention": None if before else "sink", "weights": "int8"} | options))
    assert identity(model) == there
    assert torch.allclose(model(ids).logits, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ValueError, {"weights": "int2"}, r"weights: expected one of 'int8', 'int4', 'int4_min', 'gguf', got 'int2'"),
        (ValueError, {"weights": "int4", "gate_weights": "x"}, r"gate_weights: expected one of 'int8'"),
        (ValueError, {"weights": "int8", "gguf_file": "x"}, r"gguf_file: expected None unless weights is 'gguf'"),
        (ValueError, {"mlp": "cats", "gate_weights": "int8"}, r"gate_weights: expected None with weights None"),
        (ValueError, {"weights": "gguf"}, r"gguf_file: expected the path of a file"),
        (ValueError, {}, r"mlp: expected 'cats' or .*or weights, got None for all"),
        (TypeError, {"weights": "int8", "layers": "lm_head"}, r"layers: expected a list"),
    ],
)
def test_wrong_arguments(error: type[Exception], options: dict[str, Any], message: str) -> None:
    with pytest.raises(error, match=message):
        convert(build(), **options)


def test_another_format_is_refused() -> None:
    model = build()
    convert(model, mlp="cats", weights="int8")
    for options in ({"weights": "int4"}, {"weights": "int8", "gate_weights": "int4", "mlp": "cats"}):
        with pytest.raises(
            ValueError, match=r"weights: expected 'int8', which it is in, got 'int4'; its dense weights are"
        ):
            convert(model, **options)
    with pytest.raises(ValueError, match=r"gate_up_proj: gate_weights: expected None for a fused"):
        convert(build("Phi3"), mlp="cats", weights="int4", gate_weights="int8")
    with pytest.raises(ValueError, match="model: expected one with Linears in it, got a ReLU"):
        convert(nn.ReLU(), weights="int8")


# --- adapters of peft ----------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_peft(ids: torch.Tensor) -> None:
    """Refused where they would be merged into codes; beside codes they learn, and are merged exactly."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = build()
    convert(model, mlp="cats", weights="int8")
    with pytest.raises(ValueError, match=r"Target module QuantisedLinear\(.*is not supported"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    model = peft.get_peft_model(build(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"q_proj.base_layer: expected no adapter around it, got peft\..*Linear"):
        convert(model, weights="int8")
    copied = peft.get_peft_model(build(), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["v_proj"]))
    with pytest.raises(ValueError, match=r"v_proj\.(original_module|modules_to_save).*: expected no adapter around it"):
        convert(copied, weights="int8", layers=["base_model.model.model.layers.0.self_attn.v_proj"])
    convert(model, mlp="cats", weights="int8", layers=[f"base_model.model.model.layers.{i}.mlp" for i in range(3)])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    with torch.enable_grad():
        model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if "lora" in name)
    want = model(ids).logits
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, want, rtol=1e-4, atol=1e-4)
