"""The softmax of a LAWCAT layer's window is the one that the model had, or the conversion is refused."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch

from subquad.demo.model import cache_name
from subquad.integrations.transformers import LawcatConfig, convert, revert
from subquad.nn import LawcatAttention
from subquad.nn._scores import Scores, scores_of

from .test_lawcat import ids, model_of, stir

transformers = pytest.importorskip("transformers", minversion="5")
from transformers.models.llama.modeling_llama import LlamaAttention  # noqa: E402

# What is peculiar about each, by family; more of it than the library's defaults have.
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {},  # its window is smaller than the layer's
    "Qwen2": {},  # biases
    "Qwen3": {},  # norms of heads
    "Olmo2": {},  # norms of all heads together
    "Glm": {"partial_rotary_factor": 0.5},
    "Glm4": {},
    "Helium": {},
    "Ernie4_5": {},
    "Cohere": {"use_qk_norm": True},
    "Cohere2": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 5},
    "SmolLM3": {"no_rope_layers": [1, 0, 1]},
    "Granite": {"attention_multiplier": 0.7},
    "GraniteMoeHybrid": {
        "layer_types": ["attention"] * 3,
        "num_local_experts": 0,
        "mamba_n_heads": 8,
        "position_embedding_type": "rope",
    },
    "Exaone4": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 5,
        "sliding_window_pattern": 2,
    },
    "Gemma2": {"attn_logit_softcapping": 1.0, "layer_types": ["full_attention"] * 3},
    "Gemma3": {"layer_types": ["full_attention"] * 3},
    "Nemotron": {"partial_rotary_factor": 0.5},
    "StableLm": {"partial_rotary_factor": 0.25},
    "NanoChat": {},  # refused
}
OPTIONS = LawcatConfig(window_size=16, affine_window=True)


def made(family: str) -> Any:
    if not hasattr(transformers, f"{family}ForCausalLM") and family != "Gemma3":
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    implementation = "eager" if family == "Gemma2" else "sdpa"
    return model_of(family, implementation, **MODELS[family])


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def layers_of(model: Any) -> list[LawcatAttention]:
    return [module for module in model.modules() if isinstance(module, LawcatAttention)]


@pytest.mark.parametrize("family", [family for family in MODELS if family != "NanoChat"])
@torch.no_grad()
def test_a_window_alone_is_the_model(family: str) -> None:
    """At once, and token by token with a cache; a conversion that sees no weights finds the same."""
    model = made(family)
    want = model(ids()).logits
    other = copy.deepcopy(model).to("meta")
    convert(model, attention=OPTIONS)
    convert(other, attention=OPTIONS)
    assert [layer.scores for layer in layers_of(other)] == [layer.scores for layer in layers_of(model)]
    for layer in layers_of(model):
        assert layer.window_factor is not None
        layer.window_factor.fill_(40.0)
    assert error(model(ids()).logits, want) < 1e-5
    out, name = model(ids()[:, :7], use_cache=True), cache_name(model)
    for t in range(7, 12):
        out = model(ids()[:, t : t + 1], use_cache=True, **{name: out[name]})
        assert error(out.logits[:, 0], want[:, t]) < 1e-5, t
    revert(model)
    assert torch.equal(model(ids()).logits, want)


@pytest.mark.parametrize("family", ["Cohere2", "SmolLM3", "Glm"])
@torch.no_grad()
def test_rope_of_the_linear_branch_is_the_models(family: str) -> None:
    """Also token by token: the fused step rotates as the rest does."""
    model = made(family)
    convert(model, attention=LawcatConfig(rope="linear"))
    stir(model)
    want = model(ids(), use_cache=False).logits
    out, name = model(ids()[:, :7], use_cache=True), cache_name(model)
    for t in range(7, 12):
        out = model(ids()[:, t : t + 1], use_cache=True, **{name: out[name]})
        assert error(out.logits[:, 0], want[:, t]) < 1e-5, t
    for layer in layers_of(model):
        x, angles = torch.randn(1, 5, 32), torch.randn(1, 5, 4 if family == "Glm" else 8)
        positions = angles.cos(), angles.sin()
        got = layer._heads(x, positions)[:2]
        plain = [p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj)]
        if layer.layer_idx != 1 or family == "Glm":
            plain = importlib.import_module(type(layer.original).__module__).apply_rotary_pos_emb(*plain, *positions)
        for y, of in zip(got, plain, strict=True):
            torch.testing.assert_close(y, of.transpose(1, 2))


@torch.no_grad()
def test_a_model_without_positions() -> None:
    """Its layers are given none; of others they are asked for."""
    more = MODELS["GraniteMoeHybrid"] | {"position_embedding_type": "nope"}
    model = model_of("GraniteMoeHybrid", **more)
    want = model(ids()).logits
    convert(model, attention=OPTIONS)
    for layer in layers_of(model):
        layer.window_factor.fill_(40.0)  # type: ignore[union-attr]
    assert error(model(ids()).logits, want) < 1e-5
    model = made("Llama")
    convert(model, attention=OPTIONS)
    with pytest.raises(ValueError, match="position_embeddings: expected"):
        layers_of(model)[0](torch.randn(1, 3, 32))


def _twice(self: Any, hidden_states: torch.Tensor, **more: Any) -> Any:
    return LlamaAttention.forward(self, 2 * hidden_states, **more)


def _later(self: Any, hidden_states: torch.Tensor, position_ids: torch.Tensor, **more: Any) -> Any:
    """As models that were trained for long texts: only tokens far on have another temperature."""
    return LlamaAttention.forward(self, hidden_states * (1 + (position_ids // 8192)[..., None]), **more)


def _clipped(self: Any, **more: Any) -> Any:
    out, weights = LlamaAttention.forward(self, **more)
    return out.clamp(-50, 50), weights


def _otherwise(self: Any, hidden_states: torch.Tensor, angles: torch.Tensor, **more: Any) -> Any:
    raise AssertionError


@pytest.mark.parametrize("forward", [_twice, _later, _clipped, _otherwise])
@pytest.mark.parametrize("options", [{"window_size": 4}, {"rope": "linear"}])
def test_what_scores_otherwise_is_refused_by_name(forward: Any, options: dict[str, Any]) -> None:
    model = made("Llama")
    other = model.model.layers[1].self_attn
    other.__class__ = type("Other", (LlamaAttention,), {"forward": forward})
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn: attention: expected .*; a Other"):
        convert(model, attention=LawcatConfig(**options))
    assert not layers_of(model)
    assert len(convert(model, attention="lawcat")) == 3


def test_a_model_that_is_refused() -> None:
    """It normalises after the rotation, which goes the other way round."""
    model = made("NanoChat")
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn: attention: .* NanoChatAttention computes something else"
    ):
        convert(model, attention=OPTIONS)
    assert len(convert(model, attention="lawcat")) == 3


def test_a_window_is_no_larger_than_the_layers() -> None:
    model = made("Cohere2")
    convert(model, attention=LawcatConfig(window_size=9))
    assert [layer.window_size for layer in layers_of(model)] == [5, 9, 5]
    assert [layer.config.window_size for layer in layers_of(model)] == [9, 9, 9]


def test_the_random_numbers_of_a_user_stay_as_they_are() -> None:
    model = made("Llama")
    state = torch.random.get_rng_state()
    with torch.device("meta"):
        scores_of(model.model.layers[0].self_attn, 4, 2, 8)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_parts_without_a_forward_are_taken_as_they_are() -> None:
    attention = torch.nn.Module()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        attention.add_module(name, torch.nn.Linear(32, 32))
    attention.head_dim, attention.scaling = 8, 0.5  # type: ignore[assignment]
    assert LawcatAttention.from_attention(attention, window_size=4).scores == Scores(scaling=0.5)
