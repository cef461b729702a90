"""The cache of generated video: the first frames for ever, the last ones in a ring, blocks that are written many times."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .. import _checks
from ..masks import IntervalMask
from ..ops._autograd import without_autocast
from ..ops.interval_attention import interval_attention
from ..rope import RopeSpec
from ._frame_rotation import frame_rotation
from ._sink_moves import rows
from .sink import SinkKVCache


@dataclass(frozen=True)
class RecachePlan:
    """What `FrameSinkCache.recache` wants to see again: frames in the numbering of the video.

    Attributes:
        start_frame, num_frames: the first of them, and how many; none where only protected sinks are remembered.
    """

    start_frame: int
    num_frames: int

    @property
    def frames(self) -> slice:
        """Of the video's latent frames."""
        return slice(self.start_frame, self.start_frame + self.num_frames)


@dataclass(frozen=True)
class _Replay:
    """Tokens that are to be written anew, from token `start` on, of every layer; `causal`: blocks see no later ones."""

    start: int
    width: int
    causal: bool


@dataclass
class _Pin:
    """Copies of K and V [B, Hkv, P, D] of every layer: tokens from `token` on, whose keys are at positions from `position` on."""

    token: int
    position: int
    kv: list[tuple[torch.Tensor, torch.Tensor]]


