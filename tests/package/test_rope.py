"""Rotations of models: frequencies as transformers computes them, phases as exact arithmetic does."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch

from subquad import RopeSpec, SinkKVCache

SIZES = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 2048,
}  # fmt: skip
FACTORS = [1.0 + 0.1 * i for i in range(32)]
KINDS: list[dict[str, Any]] = [
    YARN,
    YARN | {"mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 20, "beta_slow": 2, "truncate": False},
    YARN | {"attention_factor": 1.7, "factor": 8.0, "original_max_position_embeddings": 1024},
    {"rope_type": "linear", "factor": 3.0},
    LLAMA3,
    {"rope_type": "dynamic", "factor": 3.0},
    {
        "rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS[::-1], "factor": 4.0,
        "original_max_position_embeddings": 2048,
    },
]  # fmt: skip


def config_of(parameters: dict[str, Any], partial: float | None = None) -> Any:
    transformers = pytest.importorskip("transformers")
    parameters = {"rope_theta": 1e4} | parameters
    if partial is not None:
        parameters["partial_rotary_factor"] = partial
        for name in ("short_factor", "long_factor"):
            if name in parameters:
                parameters[name] = parameters[name][: int(32 * partial)]
    return transformers.LlamaConfig(**SIZES, rope_parameters=parameters)


@pytest.mark.parametrize("partial", [None, 0.5])
@pytest.mark.parametrize("parameters", KINDS, ids=lambda p: p["rope_type"])
def test_frequencies_of_transformers(parameters: dict[str, Any], partial: float | None) -> None:
    """To the last bit, with their factor of queries and keys; also from the model's module."""
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    config = config_of(parameters, partial)
    frequencies, scaling = utils.ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")
    changing = parameters["rope_type"] in ("dynamic", "longrope")
    rope = RopeSpec.from_hf(config, max_positions=1024 if changing else None)
    assert torch.equal(rope.inv_freq, frequencies) and rope.attention_scaling == scaling
    assert rope.rotary_dim == (64 if partial is None else 32)
    module = pytest.importorskip("transformers.models.llama.modeling_llama").LlamaRotaryEmbedding(config)
    again = RopeSpec.from_hf(module, max_positions=1024)
    assert torch.equal(again.turns(), rope.turns()) and again.attention_scaling == scaling
    assert again.max_positions == rope.max_positions


def test_frequencies_of_a_raised_theta() -> None:
    """The "dynamic" kind of transformers has the theta of "ntk" at one length."""
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    factor = 3.0
    length = int(8192 * (2 * factor - 1) / factor)
    config = config_of({"rope_type": "dynamic", "factor": factor})
    expected, _ = utils.ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", length)
    config.rope_parameters = {"rope_type": "ntk", "factor": factor, "rope_theta": 1e4}
    torch.testing.assert_close(RopeSpec.from_hf(config).inv_freq, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("parameters", "limit"), [(KINDS[5], 8192), (KINDS[6], 2048)])
def test_frequencies_that_change_have_a_limit(parameters: dict[str, Any], limit: int) -> None:
    config = config_of(parameters)
    module = pytest.importorskip("transformers.models.llama.modeling_llama").LlamaRotaryEmbedding(config)
    for source in (config, module):
        with pytest.raises(ValueError, match=f"^source: .*{parameters['rope_type']}"):
            RopeSpec.from_hf(source)
        with pytest.raises(ValueError, match=f"^source: .*max_positions={limit}"):
            RopeSpec.from_hf(source, max_positions=limit + 1)
    rope = RopeSpec.from_hf(config, max_positions=limit)
    assert rope.max_positions == limit
    SinkKVCache(1, 1, 64, window=limit - 4, rope=rope)
    with pytest.raises(ValueError, match=r"^rope: expected one that holds for"):
        SinkKVCache(1, 1, 64, window=limit - 3, rope=rope)
    with pytest.raises(ValueError, match=r"^positions: expected 'cache'.*'absolute'"):
        SinkKVCache(1, 1, 64, window=8, rope=rope, positions="absolute")


