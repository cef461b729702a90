"""`FrameSinkCache` against lists of tokens: blocks, passes, other prompts, pinned frames."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

from subquad import FrameSinkCache, RopeSpec, SinkKVCache

from .streams import DIM, KV_HEADS, ROPE, VIDEO, WIDE_VIDEO, Stream, Token, drawn

LAYERS, BATCH, F, SINK, LOCAL, BLOCK = 2, 2, 3, 2, 6, 2
CLOSE = {"atol": 1e-9, "rtol": 1e-9}
Drawn = list[list[torch.Tensor]]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"key_rope": "post"},
    {"positions": "absolute"},
    {"key_rope": "post", "positions": "absolute"},
    {"rope": None},
    {"rope": VIDEO, "grid": (1, 3)},
    {"rope": WIDE_VIDEO, "grid": (3, 1), "key_rope": "post"},
    {"rope": WIDE_VIDEO, "grid": (1, 3), "positions": "absolute"},
]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def cache_of(**options: Any) -> FrameSinkCache:
    sizes = {"frame_tokens": F, "sink_frames": SINK, "local_frames": LOCAL, "block_frames": BLOCK}
    return FrameSinkCache(LAYERS, BATCH, KV_HEADS, DIM, **({"rope": ROPE, "dtype": torch.float64} | sizes | options))


class Film:
    """Streams of every layer and row; a block replaces what came last."""

    def __init__(self, cache: FrameSinkCache) -> None:
        state, rotation = cache.states[0], cache._rotation
        rope, grid = (state.rope, None) if rotation is None else (rotation.whole, rotation.grid)
        self.base = 0  # frames before the first of the streams
        sizes = SINK * F, (LOCAL - SINK) * F
        self.rows = [
            [Stream(*sizes, rope, state.positions == "absolute", grid=grid) for _ in range(BATCH)]
            for _ in range(LAYERS)
        ]

    def attend(self, cache: FrameSinkCache, x: Drawn, commit: bool) -> None:
        """All layers of a pass, compared."""
        for layer, (q, k, v) in enumerate(x):
            out = cache.attend(layer, q, k, v)
            for row, stream in enumerate(self.rows[layer]):
                found, _ = stream.step(q[row], k[row], v[row], together=True)
                torch.testing.assert_close(out[row], found, **CLOSE)
                if not commit:
                    del stream.tokens[-k.shape[1] :]
        if commit:
            cache.commit()

    def replay(self, cache: FrameSinkCache, start: int, keep_sink: bool) -> None:
        """The frames from `start` on, in the numbering of the video, written anew."""
        for stream in (s for layer in self.rows for s in layer):
            del stream.tokens[(start - self.base) * F :]
            if not keep_sink:
                stream.tokens = []
        if not keep_sink:
            self.base = start


def block(frames: int = BLOCK) -> Drawn:
    return [drawn(BATCH, frames * F) for _ in range(LAYERS)]


def tensors(cache: FrameSinkCache) -> list[torch.Tensor]:
    return [x.clone() for state in cache.states for x in state.tensors().values()]


@each_option
def test_blocks(options: dict[str, Any]) -> None:
    """Four noisy passes and a clean one per block, also a short block."""
    cache, film = cache_of(**options), None
    film = Film(cache)
    for number, frames in enumerate((2, 2, 2, 2, 1, 2, 2, 2)):
        for _ in range(3):
            film.attend(cache, block(frames), commit=False)
        film.attend(cache, block(frames), commit=True)
        assert cache.frames == sum((2, 2, 2, 2, 1, 2, 2, 2)[: number + 1])


@pytest.mark.parametrize("grid", [(2, 3), (3, 2), (6, 1)])
@pytest.mark.parametrize("positions", ["cache", "absolute"])
def test_lines_and_columns(positions: str, grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "F", 6)
    cache = cache_of(rope=WIDE_VIDEO, grid=grid, positions=positions)
    film = Film(cache)
    for _ in range(7):
        film.attend(cache, block(), commit=True)


def test_a_late_frame_of_a_long_video() -> None:
    """Phases of millions of frames, in the cache's numbers: the same as of the first ones, where nothing is forgotten."""
    found = []
    x = [block() for _ in range(2)]
    for start in (0, 3_000_000):
        cache = cache_of(rope=WIDE_VIDEO, grid=(1, 3), positions="absolute", sink_frames=0, local_frames=6)
        for state in cache.states:
            for name in ("seen", "written", "first"):
                getattr(state, name).fill_(start * F)
        cache._seen = [start * F] * LAYERS
        for drawn_block in x:
            out = [cache.attend(layer, *drawn_block[layer]) for layer in range(LAYERS)]
            cache.commit()
        found.append(out)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8)


