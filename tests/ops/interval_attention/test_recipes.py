"""Recipes: the properties that define them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

import subquad
from subquad import RopeSpec
from subquad.recipes import pine_attention, pine_importance, segment_lse, soft_causal_attention
from subquad.testing import Sampler, backend_params

BOTH = ("native", "reference")


def tensors(b: int, t: int, heads: int = 2, kv_heads: int = 2, d: int = 8, seed: int = 0) -> list[torch.Tensor]:
    sampler = Sampler(seed=seed)
    return [sampler.normal(b, t, h, d) for h in (heads, kv_heads, kv_heads)]


def dense_soft(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, alpha: float, norm: str) -> torch.Tensor:
    """By [T, T] matrices."""
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    past = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
    if norm == "masked":
        p = (scores + torch.where(past, 0.0, math.log(alpha) if alpha else -torch.inf)).softmax(-1)
    else:
        p = scores.softmax(-1) * torch.where(past, 1.0, alpha)
    return torch.einsum("bhts,bshd->bthd", p, v)


@backend_params("interval_attention", *BOTH)
@pytest.mark.parametrize("norm", ["masked", "full"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_soft_causal(alpha: float, norm: str, backend: str) -> None:
    leaves = [x.requires_grad_() for x in tensors(2, 23)]
    ours = soft_causal_attention(*leaves, alpha, norm=norm, backend=backend)
    expected = dense_soft(*leaves, alpha, norm)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    upstream = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_only_the_masked_norm_is_causal_at_zero() -> None:
    """Cutting the sequence off must not change what is left."""
    q, k, v = tensors(1, 20)
    for norm, causal in (("masked", True), ("full", False)):
        whole = soft_causal_attention(q, k, v, 0.0, norm=norm)[:, :12]
        cut = soft_causal_attention(q[:, :12], k[:, :12], v[:, :12], 0.0, norm=norm)
        assert torch.allclose(whole, cut, atol=1e-6) is causal


@backend_params("interval_attention", *BOTH)
@pytest.mark.parametrize("norm", ["masked", "full"])
def test_values_of_the_future_do_not_come_through_at_zero(norm: str, backend: str) -> None:
    q, k, v = tensors(1, 9)
    v[:, 6] = torch.nan
    bad = soft_causal_attention(q, k, v, 0.0, norm=norm, backend=backend).isnan().flatten(2).any(-1)[0]
    assert bad.tolist() == [t >= 6 for t in range(9)]


@backend_params("interval_attention", *BOTH)
def test_segment_lse_is_the_mass_of_segments(backend: str) -> None:
    q, k, _ = tensors(2, 20, heads=4)
    lse = segment_lse(q, k, [2, 7, 7, 20], backend=backend)
    scores = torch.einsum("bthd,bshd->bths", q, k.repeat_interleave(2, 2)) / math.sqrt(8)
    expected = torch.stack([scores[..., a:b].logsumexp(-1) for a, b in ((2, 7), (7, 7), (7, 20))], -1)
    torch.testing.assert_close(lse, expected)


PREFIX, LENGTHS, SUFFIX = 4, (7, 3, 6), 5
ROPE = RopeSpec(1.0 / 100.0 ** (torch.arange(0, 8, 2) / 8), 8)


def moved(x: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """The sequence with its documents in another order."""
    prefix, *documents, suffix = x.split([PREFIX, *LENGTHS, SUFFIX], 1)
    return torch.cat([prefix, *(documents[i] for i in order), suffix], 1)


@backend_params("interval_attention", *BOTH)
@pytest.mark.parametrize("order", [(2, 0, 1), (1, 0, 2), (2, 1, 0)])
def test_pine_does_not_depend_on_the_order(order: tuple[int, ...], backend: str) -> None:
    """Permuting documents permutes the outputs of documents and leaves those of prefix and suffix as they are."""
    q, k, v = tensors(2, 25, heads=4)
    out = pine_attention(q, k, v, PREFIX, LENGTHS, ROPE, backend=backend)
    lengths = [LENGTHS[i] for i in order]
    other = pine_attention(*(moved(x, order) for x in (q, k, v)), PREFIX, lengths, ROPE, backend=backend)
    torch.testing.assert_close(other, moved(out, order), atol=1e-5, rtol=1e-5)
    causal = subquad.interval_attention(q, k, v, subquad.IntervalMask.causal())
    assert not torch.allclose(out, causal, atol=1e-2)


def literal_pine(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, order: list[list[int]]) -> torch.Tensor:
    """One batch entry, one head, query by query: keys are re-positioned and rotated for each.

    `order`: the documents from the most important on, to each document and to each token of the suffix.
    """
    edges = [PREFIX, *(PREFIX + sum(LENGTHS[: i + 1]) for i in range(len(LENGTHS)))]
    total, outputs = edges[-1], []
    for t in range(q.shape[0]):
        group = next((i for i in range(len(LENGTHS)) if edges[i] <= t < edges[i + 1]), len(LENGTHS) + t - total)
        at = {j: j for j in range(PREFIX)} | {j: j for j in range(total, q.shape[0])}
        if t >= PREFIX:
            end = total
            for document in order[group]:
                for u in range(LENGTHS[document]):
                    at[edges[document] + u] = end - LENGTHS[document] + u
                end -= LENGTHS[document]
        mine = at[t]
        keys = [j for j, position in at.items() if position <= mine]
        rotated = torch.stack([ROPE.rotate(k[j], torch.tensor(at[j])) for j in keys])
        p = (rotated @ ROPE.rotate(q[t], torch.tensor(mine)) / math.sqrt(8)).softmax(0)
        outputs.append(p @ v[keys])
    return torch.stack(outputs)


@backend_params("interval_attention", *BOTH)
def test_pine_is_the_literal_algorithm(backend: str) -> None:
    q, k, v = tensors(1, 25, heads=1, kv_heads=1)
    order = [[0, 2, 1], [1, 0, 2], [2, 1, 0], [1, 2, 0], [0, 1, 2], [2, 0, 1], [2, 1, 0], [0, 2, 1]]
    importance = torch.zeros(1, 1, 3 + SUFFIX, 3)
    for group, documents in enumerate(order):
        for rank, document in enumerate(documents):
            importance[0, 0, group, document] = -rank
    out = pine_attention(q, k, v, PREFIX, LENGTHS, ROPE, importance=importance, backend=backend)
    expected = literal_pine(q[0, :, 0].double(), k[0, :, 0].double(), v[0, :, 0].double(), order)
    torch.testing.assert_close(out[0, :, 0], expected.float(), atol=1e-5, rtol=1e-4)


def test_importance_is_mass_per_token() -> None:
    """The official algorithm: per query a softmax over the documents' keys, summed per document, divided by its length."""
    q, k, _ = (x.double() for x in tensors(2, 25, heads=4))
    ours = pine_importance(q, k, PREFIX, LENGTHS, backend="reference")
    edges = [4, 11, 14, 20]
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2))[..., 4:20] / math.sqrt(8)

    def mass(rows: slice, hidden: slice) -> torch.Tensor:
        part = scores[:, :, rows].clone()
        part[..., hidden] = -torch.inf
        p = part.softmax(-1)
        return torch.stack([p[..., a - 4 : b - 4].sum(-1) / (b - a) for a, b in pairwise(edges)], -1)

    for i, (a, b) in enumerate(pairwise(edges)):
        expected = mass(slice(a, b), slice(a - 4, b - 4)).mean(2)
        expected[..., i] = torch.inf
        torch.testing.assert_close(ours[:, :, i], expected, check_dtype=False)
    torch.testing.assert_close(ours[:, :, 3:], mass(slice(20, 25), slice(0, 0)), check_dtype=False)


