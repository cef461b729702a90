"""What layers refuse by name when they are made or called: sizes, parts, devices, inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from subquad.cache.lawcat import LawcatState
from subquad.cache.sink_state import SinkState
from subquad.nn import CATSMLP, LawcatAttention, SinkAttention, SuperlinearAttention

HUGE = 2**62
ALL = pytest.mark.parametrize("layer", [LawcatAttention, SinkAttention, SuperlinearAttention])
OPTIONS: list[tuple[type[Exception], dict[str, Any], str]] = [
    (TypeError, {"hidden_size": "64"}, "hidden_size: expected an int, got str"),
    (TypeError, {"num_heads": 4.0}, "num_heads: expected an int, got float"),
    (ValueError, {"num_heads": 0}, "num_heads: expected at least 1, got 0"),
    (ValueError, {"num_heads": 6}, "num_heads: expected a divisor of hidden_size 64 without head_dim, got 6"),
    (ValueError, {"num_kv_heads": 3}, "num_kv_heads: expected a divisor of 4, got 3"),
    (ValueError, {"head_dim": 0}, "head_dim: expected at least 1, got 0"),
    (ValueError, {"hidden_size": HUGE}, r"hidden_size: expected sizes of a tensor below 2\^60 elements, got 46116860"),
    (ValueError, {"num_heads": HUGE, "num_kv_heads": 2, "head_dim": 8}, "num_heads: expected sizes of a tensor"),
    (TypeError, {"layer_idx": "x"}, "layer_idx: expected an int, got str"),
    (ValueError, {"layer_idx": -1}, "layer_idx: expected at least 0, got -1"),
    (ValueError, {"device": "nope"}, "device: expected a torch.device or the name of one, got 'nope'"),
    (TypeError, {"parts": [1]}, "parts: expected a mapping of names, got list"),
    (ValueError, {"parts": {"z": 1}}, "parts: expected names of q_proj, .*k_norm.*, got 'z'"),
    (TypeError, {"parts": {"q_proj": 1}}, r"parts\['q_proj'\]: expected a torch.nn.Module, got int"),
    (
        ValueError,
        {"parts": {"k_proj": nn.Linear(64, 64)}},
        r"parts\['k_proj'\]: expected a map of 64 to 32, got \(64, 64\)",
    ),
    (ValueError, {"parts": {"q_norm": nn.RMSNorm(3)}}, r"parts\['q_norm'\]: expected a norm of 16 or 64, got 3"),
]


@ALL
@pytest.mark.parametrize(
    ("error", "options", "message"), OPTIONS, ids=[f"{i}-{o[2][:12]}" for i, o in enumerate(OPTIONS)]
)
def test_sizes_and_parts(layer: Any, error: type[Exception], options: dict[str, Any], message: str) -> None:
    with pytest.raises(error, match="^" + message):
        layer(**({"hidden_size": 64, "num_heads": 4, "num_kv_heads": 2} | options))


def test_sink_logits_of_others() -> None:
    for sinks, error, message in (
        (nn.Parameter(torch.zeros(3)), ValueError, r"parts\['sinks'\]: expected shape \[4\], got \[3\]"),
        (torch.zeros(4), TypeError, r"parts\['sinks'\]: expected a torch.nn.Parameter, got Tensor"),
    ):
        with pytest.raises(error, match="^" + message):
            SinkAttention(64, 4, parts={"sinks": sinks})
    with pytest.raises(ValueError, match=r"^parts: expected names of .*, got 'sinks'"):
        LawcatAttention(64, 4, parts={"sinks": nn.Parameter(torch.zeros(4))})  # type: ignore[dict-item]


@ALL
def test_parts_that_fit_are_used(layer: Any) -> None:
    parts = {"v_proj": nn.Linear(64, 32), "k_norm": nn.RMSNorm(16), "o_proj": nn.Sequential(nn.Linear(64, 64))}
    made = layer(64, 4, 2, parts=parts)
    assert all(getattr(made, name) is part for name, part in parts.items()) and made.q_norm is None


@ALL
def test_inputs(layer: Any) -> None:
    made, x = layer(64, 4, 2), torch.zeros(2, 5, 64)
    for given, error, message in (
        (x[0], ValueError, r"expected shape \[B, T, 64\], got \[5, 64\]"),
        (x[..., :63], ValueError, r"expected shape \[B, T, 64\], got \[2, 5, 63\]"),
        (None, TypeError, r"expected a torch\.Tensor, got NoneType"),
        (x.long(), TypeError, r"expected float32, bfloat16, float16 or float64, got torch\.int64"),
    ):
        with pytest.raises(error, match=r"^hidden_states: " + message):
            made(given)


@pytest.mark.parametrize("layer", [LawcatAttention, SuperlinearAttention])
def test_rotations(layer: Any) -> None:
    """Of layers that rotate by what the model gives them."""
    made, x = layer(64, 4, 2, **({"rope": "linear"} if layer is LawcatAttention else {})), torch.zeros(2, 5, 64)
    angles = torch.zeros(2, 5, 16)
    assert made(x, (angles[:1], angles[:1]))[0].shape == made(x, (angles, angles))[0].shape == x.shape
    for given, error, message in (
        (3, TypeError, r"expected \(cos, sin\), two tensors, got int"),
        ((angles,), TypeError, r"expected \(cos, sin\), two tensors, got tuple"),
        ((angles, None), TypeError, r"expected \(cos, sin\), two tensors, got tuple"),
        ((angles[:, :4], angles[:, :4]), ValueError, r".* shape \[1 or 2, 5, at most 16\], got \[2, 4, 16\]"),
        ((angles[0], angles[0]), ValueError, r".* shape \[1 or 2, 5, at most 16\], got \[5, 16\]"),
        ((torch.zeros(1, 5, 20),) * 2, ValueError, r".* shape \[1 or 2, 5, at most 16\], got \[1, 5, 20\]"),
    ):
        with pytest.raises(error, match="^position_embeddings: " + message):
            made(x, given)


def test_mlps() -> None:
    for error, options, message in (
        (ValueError, {"intermediate_size": HUGE}, "intermediate_size: expected sizes of a tensor"),
        (ValueError, {"hidden_size": -1}, "hidden_size: expected at least 0"),
        (TypeError, {"bias": "no"}, "bias: expected a bool, got str"),
        (ValueError, {"device": "nope"}, "device: expected a torch.device or the name of one, got 'nope'"),
    ):
        with pytest.raises(error, match="^" + message):
            CATSMLP(**({"hidden_size": 4, "intermediate_size": 8} | options))  # type: ignore[arg-type]


def test_a_cache_somewhere_else() -> None:
    with pytest.raises(ValueError, match=r"^device: expected a torch\.device or the name of one, got 'nope'"):
        SinkAttention(64, 4).new_cache(1, device="nope")


@pytest.mark.parametrize("state", [LawcatState, SinkState])
def test_states_are_mappings(state: Any) -> None:
    with pytest.raises(TypeError, match=r"^state: expected a mapping of names, got NoneType"):
        state().load_state_dict(None)


def test_a_state_without_its_counter() -> None:
    with pytest.raises(ValueError, match=r"^state: expected 'seen', got \[\]"):
        SinkState().load_state_dict({})
