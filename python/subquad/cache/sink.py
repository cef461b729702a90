"""The memory of one layer of a stream: the first tokens for ever, the last ones in a ring (StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .. import _checks
from .._backends import BACKENDS
from ..contract.sink_attention_step import MAX_HEAD_DIM, RING_DTYPES
from ..ops.sink_attention_step import sink_attention_step
from ..rope import RopeSpec, check_rope
from . import _sink_moves as moves
from ._memory import zeros
from ._share import Share
from ._sink_prefill import attend
from .state import TensorState, preallocated

# Queries per key head up to which the operator for steps is called: it walks the whole ring for every tile of them, while
# attention over intervals visits only what is seen, but first puts the cache in order, a copy worth about as many queries.
FEW_ROWS = 64
ALIGNED = 64  # places of a ring come in whole tiles of the kernels


class SinkKVCache(TensorState):
    """Keys and values of the first S tokens and of a window, per sequence, in constant memory (StreamingLLM, arXiv 2309.17453).

    Token i of a sequence sees token j if j <= i and (j < S or i - j < W), however its tokens are divided into calls. Sequences of
    a batch have lengths of their own; padding is never stored. All tensors keep their addresses, and no value is read from a
    GPU, so that steps can be captured and compiled. There are no gradients: `sink_attention` trains.

    Args:
        batch: B, number of sequences.
        num_kv_heads, head_dim: Hkv and D, of the keys.
        v_head_dim: Dv, of the values; None for D.
        sink_tokens: S, first tokens of every sequence, which stay.
        window: W, tokens up to the query's own, which counts; with neither it nor sinks, nothing would be seen.
        slack: places of the ring beyond the window: `rollback` takes back up to slack + 1 tokens at any time.
        dtype: of the tokens and of the sinks; None for torch's default.
        kv_dtype: of the ring: None for `dtype`, torch.int8 or torch.float8_e4m3fn, with a float32 scale per token and head.
        key_rope: "pre" keeps keys without rotation and rotates them where they are read: exact at any length, better for int8,
            and tokens can be moved. "post" rotates them once, where they enter.
        positions: "cache": tokens have the positions they have in the cache, below S + W for ever; "absolute": in the sequence.
        rope: rotation of queries and keys, which `step` then takes without; None: as they are given.
        sink_logits: [Hq], one more term exp(sink_logits[h]) of every softmax denominator (gpt-oss).
        backend: of the operators, as in `sink_attention_step`.
        device: of the tensors.

    Attributes:
        sink_k, sink_v, ring_k, ring_v, k_scale, v_scale, seen, written, first: the tensors of `sink_attention_step`. Which places
            hold a token follows from the counters alone.
        seen: int64 [B], tokens of each sequence. Padding is not counted, for it is not stored.

    Raises:
        TypeError: wrong type of an argument.
        ValueError: numbers out of range, unknown options, frequencies of `rope` that hold for fewer than S + W positions, or for
            some only beside positions="absolute".

    Example:
        >>> import torch, subquad
        >>> cache = subquad.SinkKVCache(1, 2, 8, sink_tokens=2, window=6)
        >>> with torch.no_grad():
        ...     out, lse = cache.step(torch.randn(1, 30, 4, 8), torch.randn(1, 30, 2, 8), torch.randn(1, 30, 2, 8))
        >>> out.shape, cache.seen.tolist()
        (torch.Size([1, 30, 4, 8]), [30])
    """

    counters: tuple[str, ...] = ("window", "key_rope", "positions")
    share = Share()  # the tokens that this process has
    sink_k: torch.Tensor
    sink_v: torch.Tensor
    ring_k: torch.Tensor
    ring_v: torch.Tensor
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
    seen: torch.Tensor
    written: torch.Tensor
    first: torch.Tensor

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        v_head_dim: int | None = None,
        sink_tokens: int = 4,
        window: int = 1020,
        slack: int = 64,
        dtype: torch.dtype | None = None,
        kv_dtype: torch.dtype | None = None,
        key_rope: str = "pre",
        positions: str = "cache",
        rope: RopeSpec | None = None,
        sink_logits: torch.Tensor | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        for name, size, least in (
            ("batch", batch, 0), ("num_kv_heads", num_kv_heads, 1), ("head_dim", head_dim, 1), ("v_head_dim", v_head_dim, 1),
            ("sink_tokens", sink_tokens, 0), ("window", window, 0), ("slack", slack, 0),
        ):  # fmt: skip
            _checks.size(name, size, least)
            if "head_dim" in name and size > MAX_HEAD_DIM:
                raise ValueError(f"{name}: expected at most {MAX_HEAD_DIM}, got {size}")
        _checks.some_seen(sink_tokens, window)
        for name, size in (("sink_tokens", sink_tokens), ("window", window), ("slack", slack)):
            sizes = {name: size, "batch": batch, "num_kv_heads": num_kv_heads, "head_dim": max(head_dim, v_head_dim)}
            _checks.elements(**sizes)
        device = _checks.device("device", device)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in _checks.FLOAT_DTYPES:
            raise TypeError(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype}")
        kv_dtype = dtype if kv_dtype is None else kv_dtype
        if kv_dtype not in (dtype, *RING_DTYPES):
            raise TypeError(f"kv_dtype: expected {dtype} as dtype, int8 or float8_e4m3fn, got {kv_dtype}")
        _checks.choice("key_rope", key_rope, ("pre", "post"))
        _checks.choice("positions", positions, ("cache", "absolute"))
        if backend is not None:
            _checks.choice("backend", backend, BACKENDS)
        _check_rope(rope, head_dim, sink_tokens + window, positions)
        if sink_logits is not None:
            _checks.tensor("sink_logits", sink_logits)
            if sink_logits.dim() != 1 or sink_logits.shape[0] < 1 or sink_logits.shape[0] % num_kv_heads:
                expected = f"[Hq] with Hq a multiple of the {num_kv_heads} key heads"
                raise ValueError(f"sink_logits: expected shape {expected}, got {list(sink_logits.shape)}")
            sink_logits = sink_logits.to(device)
        self.sink_tokens, self.window, self.key_rope, self.positions = sink_tokens, window, key_rope, positions
        self.rope, self.sink_logits, self.backend = rope, sink_logits, backend
        places = _aligned(self.share.most(window + slack))
        for name, heads, count, of in (
            ("sink", num_kv_heads, self.share.count(sink_tokens), dtype),
            ("ring", num_kv_heads, places, kv_dtype),
        ):
            for side, width in (("k", head_dim), ("v", v_head_dim)):
                self.put(f"{name}_{side}", zeros(batch, heads, count, width, dtype=of, device=device))
        for side in ("k", "v"):
            setattr(self, f"{side}_scale", None)
            if kv_dtype in RING_DTYPES:
                self.put(f"{side}_scale", torch.ones(batch, num_kv_heads, places, device=device))
        for name in COUNTERS:
            self.put(name, torch.zeros(batch, dtype=torch.int64, device=device))

    @property
    def places(self) -> int:
        """Tokens up to the newest that rings hold at any time, those of all processes."""
        return self.share.size * self.ring_k.shape[2]

    # --- attention ----------------------------------------

    def step(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        m: torch.Tensor | None = None,
        *,
        together: bool = False,
        commit: bool = True,
        scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """New tokens attend to the cache and to each other, then enter it; any number of them.

        Args:
            q, k, v: [B, T, Hq, D], [B, T, Hkv, D], [B, T, Hkv, Dv] of the cache's dtype, without rotation where it has a `rope`.
            m: int32 or int64 [B], how many of the T columns are tokens, from the left; None for all. 0 leaves a row alone.
            together: whether the new tokens all see each other, and the window ends at the last of them.
            commit: False leaves `seen`: the same tokens may come again, as many as now where they are `together`.
            scale: factor of the scores; None for D ** -0.5.

        Returns:
            (out [B, T, Hq, Dv], lse [B, T, Hq] float32), as `sink_attention_step`; 0 and -inf in columns that are no tokens.

        Raises:
            TypeError, ValueError: as `sink_attention_step`; more tokens without `commit` than the ring has places for beyond the
                window. Nothing has changed then.
        """
        if q is None:
            raise TypeError("q: expected a torch.Tensor, got None; append() writes without attention")
        new = k.shape[1] if isinstance(k, torch.Tensor) and k.dim() == 4 else 0
        spare = self.places - self.window + 1
        if not commit and not together and new > spare:
            raise ValueError(
                f"commit: expected True for more than {spare} tokens, which overwrite the window, got False"
            )
        if not new or not isinstance(q, torch.Tensor) or q.dim() != 4 or self._few(q, k):
            return self._enter(q, k, v, m, together=together, commit=commit, scale=scale)
        result = self._attend(q, k, v, m, together, scale)
        self._enter(None, k, v, m, together=together, commit=commit)
        return result

    def append(self, k: torch.Tensor, v: torch.Tensor, m: torch.Tensor | None = None) -> None:
        """Tokens enter the cache, as by `step`, without attention."""
        self._enter(None, k, v, m)

    def prefill(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pad: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`step` of prompts that are padded on the left.

        Args:
            q, k, v: as for `step`.
            pad: int32 or int64 [B], columns before the first token of each row; None for none. On a GPU numbers outside 0..T
                count as the nearest of them.

        Returns:
            (out, lse) as `step`: 0 and -inf in the columns of padding.

        Raises:
            TypeError, ValueError: as `step`; numbers outside 0..T.
        """
        if pad is None:
            return self.step(q, k, v)
        _checks.integers("pad", pad, 1)
        for name, x in (("k", k), ("q", q), ("v", v)):
            _checks.tensor(name, x)
            _checks.same_device(name, x, self.seen.device, "the cache")
            if x.dim() != 4 or x.shape[:2] != (self.seen.shape[0], k.shape[1]):
                shape = f"[{self.seen.shape[0]}, {'T' if x is k else k.shape[1]}, H, D]"
                raise ValueError(f"{name}: expected shape {shape}, got {list(x.shape)}")
        width, pad = k.shape[1], self._per_row("pad", pad)
        if _checks.readable(pad) and any(not 0 <= n <= width for n in pad.tolist()):
            raise ValueError(f"pad: expected numbers in 0..{width}, got {_checks.shown(pad.tolist())}")
        column, pad = torch.arange(width, device=k.device), pad.clamp(0, width)[:, None]
        q, k, v = (moves.columns(x, column + pad) for x in (q, k, v))
        out, lse = self.step(q, k, v, width - pad[:, 0])
        back, padding = column - pad, column < pad
        out, lse = moves.columns(out, back), moves.columns(lse, back)
        return out.masked_fill(padding[..., None, None], 0.0), lse.masked_fill(padding[..., None], -torch.inf)

    def _few(self, q: torch.Tensor, k: torch.Tensor) -> bool:
        """Whether queries go to the operator for steps."""
        return q.shape[1] * q.shape[2] <= FEW_ROWS * k.shape[2]

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        m: torch.Tensor | None,
        together: bool,
        scale: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of many queries, which writes nothing."""
        return attend(self, q, k, v, m, together, scale, self.sink_logits)

    def _enter(
        self,
        q: torch.Tensor | None,
        k: torch.Tensor,
        v: torch.Tensor,
        m: torch.Tensor | None,
        *,
        together: bool = False,
        commit: bool = True,
        scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The operator on the cache's tensors."""
        return sink_attention_step(
            q, k, v, self.sink_k, self.sink_v, self.ring_k, self.ring_v, self.seen, self.written, self.first,
            window=self.window, k_scale=self.k_scale, v_scale=self.v_scale, m=m, rope=self.rope, key_rope=self.key_rope,
            sink_logits=None if q is None else self.sink_logits, positions=self.positions, backend=self.backend,
            together=together, commit=commit, scale=scale,
        )  # fmt: skip

    def gather(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What is remembered, in the order of the sequence, as new tensors of fixed shapes.

        Returns:
            (k [B, Hkv, S + W, D], v [B, Hkv, S + W, Dv], tokens int64 [B, S + W], count int64 [B]): keys as they are stored (with
            key_rope="pre" without rotation), in `dtype`. The first `count` places hold tokens, sinks first; the others are zero,
            and -1 in `tokens`.
        """
        share, sinks = self.share, self.sink_k.shape[2]
        oldest, held = (share.count(n)[:, None] for n in (self._oldest(), self.seen))
        place = torch.arange(sinks + share.most(self.window), device=self.seen.device)
        number = torch.where(place < sinks, place, oldest + place - sinks)
        number = torch.where(number < held, number, -1)
        k, v = (moves.rows(self, side, number).to(self.sink_k.dtype) for side in ("k", "v"))
        return k, v, torch.where(number < 0, -1, share.token(number)), (number >= 0).sum(1)

    # --- forgetting ----------------------------------------

    def evict_for_space(self, m: int | torch.Tensor) -> None:
        """Forget the oldest tokens of the window until m more fit, which then all see the same window (StreamingLLM's chats).

        By itself the cache forgets one token for every new one. After this call nothing more is forgotten within the next m
        tokens, whose positions therefore do not move against those of the cache.

        Args:
            m: tokens to come, at most W; an int, or int32 or int64 [B]. On a GPU larger ones of a tensor count as W.

        Raises:
            ValueError: more than the window holds, or less than 0.
        """
        coming = self._per_row("m", m)
        if _checks.readable(coming) and any(not 0 <= n <= self.window for n in coming.tolist()):
            raise ValueError(
                f"m: expected 0 to {self.window} tokens, as the window holds, got {_checks.shown(coming.tolist())}"
            )
        coming = coming.clamp(0, self.window)
        self.first.copy_(torch.maximum(self.first, self.seen + coming - self.window))

    def evict(self, lo: int | torch.Tensor, hi: int | torch.Tensor) -> None:
        """Forget tokens lo..hi-1 of a sequence that goes on: a tool's long answer, a turn that was taken back.

        Those behind are renumbered, and `seen` shrinks by what was forgotten. All that remain are seen by the tokens to come;
        what had left the window before does not return. Where sinks are forgotten, the oldest tokens of the window become
        sinks; where these do not suffice, they are all there is, numbered from 0. With key_rope="pre" the remaining tokens
        are as they were, bit by bit. With "post" the keys that move are rotated once more, in float32, and rounded.

        Args:
            lo, hi: numbers of tokens in the sequence, ints or int32 or int64 [B]; those not there yet do not count.

        Raises:
            ValueError: lo above hi or below 0; keys that somebody else has rotated: key_rope="post" without `rope`.
        """
        low, high = self._per_row("lo", lo), self._per_row("hi", hi)
        if self.key_rope == "post" and self.rope is None:
            raise ValueError(
                "key_rope: expected 'pre', or a rope by which moved keys are turned, got 'post' without one"
            )
        if _checks.readable(low) and any(not 0 <= a <= b for a, b in zip(low.tolist(), high.tolist(), strict=True)):
            got = f"{_checks.shown(low.tolist())} and {_checks.shown(high.tolist())}"
            raise ValueError(f"lo, hi: expected 0 <= lo <= hi, got {got}")
        low = low.clamp_min(0)
        moves.evict(self, low, torch.maximum(low, high))

    def reset(self, mask: torch.Tensor | None = None) -> None:
        """Forget everything, or the sequences where the bool mask [B] is True. Addresses stay, and so do stale keys, unseen."""
        if mask is not None:
            _checks.booleans("mask", mask)
            if mask.shape != self.seen.shape:
                raise ValueError(f"mask: expected shape {list(self.seen.shape)}, got {list(mask.shape)}")
        for name in COUNTERS:
            counter: torch.Tensor = getattr(self, name)
            if mask is None:
                counter.zero_()
            else:
                counter.masked_fill_(mask.to(counter.device), 0)

    def _oldest(self) -> torch.Tensor:
        """The oldest token of the window that is there, int64 [B]; `seen` or more where there is none."""
        least = torch.maximum(self.first, self.seen - self.window).clamp_min(self.sink_tokens)
        return torch.maximum(least, self.written - self.places)

    # --- taking tokens back ----------------------------------------

    @property
    def kept(self) -> int:
        """Tokens that `rollback` can take back from every sequence now. Waits for a GPU."""
        return int((self.seen - self._floor()).min()) if self.seen.shape[0] else 0

    def keep(self, tokens: int) -> None:
        """Have room for a rollback of `tokens` tokens at any time: the ring is enlarged, once, where its slack is too small."""
        _checks.size("tokens", tokens)
        if self.window + tokens - 1 > self.places:
            moves.enlarge(self, _aligned(self.share.most(self.window + tokens)))

    def rollback(self, tokens: int | torch.Tensor) -> None:
        """Be as before the last tokens. Counters change, nothing else, also where the ring has wrapped.

        What `evict` and `evict_for_space` forgot stays forgotten.

        Args:
            tokens: how many of every sequence; an int, or int32 or int64 [B]. Legal are those up to `kept` of a sequence, and
                those that leave no more than sinks.

        Raises:
            ValueError: more than are kept, or less than 0; nothing has changed then. On a GPU, where values are read under
                SUBQUAD_DEBUG=1 only, such numbers count as the nearest legal ones.
        """
        if not isinstance(tokens, torch.Tensor):
            _checks.size("tokens", tokens)
        back, floor, sinks = self._per_row("tokens", tokens), self._floor(), self.sink_tokens
        left = self.seen - back
        legal = ((left >= floor) | (left <= sinks)) & (left >= 0) & (back >= 0)
        if _checks.readable(legal) and not bool(legal.all()):
            raise ValueError(
                f"tokens: expected at most the {self.kept} that are kept for a rollback, got "
                f"{tokens if isinstance(tokens, int) else _checks.shown(back.tolist())}"
            )
        left = torch.where(legal, left, torch.minimum(torch.maximum(left, floor), self.seen))
        self.written.copy_(torch.where(left <= sinks, left, self.written))  # then the ring holds nothing to be kept,
        self.first.masked_fill_(left <= sinks, 0)  # nor is anything of it forgotten
        self.seen.copy_(left)

    def _floor(self) -> torch.Tensor:
        """Tokens that have to remain where a sequence goes back one by one, int64 [B]."""
        sinks, places = self.sink_tokens, self.places
        floor = self.written - (places - self.window + 1)
        floor = torch.where((self.written - places <= sinks) | (floor <= sinks + 1), 0, floor)
        return torch.where(self.first > sinks, torch.maximum(floor, self.first), floor)

    # --- as a state ----------------------------------------

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: x for name in NAMES if (x := getattr(self, name)) is not None}

    def put(self, name: str, value: torch.Tensor) -> None:
        if name not in NAMES:
            raise ValueError(f"state: expected names of a SinkKVCache, got {name!r}")
        setattr(self, name, preallocated(value))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> None:
        super().to(device, non_blocking)
        if self.sink_logits is not None:
            self.sink_logits = self.sink_logits.to(device, non_blocking=non_blocking)

    def state_dict(self) -> dict[str, Any]:
        """Tensors as they are, and the configuration, from which a cache made alike goes on bit by bit."""
        return super().state_dict() | self._configuration()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over copies of the tensors that `state_dict` gave, of any number of sequences and places.

        Raises:
            TypeError: no mapping.
            ValueError: names that are missing or not known, a cache of another configuration. Nothing has changed then.
        """
        self.check_state(state)
        for name, value in self.tensors().items():
            self.put(name, state[name].to(value.device, copy=True))

    def check_state(self, state: Mapping[str, Any]) -> None:
        """What `load_state_dict` raises, without loading."""
        _checks.mapping("state", state)
        own = self.state_dict()
        for name in sorted(own.keys() ^ state.keys()):
            wanted = f"expected {name!r}" if name in own else "expected names of this SinkKVCache"
            raise ValueError(f"state: {wanted}, got {sorted(state)}")
        for name, value in own.items():
            _check_same(name, value, state[name], fixed=name not in NAMES)
        batch, places = (state["ring_k"].shape[i] for i in (0, 2))
        for name, value in self.tensors().items():
            shape = [batch, *value.shape[1:]]
            if name in (*RINGS, *SCALES):
                shape[2] = places
            if list(state[name].shape) != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {list(state[name].shape)}")
        least = self.share.most(self.window)
        if places < max(1, least):
            raise ValueError(f"ring_k: expected at least the {least} places of the window, got {places}")

    def _configuration(self) -> dict[str, Any]:
        rope = self.rope
        found: dict[str, Any] = {"sink_logits": self.sink_logits, "rope": None if rope is None else rope.turns()}
        return found | {name: getattr(rope, name, None) for name in ("interleaved", "attention_scaling")}

    def _per_row(self, name: str, value: int | torch.Tensor) -> torch.Tensor:
        """int64 [B] of a number for every sequence, or one for all."""
        if isinstance(value, torch.Tensor):
            _checks.integers(name, value, 1)
            _checks.same_device(name, value, self.seen.device, "the cache")
            if value.shape != self.seen.shape:
                raise ValueError(f"{name}: expected shape {list(self.seen.shape)}, got {list(value.shape)}")
            return value.long()
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int or a tensor of them, got {type(value).__name__}")
        return torch.full_like(self.seen, value)


SINKS, RINGS, SCALES, COUNTERS = (
    ("sink_k", "sink_v"),
    ("ring_k", "ring_v"),
    ("k_scale", "v_scale"),
    ("seen", "written", "first"),
)
NAMES = (*SINKS, *RINGS, *SCALES, *COUNTERS)


def _aligned(places: int) -> int:
    return -(-max(1, places) // ALIGNED) * ALIGNED


def _check_rope(rope: RopeSpec | None, head_dim: int, capacity: int, positions: str) -> None:
    check_rope("rope", rope)
    if rope is None:
        return
    if rope.rotary_dim > head_dim:
        raise ValueError(f"rope: expected at most {head_dim} rotated elements of a head, got {rope.rotary_dim}")
    if rope.max_positions is not None and positions == "absolute":
        raise ValueError(f"positions: expected 'cache' beside a rope of {rope.max_positions} positions, got 'absolute'")
    if rope.max_positions is not None and capacity > rope.max_positions:
        raise ValueError(
            f"rope: expected one that holds for sink_tokens + window = {capacity} positions, got {rope.max_positions}"
        )


def _check_same(name: str, own: Any, other: Any, fixed: bool) -> None:
    """ValueError unless a saved value fits: the same where it is `fixed`, of one dtype where it is a tensor of the cache."""
    kinds = isinstance(own, torch.Tensor), isinstance(other, torch.Tensor)
    if kinds == (True, True):
        same = own.dtype is other.dtype and (not fixed or torch.equal(own, other.to(own.device)))
        if not same:
            what = f"those of this cache, {own.tolist()}" if own.dtype is other.dtype else f"{own.dtype}"
            raise ValueError(
                f"{name}: expected {what}, got {other.tolist() if own.dtype is other.dtype else other.dtype}"
            )
    elif kinds != (False, False) or own != other:
        raise ValueError(f"{name}: expected {own!r} as this cache has, got {other!r}")
