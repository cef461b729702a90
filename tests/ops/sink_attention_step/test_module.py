"""`nn.SinkAttention`: one function, whether it trains on sequences or streams."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from subquad import RopeSpec, SinkKVCache
from subquad.nn import SinkAttention

from .streams import INTERLEAVED, ROPE

CLOSE = {"atol": 1e-9, "rtol": 1e-9}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"rope": ROPE, "learned_sink": True, "qk_norm": True, "bias": True},
    {"rope": INTERLEAVED, "positions": "absolute", "num_kv_heads": 4},
    {"rope": ROPE, "window": 0, "sink_tokens": 2, "learned_sink": True},
]


def layer_of(**options: Any) -> SinkAttention:
    options = {"num_kv_heads": 2, "sink_tokens": 3, "window": 5, "dtype": torch.float64} | options
    layer = SinkAttention(24, 4, head_dim=8, **options)
    if layer.sinks is not None:
        torch.nn.init.normal_(layer.sinks, std=2.0)
    return layer


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("chunks", [[30], [1] * 30, [4, 17, 1, 8]], ids=str)
def test_any_division_of_a_sequence(options: dict[str, Any], chunks: list[int]) -> None:
    layer, x = layer_of(**options), torch.randn(2, 30, 24, dtype=torch.float64)
    cache = layer.new_cache(2)
    whole, _ = layer(x)
    with torch.no_grad():
        found = torch.cat([layer(part, cache=cache)[0] for part in x.split(chunks, 1)], 1)
    torch.testing.assert_close(found, whole, **CLOSE)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_padded_prompts(options: dict[str, Any]) -> None:
    """Rows are what they are alone, with and without a cache; then they go on."""
    layer, x, pad = layer_of(**options), torch.randn(3, 20, 24, dtype=torch.float64), torch.tensor([0, 7, 19])
    more = torch.randn(3, 4, 24, dtype=torch.float64)
    with torch.no_grad():
        cache = layer.new_cache(3)
        streamed, padded = layer(x, cache=cache, pad=pad)[0], layer(x, pad=pad)[0]
        after, _ = layer(more, cache=cache)
        for row, n in enumerate(pad.tolist()):
            alone = layer(torch.cat([x[row, n:], more[row]])[None])[0][0]
            for found in (streamed, padded):
                torch.testing.assert_close(found[row, n:], alone[: 20 - n], **CLOSE)
            torch.testing.assert_close(after[row], alone[20 - n :], **CLOSE)


def test_gradients_reach_every_parameter() -> None:
    """And are those of dense attention under a mask, at positions of the cache, which for a short sequence are plain."""
    layer, x = (
        layer_of(rope=ROPE, learned_sink=True, qk_norm=True, bias=True),
        torch.randn(2, 8, 24, dtype=torch.float64),
    )
    weight = torch.randn(2, 8, 24, dtype=torch.float64)
    (layer(x)[0] * weight).sum().backward()
    found = {name: p.grad for name, p in layer.named_parameters()}
    assert all(g is not None for g in found.values())
    layer.zero_grad()
    q, k, v = (getattr(layer, f"{n}_proj")(x).unflatten(-1, (-1, 8)) for n in ("q", "k", "v"))
    assert layer.q_norm is not None and layer.k_norm is not None and layer.sinks is not None
    places = torch.arange(8)[:, None]
    q = ROPE.rotate(layer.q_norm(q), places, ROPE.attention_scaling)
    k = ROPE.rotate(layer.k_norm(k), places, ROPE.attention_scaling).repeat_interleave(2, 2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(8)
    scores = scores.masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf)  # 8 tokens: all in sinks and window
    column = layer.sinks[None, :, None, None].expand(2, -1, 8, 1)
    p = torch.cat([scores, column], 3).softmax(3)[..., :-1]
    y = layer.o_proj(torch.einsum("bhts,bshd->bthd", p, v.repeat_interleave(2, 2)).flatten(2))
    (y * weight).sum().backward()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(found[name], p.grad, **CLOSE, msg=name)


def test_gradients_through_the_cache_are_refused() -> None:
    layer = layer_of(learned_sink=True)
    cache = layer.new_cache(1)
    for width in (1, 40):
        with pytest.raises(
            ValueError, match=r"^(k|q): expected a tensor without requires_grad.*train with sink_attention"
        ):
            layer(torch.randn(1, width, 24, dtype=torch.float64), cache=cache)
    assert cache.seen.tolist() == [0] and all(int(x.count_nonzero()) == 0 for x in (cache.ring_k, cache.sink_v))


def test_bad_input_is_named() -> None:
    for options, message in (
        ({"num_kv_heads": 3}, "num_kv_heads: expected a divisor of 4, got 3"),
        ({"window": -1}, "window: expected at least 0, got -1"),
        ({"sink_tokens": -1}, "sink_tokens: expected at least 0"),
        ({"sink_tokens": 0, "window": 0}, "window: expected at least 1 without sinks"),
        ({"positions": "here"}, "positions: expected one of 'cache', 'absolute'"),
        ({"backend": "fast"}, "backend: expected one of"),
        ({"head_dim": 300}, "head_dim: expected at most 256"),
        ({"head_dim": 4, "rope": ROPE}, "rope: expected at most 4 rotated elements"),
    ):
        with pytest.raises(ValueError, match="^" + message):
            SinkAttention(24, 4, **({"num_kv_heads": 2} | options))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^learned_sink: expected a bool"):
        SinkAttention(24, 4, learned_sink="yes")  # type: ignore[arg-type]
    layer, x = layer_of(), torch.randn(1, 2, 24, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^cache: expected window 5 as this layer has, got 6"):
        layer(x, cache=SinkKVCache(1, 2, 8, sink_tokens=3, window=6, dtype=torch.float64))
    with pytest.raises(
        ValueError, match=r"^past_key_values: expected a SinkKVCache or a Cache of transformers, got dict"
    ):
        layer(x, cache={})


def test_a_cache_of_another_rotation_is_refused() -> None:
    """It would rotate by its own, and add sink logits of its own, without a word."""
    sizes: dict[str, Any] = {"sink_tokens": 3, "window": 5, "dtype": torch.float64}
    x, other = torch.randn(1, 2, 24, dtype=torch.float64), RopeSpec(ROPE.inv_freq * 2, ROPE.rotary_dim)
    turned, plain = layer_of(rope=ROPE), layer_of()
    with torch.no_grad():
        for layer, rope in ((turned, None), (turned, other), (plain, ROPE)):
            cache = SinkKVCache(1, 2, 8, rope=rope, **sizes)
            with pytest.raises(ValueError, match=r"^cache: expected the rope of this layer"):
                layer(x, cache=cache)
            assert cache.seen.tolist() == [0]
        with pytest.raises(ValueError, match=r"^cache: expected no sink_logits"):
            plain(x, cache=SinkKVCache(1, 2, 8, sink_logits=torch.zeros(4), **sizes))
        found, _ = turned(x, cache=copy.deepcopy(turned.new_cache(1)))  # one that is equal will do
        torch.testing.assert_close(found, turned(x)[0], **CLOSE)