class FrameSinkCache:
    """Keys and values of a causal video model: every layer keeps the first frames and the last ones (LongLive, arXiv 2509.22622).

    A block of frames is generated in several passes, each of which sees the block itself in both directions: `attend` writes it
    without advancing, as often as there are passes, and `commit` advances all layers by what came last. Nothing is moved,
    concatenated or cleared; what is valid follows from counters. All rows of the batch are at the same frame. A token's position
    is its number in its row or, with `grid`, its frame, line and column, of which only the frame changes.

    Args:
        layers, batch, heads, head_dim: of the model; heads are those of keys and values.
        frame_tokens: F, tokens of a latent frame.
        sink_frames: first frames, which stay.
        local_frames: frames that a block sees, sinks and itself included.
        block_frames: most frames of a block.
        positions, key_rope, rope: as in `SinkKVCache`; `rope` may have `axes` of frame, line and column. What is the same
            in every frame is then turned in float32 where q and k enter, and rounded to their dtype.
        grid: (lines, columns) of a frame, beside a `rope` with axes.
        dtype, kv_dtype, backend, device: as in `SinkKVCache`.

    Attributes:
        states: a `SinkKVCache` of every layer.

    Raises:
        TypeError: wrong type of an argument.
        ValueError: numbers out of range; fewer local frames than sinks and a block have.

    Example:
        >>> import torch, subquad
        >>> cache = subquad.FrameSinkCache(1, 1, 2, 8, frame_tokens=4, sink_frames=1, local_frames=4, block_frames=2)
        >>> q, k, v = (torch.randn(1, 8, 2, 8) for _ in range(3))
        >>> with torch.no_grad():
        ...     for noise in (1.0, 0.5, 0.0):
        ...         out = cache.attend(0, q + noise, k + noise, v)
        ...     cache.commit()
        >>> out.shape, cache.frames
        (torch.Size([1, 8, 2, 8]), 2)
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        head_dim: int,
        *,
        frame_tokens: int = 1560,
        sink_frames: int = 3,
        local_frames: int = 12,
        block_frames: int = 3,
        positions: str = "cache",
        key_rope: str = "pre",
        rope: RopeSpec | None = None,
        grid: tuple[int, int] | None = None,
        dtype: torch.dtype | None = None,
        kv_dtype: torch.dtype | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        for name, size, least in (
            ("layers", layers, 1), ("batch", batch, 0), ("heads", heads, 1), ("head_dim", head_dim, 1),
            ("frame_tokens", frame_tokens, 1), ("sink_frames", sink_frames, 0), ("block_frames", block_frames, 1),
            ("local_frames", local_frames, 1),
        ):  # fmt: skip
            _checks.size(name, size, least)
        _checks.elements(
            layers=layers,
            batch=batch,
            heads=heads,
            head_dim=head_dim,
            frame_tokens=frame_tokens,
            local_frames=local_frames,
        )
        if local_frames < sink_frames + block_frames:
            least = sink_frames + block_frames
            raise ValueError(f"local_frames: expected at least {least}, sinks and a block, got {local_frames}")
        self.frame_tokens, self.block_frames = frame_tokens, block_frames
        self._rotation = frame_rotation(rope, grid, frame_tokens, _checks.device("device", device))
        rope = rope if self._rotation is None else self._rotation.rope
        self.states = [
            SinkKVCache(
                batch, heads, head_dim, sink_tokens=sink_frames * frame_tokens,
                window=(local_frames - sink_frames) * frame_tokens, slack=0, dtype=dtype, kv_dtype=kv_dtype,
                key_rope=key_rope, positions=positions, rope=rope, backend=backend, device=device,
            )
            for _ in range(layers)
        ]  # fmt: skip
        self.reset()

    def reset(self) -> None:
        """Forget everything, pins included."""
        for state in self.states:
            state.reset()
        self._seen = [0] * len(self.states)  # tokens of every layer, as its state counts them
        self._pending: list[int | None] = [None] * len(self.states)  # tokens of the block that is not committed
        self._dropped = 0  # tokens of the video before the first that the states count
        self._replay: _Replay | None = None  # what a recache waits for
        self._pin: _Pin | None = None

    @property
    def frames(self) -> int:
        """Frames that are committed in every layer."""
        return (self._dropped + min(self._seen)) // self.frame_tokens

    @property
    def nbytes(self) -> int:
        """Memory of all layers, pins included."""
        pinned = () if self._pin is None else (x for pair in self._pin.kv for x in pair)
        return sum(state.nbytes for state in self.states) + sum(x.untyped_storage().nbytes() for x in pinned)

    # --- blocks ----------------------------------------

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        commit: bool = False,
        scale: float | None = None,
    ) -> torch.Tensor:
        """A block attends to the sinks, the window, the pinned frames and itself, all of it, and is written.

        Args:
            layer: its number.
            q: [B, T, Hq, D], T tokens of whole frames, at most `block_frames` (within `recache`: all of the plan).
            k, v: [B, T, Hkv, D].
            commit: advance this layer at once. If not, the same block may come again, until `commit` is called.
            scale: factor of the scores; None for D ** -0.5.

        Returns:
            out [B, T, Hq, D].

        Raises:
            TypeError, ValueError: as `SinkKVCache.step`; not whole frames, or not as many tokens as the block has so far.
        """
        _checks.size("layer", layer)
        if layer >= len(self.states):
            raise ValueError(f"layer: expected one of {len(self.states)}, got {layer}")
        for name, x in (("k", k), ("q", q)):
            _checks.tensor(name, x)
        self._check_block(k.shape[1] if k.dim() == 4 else 0, layer)
        if self._rotation is not None:
            q, k = self._rotation.placed(q), self._rotation.placed(k)
        state, seen, width = self.states[layer], self._seen[layer], k.shape[1]
        if self._replay is not None and self._replay.causal:
            out, lse = self._blocks(state, q, k, v, commit, scale)
        else:
            out, lse = state.step(q, k, v, together=True, commit=commit, scale=scale)
        if self._pin is not None:
            out = self._with_pinned(layer, q, out, lse, seen + width - state.window, scale)
        self._seen[layer], self._pending[layer] = (seen + width, None) if commit else (seen, width)
        return out

    def _blocks(
        self, state: SinkKVCache, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, commit: bool, scale: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Block after block, each of which sees those before it."""
        assert self._replay is not None
        sizes = self.block_frames * self.frame_tokens
        _checks.flag("commit", commit)
        _checks.like("q", q, (*k.shape[:2], *q.shape[2:]), k, "k")
        _checks.like("v", v, (*k.shape[:2], *v.shape[2:]), k, "k")
        state.first.copy_(state.first.clamp_min(self._replay.start + self._replay.width - state.window))
        parts = zip(q.split(sizes, 1), k.split(sizes, 1), v.split(sizes, 1), strict=True)
        done = [state.step(a, b, c, together=True, scale=scale) for a, b, c in parts]
        if not commit:
            state.seen.sub_(k.shape[1])
        out, lse = (torch.cat(side, 1) for side in zip(*done, strict=True))
        return out, lse

    def commit(self) -> None:
        """Advance all layers by the block that was attended last.

        Raises:
            ValueError: a layer that has not attended, or another number of tokens; nothing has changed then.
        """
        for layer, width in enumerate(self._pending):
            if width is None or width != self._pending[0]:
                got = "none" if width is None else f"{width}"
                raise ValueError(
                    f"layer: expected layer {layer} to have attended a block as the others, got {got} tokens"
                )
        for layer, (state, width) in enumerate(zip(self.states, self._pending, strict=True)):
            assert width is not None
            state.seen.add_(width)
            self._seen[layer] += width
        self._pending = [None] * len(self.states)

    def _check_block(self, width: int, layer: int) -> None:
        before = self._pending[layer]
        if self._replay is not None:
            if width != self._replay.width:
                raise ValueError(f"k: expected the {self._replay.width} tokens of the plan, got {width}")
        elif not 0 < width <= self.block_frames * self.frame_tokens or width % self.frame_tokens:
            most = f"at most {self.block_frames} frames of {self.frame_tokens} tokens"
            raise ValueError(f"k: expected {most}, got {width} tokens")
        elif before is not None and before != width:
            raise ValueError(f"k: expected {before} tokens, as the block has that is not committed, got {width}")

    # --- other prompts ----------------------------------------

    @contextmanager
    def recache(
        self, start_frame: int | None = None, keep_sink: bool = True, mask: str = "full"
    ) -> Iterator[RecachePlan]:
        """Write the last frames anew, for example under another prompt (LongLive's KV-recache).

        The body runs the model on the frames of the plan: every layer attends to all of them in one call of `attend`, as often as
        it likes; the last counts. They are committed at the end. It takes memory for a copy of the cache.

        Args:
            start_frame: the first frame to write anew, in the numbering of the video; None for all that are in the window
                (with keep_sink=False: in the window and the sinks).
            keep_sink: True leaves the sinks as they are; False makes the first of these frames the sinks and forgets the old.
            mask: "full": all frames see each other, as in LongLive; "block_causal": blocks of `block_frames`, from the first of
                these frames on, see none of the later ones, as when they were generated.

        Raises:
            ValueError: frames that are not there or, with `keep_sink`, are sinks; layers that are not at the same frame, or have
                not attended at the end. After any error, one of the body too, the cache is as it was before.
        """
        _checks.flag("keep_sink", keep_sink)
        causal = _checks.choice("mask", mask, ("full", "block_causal")) == 1
        if self._replay is not None:
            raise ValueError("recache: expected none within another")
        if len(set(self._seen)) > 1:
            raise ValueError(f"recache: expected all layers at one frame, got {self._seen} tokens")
        seen, frame = self._seen[0], self.frame_tokens
        sinks, window = self.states[0].sink_tokens, self.states[0].window
        start = max(min(sinks, seen), seen - window) if keep_sink else max(0, seen - sinks - window)
        if start_frame is not None:
            _checks.size("start_frame", start_frame)
            least = min(sinks, seen) if keep_sink else 0
            start = start_frame * frame - self._dropped
            if not least <= start <= seen:
                first, last = ((self._dropped + x) // frame for x in (least, seen))
                raise ValueError(f"start_frame: expected {first} to {last}, got {start_frame}")
        plan = RecachePlan((self._dropped + start) // frame, (seen - start) // frame)
        before = [{name: x.clone() for name, x in state.tensors().items()} for state in self.states]
        counted = self._seen, self._pending, self._dropped, self._pin
        for state in self.states:
            if keep_sink:
                state.seen.fill_(start)  # the window of the frames to come begins behind what they will overwrite
            else:
                state.reset()
        if not keep_sink:
            self._dropped += start
        self._seen = [start if keep_sink else 0] * len(self.states)
        self._pending = [None] * len(self.states)
        self._replay = _Replay(self._seen[0], seen - start, causal)
        try:
            yield plan
            if set(self._seen) != {seen if keep_sink else seen - start}:
                self.commit()
        except BaseException:
            for state, tensors in zip(self.states, before, strict=True):
                for name, x in state.tensors().items():
                    x.copy_(tensors[name])
            self._seen, self._pending, self._dropped, self._pin = counted
            raise
        else:
            self._pending = [None] * len(self.states)
        finally:
            self._replay = None

    # --- as a state ----------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything, pins and the block that is not committed included, from which a cache made alike goes on bit by bit.

        Tensors as they are, not copies, and plain numbers.

        Raises:
            ValueError: within `recache`.
        """
        if self._replay is not None:
            raise ValueError("state_dict: expected no recache under way, got one")
        found: dict[str, Any] = {name: getattr(self, name) for name in ("frame_tokens", "block_frames")}
        rotation = self._rotation
        found |= (
            {"grid": None, "turns": None}
            if rotation is None
            else {"grid": rotation.grid, "turns": rotation.whole.turns()}
        )
        found |= {"seen": list(self._seen), "pending": list(self._pending), "dropped": self._dropped}
        pin = self._pin
        found["pin"] = None if pin is None else {"token": pin.token, "position": pin.position, "kv": list(pin.kv)}
        return found | {f"layers.{i}": state.state_dict() for i, state in enumerate(self.states)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over copies of what `state_dict` gave, of a cache with the same options.

        Raises:
            TypeError: no mapping.
            ValueError: names that are missing or not known, a cache of another configuration. Nothing has changed then.
        """
        _checks.mapping("state", state)
        own = self.state_dict()
        for name in sorted(own.keys() ^ state.keys()):
            wanted = f"expected {name!r}" if name in own else "expected names of this FrameSinkCache"
            raise ValueError(f"state: {wanted}, got {sorted(state)}")
        for name in ("frame_tokens", "block_frames", "grid"):
            if own[name] != state[name]:
                raise ValueError(f"{name}: expected {own[name]} as this cache has, got {state[name]}")
        turns = own["turns"], state["turns"]
        if turns[0] is not turns[1] and not all(isinstance(x, torch.Tensor) for x in turns):
            raise ValueError(f"turns: expected a tensor or None as this cache has, got {type(turns[1]).__name__}")
        if turns[0] is not None and not torch.equal(*(x.cpu() for x in turns)):
            raise ValueError("turns: expected the frequencies of this cache's rope, got others")
        for i, layer in enumerate(self.states):
            try:
                layer.check_state(state[f"layers.{i}"])
            except (TypeError, ValueError) as error:
                raise type(error)(f"layers.{i}: {error}") from error
        device, pin = self.states[0].seen.device, state["pin"]
        for i, layer in enumerate(self.states):
            layer.load_state_dict(state[f"layers.{i}"])
        self._seen, self._pending, self._dropped = list(state["seen"]), list(state["pending"]), state["dropped"]
        copies = [] if pin is None else [(k.to(device, copy=True), v.to(device, copy=True)) for k, v in pin["kv"]]
        self._pin = None if pin is None else _Pin(pin["token"], pin["position"], copies)

    # --- pinned frames ----------------------------------------

    def pin(self, start_frame: int, n_frames: int) -> None:
        """Keep frames of the window beyond it, for example the first ones of a shot; they are copied once, and take the place of
        those that were pinned before.

        They are seen where they have left the window, and never twice. With positions="cache" they then stand directly before it.

        Args:
            start_frame: the first of them, in the numbering of the video.
            n_frames: how many; 0 for none.

        Raises:
            ValueError: frames that are not committed, are sinks, or have left the window already.
        """
        for name, size in (("start_frame", start_frame), ("n_frames", n_frames)):
            _checks.size(name, size)
        if not n_frames:
            self._pin = None
            return
        frame, seen, state = self.frame_tokens, min(self._seen), self.states[0]
        first, count = start_frame * frame - self._dropped, n_frames * frame
        oldest = max(state.sink_tokens, max(self._seen) - state.window)
        if not oldest <= first <= seen - count:
            least, last = ((self._dropped + x) // frame for x in (oldest, seen))
            got = f"{start_frame} to {start_frame + n_frames}"
            raise ValueError(f"start_frame: expected frames within {least} to {last}, those of the window, got {got}")
        token = torch.arange(first, first + count, device=state.seen.device).expand(state.seen.shape[0], -1)
        dtype = state.sink_k.dtype
        kv = [(rows(s, "k", token).to(dtype), rows(s, "v", token).to(dtype)) for s in self.states]
        self._pin = _Pin(self._dropped + first, first, kv)

    def _with_pinned(
        self, layer: int, q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, begin: int, scale: float | None
    ) -> torch.Tensor:
        """`out` with the pinned frames that are neither sinks nor in the window, which begins at token `begin`."""
        pin, state = self._pin, self.states[layer]
        assert pin is not None
        k, v = (x.transpose(1, 2) for x in pin.kv[layer])
        count, first = k.shape[1], pin.token - self._dropped  # as the states count now
        bounds = [(0, -first), (state.sink_tokens - first, begin - first)]
        runs = [(max(0, min(a, count)), max(0, min(b, count))) for a, b in bounds]
        runs = [run for run in runs if run[0] < run[1]]
        if not runs:
            return out
        gap = max(0, begin - first - count) if state.positions == "cache" else 0
        rope, width = state.rope, q.shape[1]
        with torch.no_grad(), without_autocast(q.device.type):
            q = q.to(k.dtype)
            if rope is not None:
                place = torch.arange(count, device=k.device)[:, None] + pin.position
                k = rope.rotate(k, place) if state.key_rope == "pre" else k
                own = torch.arange(width, device=k.device)[None] + (self._seen[layer] - gap + pin.position - first)
                q = rope.rotate(q, own[:, :, None], rope.attention_scaling**2)
            starts, ends = (
                torch.tensor([run[side] for run in runs], dtype=torch.int32, device=k.device).expand(1, 1, width, -1)
                for side in (0, 1)
            )
            mask = IntervalMask(starts, ends, tk=count)
            other: Any = interval_attention(q, k, v, mask, scale=scale, return_lse=True, backend=state.backend)
            total = torch.logaddexp(lse, other[1])
            parts = (x * (part - total).exp()[..., None] for x, part in ((out, lse), other))
            return sum(parts).to(out.dtype)  # type: ignore[union-attr]
