"""Sinks and a window against dense float64 attention, and against a cache that is written down step by step."""

from __future__ import annotations

import itertools

import pytest
import torch

import subquad
from subquad import RopeSpec
from subquad.testing import Sampler, backend_params

BOTH = ("native", "reference")
ROPE = RopeSpec(1.0 / 100.0 ** (torch.arange(0, 8, 2) / 8), 8)
PARTIAL = RopeSpec(1.0 / 50.0 ** (torch.arange(0, 4, 2) / 4), 4, interleaved=True)
TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}


def tensors(
    b: int, tq: int, tk: int | None = None, heads: int = 4, kv_heads: int = 2, d: int = 8
) -> list[torch.Tensor]:
    sampler, tk = Sampler(seed=0), tq if tk is None else tk
    return [sampler.normal(b, t, h, d) for t, h in ((tq, heads), (tk, kv_heads), (tk, kv_heads))]


def visible(i: int, j: int, length: int, s: int, w: int | None, block: int = 1) -> bool:
    """Whether token i of a sequence sees token j."""
    last = min(i // block * block + block - 1, length - 1)
    return j <= last and (j < s or w is None or last - j < w)


def cached_position(i: int, j: int, s: int, w: int) -> int:
    """Of token j in a cache of s + w tokens at the time of token i."""
    return j if j < s else j - max(0, i + 1 - s - w)


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, sinks: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of one sequence in float64, seen bool [Tq, Tk]: (out [Tq, H, D], lse [Tq, H])."""
    q, k, v = q.double(), (k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)), v.double()
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[2] ** -0.5
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, q.shape[0], 1)], 2)
    lse = scores.logsumexp(2)
    p = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])[..., : k.shape[0]]
    return torch.einsum("hij,jhd->ihd", p, v), lse.T


def oracle_mask(tq: int, tk: int, s: int, w: int | None, block: int = 1) -> torch.Tensor:
    rows = range(tk - tq, tk)
    return torch.tensor([[visible(i, j, tk, s, w, block) for j in range(tk)] for i in rows], dtype=torch.bool).view(
        tq, tk
    )


SHAPES = [
    # tq, tk, sinks, window, block
    (23, 23, 4, 7, 1), (23, 23, 0, 7, 1), (23, 23, 3, 0, 1), (9, 9, 0, 0, 1), (23, 23, 2, None, 1), (5, 5, 8, 3, 1),
    (1, 19, 2, 5, 1), (6, 19, 2, 5, 1), (23, 23, 3, 6, 3), (20, 20, 4, 8, 8), (5, 22, 3, 6, 3), (23, 23, 4, 2**31 - 1, 1),
]  # fmt: skip


@backend_params("interval_attention", *BOTH)
@pytest.mark.parametrize("logit", [None, 0.3, 10.0, -10.0])
@pytest.mark.parametrize(("tq", "tk", "s", "w", "block"), SHAPES)
def test_dense(tq: int, tk: int, s: int, w: int | None, block: int, logit: float | None, backend: str) -> None:
    leaves = [x.requires_grad_() for x in tensors(2, tq, tk)]
    sinks = None if logit is None else (torch.linspace(-0.5, 0.5, 4) + logit).requires_grad_()
    out, lse = subquad.sink_attention(
        *leaves, sink_tokens=s, window=w, block=block, sink_logits=sinks, return_lse=True, backend=backend
    )
    seen = oracle_mask(tq, tk, s, w, block)
    parts = [dense(*(x[b] for x in leaves), seen, sinks) for b in range(2)]
    expected, expected_lse = (torch.stack(x) for x in zip(*parts, strict=True))
    torch.testing.assert_close(out.double(), expected, **TOLERANCE)
    torch.testing.assert_close(lse.double(), expected_lse, **TOLERANCE)
    inputs = [*leaves, *([] if sinks is None else [sinks])]
    upstream, of_lse = torch.randn_like(out), torch.randn_like(lse).masked_fill(lse == -torch.inf, 0.0)
    ours = torch.autograd.grad([out, lse], inputs, [upstream, of_lse])
    finite = expected_lse.masked_fill(expected_lse == -torch.inf, 0.0)
    theirs = torch.autograd.grad([expected, finite], inputs, [upstream.double(), of_lse.double()])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.nan_to_num(), **TOLERANCE)


def streaming(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: int, w: int, rope: RopeSpec) -> torch.Tensor:
    """The recipe of StreamingLLM for one sequence: keys without rotation, all rotated anew at every token; in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    rows, cache = [], []
    for i in range(q.shape[0]):
        cache.append(i)
        if len(cache) > s + w:
            del cache[s]
        places = torch.arange(len(cache))[:, None]
        keys = rope.rotate(k[cache], places)
        query = rope.rotate(q[i : i + 1], torch.tensor([[len(cache) - 1]]))
        rows.append(dense(query, keys, v[cache], torch.ones(1, len(cache), dtype=torch.bool))[0])
    return torch.cat(rows)


@backend_params("interval_attention", *BOTH)
@pytest.mark.parametrize("rope", [ROPE, PARTIAL], ids=["whole", "partial"])
@pytest.mark.parametrize(("s", "w"), [(4, 7), (1, 3), (0, 5), (3, 30), (2, 1)])
def test_positions_of_the_cache(s: int, w: int, rope: RopeSpec, backend: str) -> None:
    """As the StreamingLLM recipe, for the last queries alone as for all."""
    q, k, v = tensors(2, 29)
    places = torch.arange(29)[:, None]
    rotated = rope.rotate(q, places), rope.rotate(k, places), v
    out = subquad.sink_attention(*rotated, sink_tokens=s, window=w, q_shift=rope, backend=backend)
    expected = torch.stack([streaming(q[b], k[b], v[b], s, w, rope) for b in range(2)])
    torch.testing.assert_close(out.double(), expected, **TOLERANCE)
    chunk = subquad.sink_attention(
        rotated[0][:, -5:], *rotated[1:], sink_tokens=s, window=w, q_shift=rope, backend=backend
    )
    torch.testing.assert_close(chunk.double(), expected[:, -5:], **TOLERANCE)


def test_positions_of_the_cache_by_their_definition() -> None:
    """The identity behind it: distances of the query turned back are those in the cache."""
    for s, w in itertools.product(range(4), range(1, 5)):
        for i in range(16):
            forgotten = max(0, i + 1 - s - w)
            for j in range(i + 1):
                if visible(i, j, 16, s, w):
                    distance = i - j - (forgotten if j < s else 0)
                    assert distance == cached_position(i, i, s, w) - cached_position(i, j, s, w)


@backend_params("interval_attention", *BOTH)
@pytest.mark.parametrize("rope", [None, ROPE], ids=["absolute", "cache"])
@pytest.mark.parametrize("block", [1, 4])
def test_padding_and_packing_change_nothing(block: int, rope: RopeSpec | None, backend: str) -> None:
    lengths = [17, 0, 5, 23]
    parts = [tensors(1, n) for n in lengths]
    options = {"sink_tokens": 3, "window": 8, "block": block, "q_shift": rope, "backend": backend}
    alone = [subquad.sink_attention(*x, **options) for x in parts]
    edges = torch.tensor([0, *itertools.accumulate(lengths)])
    packed = [torch.cat(x, 1) for x in zip(*parts, strict=True)]
    for cu in (edges, edges.int(), subquad.Packed(edges)):
        out = subquad.sink_attention(*packed, cu_seqlens=cu, **options)
        torch.testing.assert_close(out, torch.cat(alone, 1), **TOLERANCE)
    pad = torch.tensor([max(lengths) - n for n in lengths])
    left = [
        torch.cat(
            [
                torch.cat([torch.full((1, p, *x.shape[2:]), torch.nan), x], 1)
                for p, x in zip(pad.tolist(), xs, strict=True)
            ]
        )
        for xs in zip(*parts, strict=True)
    ]
    left = [*(x.nan_to_num(7.0) for x in left[:2]), left[2]]  # values of padding are never multiplied
    out = subquad.sink_attention(*left, pad=pad, **options)
    for row, n, expected in zip(out, lengths, alone, strict=True):
        torch.testing.assert_close(row[len(row) - n :], expected[0], **TOLERANCE)
        assert not row[: len(row) - n].any()


def test_blocks_are_the_frames_of_a_video() -> None:
    """Sinks, window and blocks of frames, as `IntervalMask.frame_sink` has them."""
    q, k, v = tensors(1, 7 * 4)
    ours = subquad.sink_attention(q, k, v, sink_tokens=4, window=2 * 4, block=2 * 4)
    mask = subquad.IntervalMask.frame_sink(7, 4, sink_frames=1, local_frames=3, block_frames=2)
    torch.testing.assert_close(ours, subquad.interval_attention(q, k, v, mask))


def test_empty() -> None:
    for b, t in ((0, 5), (2, 0)):
        assert subquad.sink_attention(*tensors(b, t)).shape == (b, t, 4, 8)


@backend_params("interval_attention", *BOTH)
def test_no_queries_beside_keys(backend: str) -> None:
    """Also where they would be rotated for the sinks."""
    q, k, v = tensors(2, 20)
    for rope in (None, ROPE):
        out = subquad.sink_attention(q[:, :0], k, v, sink_tokens=2, window=3, q_shift=rope, backend=backend)
        assert out.shape == (2, 0, 4, 8)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"sink_tokens": -1}, ValueError, "sink_tokens: expected at least 0"),
        ({"sink_tokens": 1.0}, TypeError, "sink_tokens: expected an int"),
        ({"window": -1}, ValueError, "window: expected at least 0"),
        ({"block": 0}, ValueError, "block: expected at least 1"),
        ({"q_shift": 3}, TypeError, "q_shift: expected a subquad.RopeSpec"),
        ({"q_shift": subquad.RopeSpec(torch.ones(5), 10)}, ValueError, "q_shift: expected rotary_dim <= 8"),
        ({"pad": torch.tensor([0, 1, 2])}, ValueError, r"pad: expected shape \[2\]"),
        ({"pad": torch.tensor([0, 10])}, ValueError, r"pad: expected numbers in 0..9, got \[0, 10\]"),
        ({"pad": torch.tensor([-1, 1])}, ValueError, "pad: expected numbers in 0..9"),
        ({"pad": torch.tensor([0.0, 1.0])}, TypeError, "pad: expected int32 or int64"),
        ({"cu_seqlens": torch.tensor([0, 9])}, ValueError, "cu_seqlens: expected a batch of 1"),
        ({"cu_seqlens": torch.tensor([0, 9]), "pad": torch.tensor([0, 0])}, ValueError, "pad: expected None beside"),
        ({"k": torch.zeros(2, 8, 2, 8), "v": torch.zeros(2, 8, 2, 8)}, ValueError, "k: expected at least 9 keys"),
        ({"sink_logits": torch.zeros(3)}, ValueError, r"sink_logits: expected shape \[4\]"),
        ({"q": torch.zeros(2, 9, 8)}, ValueError, r"q: expected shape \[B, T, H, D\]"),
    ],
)
def test_errors(change: dict[str, object], kind: type[Exception], message: str) -> None:
    given = dict(zip("qkv", tensors(2, 9), strict=True)) | change
    with pytest.raises(kind, match=f"^{message}"):
        subquad.sink_attention(**given)