@backend_params("interval_attention", *BOTH)
def test_the_suffix_of_pine_is_causal(backend: str) -> None:
    """What comes later does not change the order of documents for an earlier token: prefill is decoding, token by token."""
    q, k, v = tensors(2, 25, heads=4)
    whole = pine_attention(q, k, v, PREFIX, LENGTHS, ROPE, backend=backend)
    for t in range(20, 25):
        cut = pine_attention(q[:, :t], k[:, :t], v[:, :t], PREFIX, LENGTHS, ROPE, backend=backend)
        torch.testing.assert_close(cut, whole[:, :t], atol=1e-5, rtol=1e-5)


def test_pine_with_one_document_is_causal_attention() -> None:
    q, k, v = tensors(2, 20)
    positions = torch.arange(20)[:, None]
    rotated = (ROPE.rotate(x, positions) for x in (q, k))
    expected = subquad.interval_attention(*rotated, v, subquad.IntervalMask.causal())
    torch.testing.assert_close(pine_attention(q, k, v, 4, [9], ROPE), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("alpha", lambda q, k, v: soft_causal_attention(q, k, v, 1.5)),
        ("norm", lambda q, k, v: soft_causal_attention(q, k, v, 0.5, norm="none")),
        ("k", lambda q, k, v: soft_causal_attention(q, k[:, :5], v[:, :5], 0.5)),
        ("edges", lambda q, k, v: segment_lse(q, k, [0, 99])),
        ("edges", lambda q, k, v: segment_lse(q, k, [0])),
        ("lengths", lambda q, k, v: pine_attention(q, k, v, 4, [99], ROPE)),
        ("lengths", lambda q, k, v: pine_attention(q, k, v, 4, [], ROPE)),
        ("lengths", lambda q, k, v: pine_attention(q, k, v, 4, [5, -1], ROPE)),
        ("importance", lambda q, k, v: pine_attention(q, k, v, 4, [9], ROPE, importance=torch.zeros(2, 2))),
    ],
)
def test_wrong_input_is_named(name: str, call: object) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        call(*tensors(1, 20))  # type: ignore[operator]