def test_grids_and_axes_that_do_not_fit() -> None:
    two = RopeSpec(torch.rand(3), 6, axes=(1, 2))
    for error, message, options in (
        (ValueError, "grid: expected None without a rope with axes", {"grid": (1, 3)}),
        (ValueError, r"grid: expected \(lines, columns\) beside a rope with axes, got None", {"rope": VIDEO}),
        (ValueError, r"grid: expected lines times columns to be the 3", {"rope": VIDEO, "grid": (2, 2)}),
        (TypeError, "grid: expected an int", {"rope": VIDEO, "grid": (1.5, 2)}),
        (ValueError, "rope: expected axes of frame, line and column", {"rope": two, "grid": (1, 3)}),
        (TypeError, "rope: expected a subquad.RopeSpec or None, got int", {"rope": 3}),
    ):
        with pytest.raises(error, match=f"^{message}"):
            cache_of(**options)
    with pytest.raises(ValueError, match=r"^rope: expected a rotation by the number of a token, got one with axes"):
        SinkKVCache(1, KV_HEADS, DIM, rope=VIDEO)


def test_passes_leave_no_trace() -> None:
    one, many = cache_of(), cache_of()
    for _ in range(7):
        last = block()
        for x in (*(block() for _ in range(5)), last):
            for layer in range(LAYERS):
                many.attend(layer, *x[layer])
        many.commit()
        for layer in range(LAYERS):
            one.attend(layer, *last[layer], commit=True)
    assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(many), strict=True))


@each_option
@pytest.mark.parametrize("keep_sink", [True, False])
@pytest.mark.parametrize(
    "blocks", [pytest.param(1, marks=pytest.mark.full), 2, pytest.param(3, marks=pytest.mark.full), 6]
)
def test_recache(options: dict[str, Any], keep_sink: bool, blocks: int) -> None:
    """Under a new prompt, sinks kept or written anew: what follows is as if the frames had been such from the start."""
    cache = cache_of(**options)
    film, places = Film(cache), [x.data_ptr() for x in cache.states[1].tensors().values()]
    for _ in range(blocks):
        film.attend(cache, block(), commit=True)
    for _ in range(2):
        for layer in range(LAYERS):
            cache.attend(layer, *block()[layer])  # a block that is given up
        with cache.recache(keep_sink=keep_sink) as plan:
            shown = min(cache_frames := 2 * blocks, LOCAL if not keep_sink else LOCAL - SINK)
            if keep_sink:
                shown = min(shown, cache_frames - min(SINK, cache_frames))
            assert plan.frames == slice(2 * blocks - shown, 2 * blocks)
            if shown:
                film.replay(cache, plan.start_frame, keep_sink)
                film.attend(cache, block(shown), commit=False)
                x = block(shown)
                for layer, (q, k, v) in enumerate(x):
                    out = cache.attend(layer, q, k, v)
                    for row, stream in enumerate(film.rows[layer]):
                        torch.testing.assert_close(out[row], stream.step(q[row], k[row], v[row], True)[0], **CLOSE)
        assert cache.frames == 2 * blocks
    for _ in range(5):
        film.attend(cache, block(), commit=True)
        blocks += 1
    assert cache.frames == 2 * blocks
    assert places == [x.data_ptr() for x in cache.states[1].tensors().values()]


def test_part_of_the_window_is_written_anew() -> None:
    cache = cache_of()
    film = Film(cache)
    for _ in range(6):
        film.attend(cache, block(), commit=True)
    with cache.recache(start_frame=10) as plan:
        assert (plan.start_frame, plan.num_frames) == (10, 2)
        film.replay(cache, 10, True)
        film.attend(cache, block(2), commit=True)
    film.attend(cache, block(), commit=True)