def test_other_kinds_name_themselves() -> None:
    config = config_of(YARN)
    config.rope_parameters = {"rope_type": "spiral", "rope_theta": 1e4}
    with pytest.raises(ValueError, match=r"^source: expected rope type .*'spiral'"):
        RopeSpec.from_hf(config)


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ValueError, {"inv_freq": torch.tensor([1.0, math.nan])}, "inv_freq: expected finite numbers"),
        (ValueError, {"inv_freq": torch.tensor([1.0, math.inf])}, "inv_freq: expected finite numbers"),
        (TypeError, {"rotary_dim": 4.0}, "rotary_dim: expected an int, got float"),
        (TypeError, {"interleaved": "no"}, "interleaved: expected a bool, got str"),
        (ValueError, {"attention_scaling": math.nan}, "attention_scaling: expected a finite number"),
        (TypeError, {"max_positions": "8"}, "max_positions: expected an int, got str"),
    ],
)
def test_bad_options(error: type[Exception], options: dict[str, Any], message: str) -> None:
    """Phases of NaN would be those of some number."""
    with pytest.raises(error, match=f"^{message}"):
        RopeSpec(**({"inv_freq": torch.tensor([1.0, 0.1]), "rotary_dim": 4} | options))


@pytest.mark.parametrize("position", [1, 1023, 4_000_000, 2**31 + 5, -(2**31) - 5, 2**40 + 1])
def test_phases_are_exact(position: int) -> None:
    """Against rational arithmetic with sixty digits of pi: no phase is off by more than the frequency's own last bit."""
    pi = Fraction(314159265358979323846264338327950288419716939937510582097494459, 10**62)
    rope = RopeSpec(1.0 / 1e4 ** (torch.arange(0, 16, 2).float() / 16), 16)
    for frequency, step in zip(rope.inv_freq.tolist(), rope.turns().tolist(), strict=True):
        exact = Fraction(frequency) / (2 * pi) * position % 1
        found = Fraction(position * (step % 2**64) % 2**64, 2**64)
        distance = abs(exact - found)
        assert float(min(distance, 1 - distance)) < abs(position) * 2.0**-55, frequency
    x = torch.randn(16, dtype=torch.float64)
    angles = [float(Fraction(f) / (2 * pi) * position % 1) * 2 * math.pi for f in rope.inv_freq.tolist()]
    cos, sin = (torch.tensor([g(a) for a in angles], dtype=torch.float64) for g in (math.cos, math.sin))
    expected = torch.cat([x[:8] * cos - x[8:] * sin, x[8:] * cos + x[:8] * sin])
    torch.testing.assert_close(
        rope.rotate(x, torch.tensor(position)), expected, atol=1e-15 * abs(position) + 1e-12, rtol=0
    )


def test_cosines_and_sines() -> None:
    """Of any whole numbers, one pair of every frequency, as `rotate` applies them; of nothing else."""
    rope = RopeSpec(torch.tensor([1.0, 0.01]), 4)
    positions = torch.tensor([[0, 7], [-7, 2**40 + 3]])
    cos, sin = rope.cos_sin(positions)
    assert cos.shape == sin.shape == (2, 2, 2) and cos.dtype is sin.dtype is torch.float64
    turned = rope.rotate(torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64).expand(2, 2, 4), positions)
    assert torch.equal(turned, torch.cat([cos, sin], -1))
    torch.testing.assert_close(cos[0, 1], (7 * rope.inv_freq.double()).cos(), rtol=0, atol=1e-12)
    torch.testing.assert_close((cos[1, 0], sin[1, 0]), (cos[0, 1], -sin[0, 1]), rtol=0, atol=1e-12)
    for wrong in (positions.double(), positions > 0, [1, 2]):
        with pytest.raises(TypeError, match=r"^positions: expected"):
            rope.cos_sin(wrong)  # type: ignore[arg-type]