# --- RopeSpec ----------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_exact_far_out(interleaved: bool) -> None:
    """At positions beyond 2^31 the phase has the precision of the number it is stored in, not of the product."""
    inv_freq = 1.0 / 10000.0 ** (torch.arange(0, 6, 2, dtype=torch.float64) / 6)
    rope = RopeSpec(inv_freq, 6, interleaved=interleaved)
    x = Sampler(seed=1).normal(8).double()
    for position in (0, 7, -13, 4_000_000, 2**31 + 5):
        expected = x.clone()
        for f in range(3):
            i, j = (2 * f, 2 * f + 1) if interleaved else (f, f + 3)
            angle = math.remainder(float(inv_freq[f]) * position, 2 * math.pi)
            expected[i] = x[i] * math.cos(angle) - x[j] * math.sin(angle)
            expected[j] = x[j] * math.cos(angle) + x[i] * math.sin(angle)
        torch.testing.assert_close(rope.rotate(x, torch.tensor(position)), expected, atol=2e-6, rtol=0)
    back = rope.rotate(rope.rotate(x, torch.tensor(10**9)), torch.tensor(-(10**9)))
    torch.testing.assert_close(back, x, atol=1e-12, rtol=0)


def test_from_a_transformers_model() -> None:
    transformers = pytest.importorskip("transformers")
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64, "rope_theta": 5e5,
    }  # fmt: skip
    for parameters in (None, scaling):
        config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=2, num_key_value_heads=2)
        if parameters is not None:
            config.rope_parameters = parameters
        rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
        for source in (config, rotary):
            torch.testing.assert_close(RopeSpec.from_hf(source).inv_freq, rotary.inv_freq)
        x = torch.randn(1, 5, 1, 32)
        cos, sin = rotary(x, torch.arange(5)[None])
        expected = x * cos[:, :, None] + torch.cat([-x[..., 16:], x[..., :16]], -1) * sin[:, :, None]
        torch.testing.assert_close(RopeSpec.from_hf(rotary).rotate(x, torch.arange(5)[:, None]), expected)
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    for source in (config, transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)):
        with pytest.raises(ValueError, match=r"^source: .*dynamic"):
            RopeSpec.from_hf(source)


@pytest.mark.parametrize(
    ("name", "kind", "call"),
    [
        ("inv_freq", TypeError, lambda: RopeSpec(torch.ones(2, dtype=torch.int64), 4)),
        ("inv_freq", ValueError, lambda: RopeSpec(torch.ones(3), 4)),
        ("positions", TypeError, lambda: ROPE.rotate(torch.ones(8), torch.ones(()))),
        ("x", ValueError, lambda: ROPE.rotate(torch.ones(6), torch.tensor(1))),
    ],
)
def test_wrong_rotations_are_named(name: str, kind: type[Exception], call: object) -> None:
    with pytest.raises(kind, match=f"^{name}: "):
        call()  # type: ignore[operator]