@each_option
@pytest.mark.parametrize("keep_sink", [True, False])
@pytest.mark.parametrize(("blocks", "start"), [(1, None), (2, None), (6, None), (6, 9), (7, 11)])
def test_blocks_written_anew_see_no_later_ones(
    options: dict[str, Any], keep_sink: bool, blocks: int, start: int | None
) -> None:
    """As when they were generated; before them is what the window of the last of them has."""
    cache = cache_of(**options)
    film = Film(cache)
    for _ in range(blocks):
        film.attend(cache, block(), commit=True)
    with cache.recache(start, keep_sink, mask="block_causal") as plan:
        if plan.num_frames:
            film.replay(cache, plan.start_frame, keep_sink)
        for commit in (False, True) if plan.num_frames else ():
            for layer, (q, k, v) in enumerate(block(plan.num_frames)):
                out = cache.attend(layer, q, k, v)
                for row, stream in enumerate(film.rows[layer]):
                    stream.forget_before((2 * blocks - film.base - LOCAL + SINK) * F)
                    parts = zip(*(x[row].split(BLOCK * F) for x in (q, k, v)), strict=True)
                    found = [stream.step(*part, together=True)[0] for part in parts]
                    torch.testing.assert_close(out[row], torch.cat(found), **CLOSE)
                    if not commit:
                        del stream.tokens[-k.shape[1] :]
    assert cache.frames == 2 * blocks
    for _ in range(5):
        film.attend(cache, block(), commit=True)


@pytest.mark.parametrize("keep_sink", [True, False])
def test_a_failed_recache_changes_nothing(keep_sink: bool) -> None:
    cache = cache_of()
    film = Film(cache)
    for _ in range(5):
        film.attend(cache, block(), commit=True)
    before = tensors(cache)
    with pytest.raises(RuntimeError, match="out of luck"), cache.recache(keep_sink=keep_sink) as plan:
        cache.attend(0, *block(plan.num_frames)[0])
        raise RuntimeError("out of luck")
    with (
        pytest.raises(ValueError, match=r"^layer: expected layer 1 to have attended"),
        cache.recache(keep_sink=keep_sink) as plan,
    ):
        cache.attend(0, *block(plan.num_frames)[0])
    with (
        pytest.raises(ValueError, match=r"^k: expected the \d+ tokens of the plan, got 6"),
        cache.recache(keep_sink=keep_sink),
    ):
        cache.attend(0, *block()[0])
    assert all(torch.equal(a, b) for a, b in zip(tensors(cache), before, strict=True))
    assert cache.frames == 10
    film.attend(cache, block(), commit=True)
    cache.pin(10, 1)
    for layer in range(2):
        cache.attend(layer, *block()[layer])
    size = cache.nbytes
    with pytest.raises(RuntimeError, match="out of luck"), cache.recache(keep_sink=keep_sink):
        cache.reset()
        raise RuntimeError("out of luck")
    cache.commit()  # of the block from before
    assert cache.frames == 14 and cache.nbytes == size


# --- pinned frames ----------------------------------------


def _pinned_oracle(stream: Stream, pins: list[Token], token: int, x: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """A block of one row where copies of tokens [token, token + P), numbered as the stream is, are seen outside the window."""
    q, k, v = x
    n, width = len(stream.tokens), k.shape[0]
    begin = n + width - stream.window
    seen_pins = [p for p in range(len(pins)) if stream.sinks <= token + p < begin or token + p < 0]
    gap = 0 if stream.absolute else max(0, begin - token - len(pins))
    stream.tokens += [Token(*pair) for pair in zip(k, v, strict=True)]
    last = n + width - 1
    visible = stream.seen_by(last)
    groups, out = q.shape[1] // KV_HEADS, []
    for t in range(width):
        own = n + t if stream.absolute else len(visible) - 1 - (width - 1 - t)
        sinks = min(stream.sinks, last + 1)
        keys = [stream.turned(stream.tokens[j].k, j if stream.absolute else p) for p, j in enumerate(visible)]
        # Of pinned tokens what counts is the distance: that of the tokens before the window.
        keys += [stream.turned(pins[p].k, own - (n + t - gap - (token + p))) for p in seen_pins]
        values = [stream.tokens[j].v for j in visible] + [pins[p].v for p in seen_pins]
        assert sinks
        scores = torch.einsum("hd,jhd->hj", stream.turned(q[t], own), torch.stack(keys).repeat_interleave(groups, 1))
        p = (scores * q.shape[2] ** -0.5).softmax(1)
        out.append(torch.einsum("hj,jhd->hd", p, torch.stack(values).repeat_interleave(groups, 1)))
    return torch.stack(out)


@each_option
@pytest.mark.parametrize("recached", [False, True])
def test_pinned_frames(options: dict[str, Any], recached: bool) -> None:
    """Seen once while in the window, still seen behind it, and not twice as sinks of a recache."""
    cache = cache_of(**options)
    film = Film(cache)
    for _ in range(3):
        film.attend(cache, block(), commit=True)
    cache.pin(3, 2)
    pins = [[copy.copy(s.tokens[9:15]) for s in layer] for layer in film.rows]
    for number in range(6):
        if recached and number == 1:
            with cache.recache(keep_sink=False) as plan:  # frames 3 and 4 become sinks' neighbours, then sinks
                film.replay(cache, plan.start_frame, False)
                for layer, (q, k, v) in enumerate(block(plan.num_frames)):
                    out = cache.attend(layer, q, k, v)
                    for row, stream in enumerate(film.rows[layer]):
                        found = _pinned_oracle(stream, pins[layer][row], 9 - film.base * F, (q[row], k[row], v[row]))
                        torch.testing.assert_close(out[row], found, **CLOSE)
        for layer, (q, k, v) in enumerate(block()):
            out = cache.attend(layer, q, k, v)
            for row, stream in enumerate(film.rows[layer]):
                found = _pinned_oracle(stream, pins[layer][row], 9 - film.base * F, (q[row], k[row], v[row]))
                torch.testing.assert_close(out[row], found, **CLOSE)
        cache.commit()
    cache.pin(0, 0)
    for stream in (s for layer in film.rows for s in layer):
        assert len(stream.tokens) == (cache.frames - film.base) * F
    film.attend(cache, block(), commit=True)


# --- as a state ----------------------------------------


@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
@pytest.mark.parametrize("recached", [False, True])
def test_a_saved_cache_goes_on(recached: bool, kv_dtype: torch.dtype | None) -> None:
    """In the middle of a block, with pinned frames, behind another numbering; copies, not the same tensors."""
    cache, other = cache_of(kv_dtype=kv_dtype), cache_of(kv_dtype=kv_dtype)
    feed = lambda c, x: [c.attend(layer, *x[layer]) for layer in range(LAYERS)]  # noqa: E731
    for _ in range(4):
        feed(cache, block())
        cache.commit()
    cache.pin(5, 1)
    if recached:
        with cache.recache(keep_sink=False) as plan:
            feed(cache, block(plan.num_frames))
    feed(cache, block(1))
    feed(other, block())
    file = io.BytesIO()
    torch.save(cache.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    third = cache_of(kv_dtype=kv_dtype)
    third.load_state_dict(cache.state_dict())
    with pytest.raises(ValueError, match=r"^k: expected 3 tokens, as the block has"):
        other.attend(0, *block(2)[0])
    for c in (cache, other, third):
        c.commit()
    for _ in range(5):
        x = block()
        wanted = feed(cache, x)
        for c in (other, third):
            assert all(torch.equal(a, b) for a, b in zip(wanted, feed(c, x), strict=True))
        for c in (cache, other, third):
            c.commit()
    assert cache.frames == other.frames == third.frames == 19 and other.nbytes == cache.nbytes


def test_states_of_other_caches() -> None:
    cache = cache_of()
    cache.attend(0, *block()[0])
    before, state = tensors(cache), cache.state_dict()
    for wrong, error, message in (
        (None, TypeError, "state: expected a mapping of names, got NoneType"),
        ({}, ValueError, "state: expected 'block_frames', got"),
        (state | {"more": 1}, ValueError, "state: expected names of this FrameSinkCache, got"),
        (cache_of(block_frames=1).state_dict(), ValueError, "block_frames: expected 2 as this cache has, got 1"),
        (cache_of(key_rope="post").state_dict(), ValueError, "layers.0: key_rope: expected 'pre'"),
        (state | {"layers.1": cache_of(sink_frames=1).states[0].state_dict()}, ValueError, "layers.1: .*: expected"),
        (state | {"grid": (1, 3)}, ValueError, "grid: expected None as this cache has"),
        (state | {"turns": torch.zeros(3)}, ValueError, "turns: expected a tensor or None"),
        (state | {"layers.1": None}, TypeError, "layers.1: state: expected a mapping"),
    ):
        with pytest.raises(error, match=f"^{message}"):
            cache.load_state_dict(wrong)  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(tensors(cache), before, strict=True))
    video = cache_of(rope=VIDEO, grid=(1, 3))
    other = RopeSpec(torch.tensor([0.9, 0.5, 0.4]), 6, attention_scaling=1.2, axes=(1, 1, 1))
    with pytest.raises(ValueError, match=r"^turns: expected the frequencies"):
        video.load_state_dict(cache_of(rope=other, grid=(1, 3)).state_dict())
    video.load_state_dict(cache_of(rope=VIDEO, grid=(1, 3)).state_dict())
    held = cache_of()
    with held.recache(), pytest.raises(ValueError, match=r"^state_dict: expected no recache under way"):
        held.state_dict()


# --- bad input ----------------------------------------


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"^local_frames: expected at least 4"):
        cache_of(local_frames=3)
    with pytest.raises(ValueError, match=r"^frame_tokens: expected at least 1"):
        cache_of(frame_tokens=0)
    for name in ("frame_tokens", "local_frames"):
        with pytest.raises(ValueError, match=rf"^{name}: expected sizes of a tensor below 2\^60 elements"):
            cache_of(**{name: 2**62})
    with pytest.raises(ValueError, match=r"^heads: expected at least 1, got 0"):
        FrameSinkCache(1, 1, 0, 8)
    with pytest.raises(ValueError, match=r"^device: expected a torch\.device"):
        cache_of(device="nope")
    cache = cache_of()
    with pytest.raises(TypeError, match=r"^q: expected a torch\.Tensor, got NoneType"):
        cache.attend(0, None, *block()[0][1:])  # type: ignore[arg-type]
    assert not any(int(x.count_nonzero()) for x in tensors(cache)[:4])
    with pytest.raises(ValueError, match=r"^layer: expected one of 2"):
        cache.attend(2, *block()[0])
    for frames in (0, 3):
        with pytest.raises(ValueError, match=r"^k: expected at most 2 frames of 3 tokens"):
            cache.attend(0, *block(frames)[0])
    with pytest.raises(ValueError, match=r"^k: expected at most 2 frames"):
        cache.attend(0, *drawn(BATCH, 4))
    with pytest.raises(ValueError, match=r"^layer: expected layer 0 to have attended"):
        cache.commit()
    cache.attend(0, *block()[0])
    with pytest.raises(ValueError, match=r"^layer: expected layer 1 to have attended"):
        cache.commit()
    with pytest.raises(ValueError, match=r"^k: expected 6 tokens, as the block has"):
        cache.attend(0, *block(1)[0])
    cache.attend(0, *block()[0], commit=True)
    with pytest.raises(ValueError, match=r"^recache: expected all layers at one frame"), cache.recache():
        pass
    cache.attend(1, *block()[1], commit=True)
    assert cache.frames == 2
    for start, count in ((0, 1), (1, 2), (2, 1)):
        with pytest.raises(ValueError, match=r"^start_frame: expected frames within"):
            cache.pin(start, count)
    with pytest.raises(ValueError, match=r"^start_frame: expected 2 to 2, got 1"), cache.recache(1):
        pass
    with cache.recache(), pytest.raises(ValueError, match=r"^recache: expected none within another"), cache.recache():
        pass
    with pytest.raises(TypeError, match=r"^keep_sink: expected a bool, got str"), cache.recache(keep_sink="no"):  # type: ignore[arg-type]
        pass
    with (
        pytest.raises(ValueError, match=r"^mask: expected one of 'full', 'block_causal'"),
        cache.recache(mask="causal"),
    ):
        pass
    cache.reset()
    assert cache.frames == 0 and all(int(state.seen.sum()) == 0 for state in cache.states)
