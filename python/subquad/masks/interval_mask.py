"""`IntervalMask`: which keys each query row sees, as a few intervals per row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import _checks, _env
from .._packing import bounds
from . import algebra, builders, checks, interop, key_lifetimes
from .algebra import Intervals
from .builders import Span
from .key_lifetimes import Lifetime
from .plan import plan_of

_DEBUG = _env.read().debug
_ANY = "tq, tk: expected sizes, for the mask has none of its own"


class IntervalMask:
    """A union of at most m key intervals for every query row, and optionally a lifetime for every key.

    Everything in it is O(Tq m); no [Tq, Tk] tensor exists unless `to_dense` is asked for one. A mask may be used for any
    number of calls, layers and batches; what kernels need of it is computed once and kept.

    The tensors that a mask is made from are copied: what happens to them later does not reach it. Its own (`starts`, `ends`,
    `key_start`, `key_stop`, `shift`) may be written to between calls, and every backend follows; masks made from a mask by
    `with_key_lifetime`, or by `to` on the same device, share them.

    The plain masks (`causal`, `full`, `sliding`, `sink`) are three numbers and no tensors. Without sizes of their own they take
    those of each call. Query row t stands at the absolute position t + Tk - Tq: the last query sees up to the last key.

    Args:
        starts: int32 [B|1, H|1, Tq, m]: interval r of a row is [starts[r], ends[r]), sorted, disjoint, inside [0, tk];
            unused intervals are (tk, tk) and come last.
        ends: as starts.
        tk: number of keys.
        key_start: int32 [B|1, H|1, tk]: row t may see key j only if key_start[j] <= t < key_stop[j].
        key_stop: as key_start; both or neither.
        shift: int32, as starts: how many positions the query is rotated for each interval (PINE, arXiv 2407.01100).

    Attributes:
        plain_causal, sink_tokens, window: the plain form, where `starts` is None: row i sees [0, min(sink_tokens, i + 1)) and
            [i - window + 1, i + 1) (window -1: [0, i + 1)) if causal, every key if not.
        tq, tk: sizes, or None.

    Raises:
        TypeError: an index tensor that is not int32.
        ValueError: shapes that do not fit; intervals out of range, unsorted or overlapping (checked on the CPU, and on a GPU
            under SUBQUAD_DEBUG=1, since that waits for the device).
    """

    key_start: torch.Tensor | None
    key_stop: torch.Tensor | None

    def __init__(
        self,
        starts: torch.Tensor,
        ends: torch.Tensor,
        *,
        tk: int,
        key_start: torch.Tensor | None = None,
        key_stop: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
    ) -> None:
        checks.indices("starts", starts, 4)
        checks.indices("ends", ends, 4, starts)
        if tk < 0 or starts.shape[3] < 1:
            raise ValueError(f"starts: expected tk >= 0 and at least one interval, got {tk} and {list(starts.shape)}")
        checks.lifetime(key_start, key_stop, tk)
        if shift is not None:
            checks.indices("shift", shift, 4)
            if shift.shape[2:] != starts.shape[2:]:
                raise ValueError(
                    f"shift: expected shape [B|1, H|1, *{list(starts.shape[2:])}], got {list(shift.shape)}"
                )
        if _checks.readable(starts):
            checks.sorted_intervals(starts, ends, tk)
        self._set(starts.clone(), ends.clone(), tk, None if shift is None else shift.clone())
        if key_start is not None and key_stop is not None:
            self.key_start, self.key_stop = key_start.clone().contiguous(), key_stop.clone().contiguous()

    def _set(self, starts: torch.Tensor, ends: torch.Tensor, tk: int, shift: torch.Tensor | None = None) -> None:
        if shift is not None:
            lead = torch.broadcast_shapes(starts.shape[:2], shift.shape[:2])
            starts, ends, shift = (x.expand(*lead, *x.shape[2:]).contiguous() for x in (starts, ends, shift))
        self.starts: torch.Tensor | None = _counted(starts)
        self.ends: torch.Tensor | None = _counted(ends)
        self.key_start = self.key_stop = None
        self.shift = shift
        self.tq: int | None = starts.shape[2]
        self.tk: int | None = tk
        self.plain_causal, self.sink_tokens, self.window = False, 0, -1

    @classmethod
    def _plain(cls, causal: bool, sink_tokens: int, window: int, tq: int | None, tk: int | None) -> IntervalMask:
        checks.sizes(**{name: size for name, size in (("tq", tq), ("tk", tk)) if size is not None})
        if tq is None and tk is not None:
            raise ValueError(f"tq: expected a size, as tk = {tk} is one, got None")
        mask = cls.__new__(cls)
        mask.starts = mask.ends = mask.key_start = mask.key_stop = mask.shift = None
        mask.tq, mask.tk = tq, tq if tk is None else tk
        mask.plain_causal, mask.sink_tokens, mask.window = causal, sink_tokens, window
        return mask

    @classmethod
    def _of(cls, intervals: Intervals, tk: int) -> IntervalMask:
        """From intervals [..., Tq, k] in any order."""
        starts, ends = algebra.trimmed(algebra.canonical(*intervals, tk), tk)
        return cls._raw(starts, ends, tk)

    @classmethod
    def _raw(cls, starts: torch.Tensor, ends: torch.Tensor, tk: int, shift: torch.Tensor | None = None) -> IntervalMask:
        mask = cls.__new__(cls)
        wide = [x.reshape(*(1,) * (4 - x.dim()), *x.shape) for x in (starts, ends)]
        mask._set(wide[0], wide[1], tk, shift)
        return mask

    # --- the plain masks ----------------------------------------

    @classmethod
    def causal(cls, tq: int | None = None, tk: int | None = None) -> IntervalMask:
        """Row i sees [0, i + 1)."""
        return cls._plain(True, 0, -1, tq, tk)

    @classmethod
    def full(cls, tq: int | None = None, tk: int | None = None) -> IntervalMask:
        """Every row sees every key."""
        return cls._plain(False, 0, -1, tq, tk)

    @classmethod
    def sliding(cls, window: int, tq: int | None = None, tk: int | None = None) -> IntervalMask:
        """Row i sees the `window` keys [i - window + 1, i + 1), its own included."""
        return cls.sink(0, window, tq, tk)

    @classmethod
    def sink(cls, sink_tokens: int, window: int, tq: int | None = None, tk: int | None = None) -> IntervalMask:
        """Row i sees the first `sink_tokens` keys and the last `window` up to its own (StreamingLLM, arXiv 2309.17453)."""
        checks.sizes(sink_tokens=sink_tokens, window=window)
        return cls._plain(True, sink_tokens, window, tq, tk)

    # --- builders ----------------------------------------

    @classmethod
    def prefix_lm(cls, prefix: int | torch.Tensor, tq: int, tk: int | None = None) -> IntervalMask:
        """Every row sees the prefix, and all keys up to its own. `prefix` is an int, or an int tensor [B]."""
        tk = tq if tk is None else tk
        checks.sizes(tq=tq, tk=tk)
        if not isinstance(prefix, torch.Tensor):
            _checks.size("prefix", prefix)
        else:
            checks.integers("prefix", prefix, (1,))
        return cls._of(builders.prefix_lm(prefix, tq, tk), tk)

    @classmethod
    def packed(
        cls,
        cu_seqlens: torch.Tensor,
        cu_seqlens_k: torch.Tensor | None = None,
        *,
        causal: bool = True,
        sink_tokens: int = 0,
        window: int = -1,
    ) -> IntervalMask:
        """Sequences one after the other, each attending within itself.

        Args:
            cu_seqlens: int [N + 1], where each sequence of queries begins: from 0, not decreasing; the last is Tq.
            cu_seqlens_k: the same of the keys; None for the same.
            causal: whether rows see only keys up to their own, the last row of a sequence its last key.
            sink_tokens: with a window, also the first keys of the sequence.
            window: keys up to the row's own that it sees, -1 for all; only with `causal`.

        Raises:
            TypeError, ValueError: tensors that are not such beginnings; a window or sinks that cannot be.
        """
        _checks.size("sink_tokens", sink_tokens)
        if window != -1:
            _checks.size("window", window)
            if not causal:
                raise ValueError(f"window: expected -1 where rows see keys behind them (causal=False), got {window}")
        bounds("cu_seqlens", cu_seqlens)
        cu_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        bounds("cu_seqlens_k", cu_k)
        if cu_k.shape != cu_seqlens.shape:
            raise ValueError(f"cu_seqlens_k: expected shape {list(cu_seqlens.shape)}, got {list(cu_k.shape)}")
        intervals = builders.packed(cu_seqlens, cu_k, int(cu_seqlens[-1]), causal, sink_tokens, window)
        return cls._of(intervals, int(cu_k[-1]))

    @classmethod
    def mma(cls, tq: int, images: Sequence[Span], questions: Sequence[Span]) -> IntervalMask:
        """Modality-mutual attention (AKI, arXiv 2503.02597): causal, and rows of an image also see its question.

        Args:
            tq: length of the sequence.
            images: spans [start, stop) of image tokens.
            questions: the span of the question of each image, or one for all; an image with several questions stands in
                `images` several times.
        """
        for name, spans in (("images", images), ("questions", questions)):
            checks.spans_inside(name, spans, tq)
        if len(questions) == 1:
            questions = list(questions) * len(images)
        if len(questions) != len(images):
            raise ValueError(f"questions: expected 1 or {len(images)} spans, as many as images, got {len(questions)}")
        return cls._of(builders.mma(tq, images, questions), tq)

    @classmethod
    def pine(cls, prefix: int, lengths: Sequence[int], suffix: int, shift: torch.Tensor | None = None) -> IntervalMask:
        """Documents between a causal prefix and a causal suffix that see each other fully (PINE, arXiv 2407.01100).

        Args:
            prefix, lengths, suffix: numbers of tokens; `lengths` of the documents.
            shift: int [B|1, H|1, n + suffix, n]: by how many positions a query is rotated for document j: a row for each
                document, then one for each token of the suffix. Without it the mask has no `shift`.
        """
        for name, size in (("prefix", prefix), ("suffix", suffix), *(("lengths", n) for n in lengths)):
            _checks.size(name, size)
        tk = prefix + sum(lengths) + suffix
        if shift is None:
            return cls._of(builders.pine(prefix, lengths, suffix), tk)
        n = len(lengths)
        if n == 0:
            raise ValueError("lengths: expected at least one document to shift for, got none")
        checks.integers("shift", shift, (4,))
        if shift.shape[2:] != (n + suffix, n):
            raise ValueError(f"shift: expected shape [B|1, H|1, {n + suffix}, {n}], got {list(shift.shape)}")
        (starts, ends), turns = builders.pine_shifted(prefix, lengths, suffix, shift)
        starts, ends = (x.to(torch.int32).to(shift.device) for x in (starts, ends))
        return cls._raw(starts, ends, tk, shift=turns)

    @classmethod
    def cca(cls, height: int, width: int, before: int = 0, after: int = 0) -> IntervalMask:
        """Concentric causal attention (arXiv 2410.15926): an image token sees the tokens of its ring and of the rings outside.

        The image tokens must be sorted by ring, `cca_permutation`; then one interval per row is enough.

        Args:
            height, width: of the image, in tokens.
            before, after: tokens of text around it.
        """
        checks.sizes(height=height, width=width, before=before, after=after)
        return cls._of(builders.cca(height, width, before, after), before + height * width + after)

    @staticmethod
    def cca_permutation(height: int, width: int, before: int = 0, after: int = 0) -> torch.Tensor:
        """int64 [T]: which token of the raster order stands at each place of the sequence that `cca` masks."""
        ring = builders.rings(height, width).sort(stable=True).indices + before
        last = before + height * width
        return torch.cat([torch.arange(before), ring, torch.arange(last, last + after)])

    @staticmethod
    def cca_positions(height: int, width: int, before: int = 0, after: int = 0) -> torch.Tensor:
        """int64 [T]: position ids in the order of `cca_permutation`: those of a ring are equal, text goes on behind."""
        ring = builders.rings(height, width).sort(stable=True).values
        count = (min(height, width) + 1) // 2
        return torch.cat([torch.arange(before), before + ring, before + count + torch.arange(after)])

    @classmethod
    def easycontrol(cls, main: int, conditions: Sequence[int]) -> IntervalMask:
        """Main tokens see everything, each block of condition tokens only itself (EasyControl, arXiv 2503.07027)."""
        for name, size in (("main", main), *(("conditions", n) for n in conditions)):
            _checks.size(name, size)
        return cls._of(builders.easycontrol(main, conditions), main + sum(conditions))

    @classmethod
    def frame_sink(
        cls,
        frames: int,
        frame_tokens: int,
        sink_frames: int,
        local_frames: int,
        block_frames: int = 1,
        pinned: Span | None = None,
    ) -> IntervalMask:
        """Video frames that see the first frames and a window of frames, both ways inside a block (LongLive, arXiv 2509.22622).

        Args:
            frames, frame_tokens: number of frames, and of tokens in each.
            sink_frames: frames that are always seen.
            local_frames: frames that are seen in all, `sink_frames` included: the window is the difference, and ends with the
                row's block.
            block_frames: frames that are generated together.
            pinned: a further span of frames, seen once it has left the window.
        """
        checks.sizes(frames=frames, frame_tokens=frame_tokens, block_frames=block_frames)
        if block_frames == 0:
            raise ValueError("block_frames: expected >= 1, got 0")
        if pinned is not None and not 0 <= pinned[0] <= pinned[1]:
            raise ValueError(f"pinned: expected 0 <= start <= stop, got {pinned}")
        if not 0 <= sink_frames <= local_frames:
            raise ValueError(f"sink_frames: expected at most local_frames = {local_frames}, got {sink_frames}")
        intervals = builders.frame_sink(frames, frame_tokens, sink_frames, local_frames, block_frames, pinned)
        return cls._of(intervals, frames * frame_tokens)

    @classmethod
    def lookahead(cls, ahead: torch.Tensor, left: int | None = None) -> IntervalMask:
        """Row i sees [i - left, i + 1 + ahead[i]) (ANCAT). `ahead` is an int tensor [Tq] or [B, H, Tq]; left None: all before."""
        checks.integers("ahead", ahead, (1, 3))
        if left is not None:
            _checks.size("left", left)
        return cls._of(builders.lookahead(ahead, left, ahead.shape[-1]), ahead.shape[-1])

    @classmethod
    def spans(cls, start: torch.Tensor, stop: torch.Tensor, tk: int, *, window: int | None = None) -> IntervalMask:
        """Row i sees the spans [start, stop) [B|1, H|1, Tq, k], in any order, overlapping or empty (negative: none).

        Args:
            start, stop: int tensors.
            tk: number of keys.
            window: also the `window` keys up to the row's own.
        """
        checks.integers("start", start, (4,))
        checks.integers("stop", stop, (4,))
        if start.shape != stop.shape:
            raise ValueError(f"start: expected [B|1, H|1, Tq, k] as stop, got {list(start.shape)}, {list(stop.shape)}")
        checks.sizes(tk=tk, window=0 if window is None else window)
        stop = torch.where(start < 0, start, stop)
        spans = algebra.canonical(start.long(), stop.long(), tk)
        if window is not None:
            local = builders.sink(start.shape[2], tk, 0, window)
            spans = algebra.union(spans, (local[0].to(start.device), local[1].to(start.device)), tk)
        return cls._of(spans, tk)

    @classmethod
    def from_dense(cls, mask: torch.Tensor) -> IntervalMask:
        """From a bool tensor [Tq, Tk], [B|1, Tq, Tk] or [B|1, H|1, Tq, Tk]; True where a row sees a key."""
        _checks.booleans("mask", mask)
        if mask.dim() not in (2, 3, 4):
            raise ValueError(f"mask: expected [Tq, Tk], [B, Tq, Tk] or [B, H, Tq, Tk], got {list(mask.shape)}")
        wide = mask[:, None] if mask.dim() == 3 else mask
        return cls._raw(*algebra.from_dense(wide), mask.shape[-1])

    @classmethod
    def concat(cls, masks: Sequence[IntervalMask]) -> IntervalMask:
        """Sequences one after the other, each under its own mask; all with sizes, without lifetimes."""
        if not masks:
            raise ValueError("masks: expected at least one mask, got none")
        parts, offset = [], 0
        for mask in masks:
            starts, ends, tk = mask._intervals("masks")
            parts.append((starts + offset, ends + offset))
            offset += tk
        m = max(starts.shape[-1] for starts, _ in parts)
        lead = torch.broadcast_shapes(*(starts.shape[:2] for starts, _ in parts))
        wide = [
            [torch.nn.functional.pad(x, (0, m - x.shape[-1])).expand(*lead, -1, -1) for x in part] for part in parts
        ]
        return cls._of((torch.cat([p[0] for p in wide], 2), torch.cat([p[1] for p in wide], 2)), offset)

    # --- algebra ----------------------------------------

    def __or__(self, other: IntervalMask) -> IntervalMask:
        """Keys that either mask shows. Sizes must be known and equal; lifetimes cannot be joined."""
        return self._combined(other, algebra.union, lifetimes=False)

    def __and__(self, other: IntervalMask) -> IntervalMask:
        """Keys that both masks show."""
        return self._combined(other, algebra.intersection, lifetimes=True)

    def __invert__(self) -> IntervalMask:
        """Keys that the mask hides."""
        starts, ends, tk = self._intervals("mask")
        return self._of(algebra.complement((starts, ends), tk), tk)

    def _combined(self, other: IntervalMask, operation: Callable[..., Intervals], lifetimes: bool) -> IntervalMask:
        if not isinstance(other, IntervalMask):
            return NotImplemented
        a = self if self.tq is not None else self.bound(other.tq, other.tk)
        b = other if other.tq is not None else other.bound(self.tq, self.tk)
        starts, ends, tk = a._intervals("mask", lifetimes)
        other_starts, other_ends, other_tk = b._intervals("other", lifetimes)
        if (a.tq, tk) != (b.tq, other_tk):
            raise ValueError(f"other: expected a mask of {a.tq} x {tk}, got {b.tq} x {other_tk}")
        pair = (other_starts.to(starts.device), other_ends.to(starts.device))
        return self._of(operation((starts, ends), pair, tk), tk)._living(key_lifetimes.joined(a._lifetime, b._lifetime))

    def permute(self, query: torch.Tensor | None = None, key: torch.Tensor | None = None) -> IntervalMask:
        """The mask of permuted sequences: new row t is old row query[t], new key j old key key[j].

        Permuting keys splits intervals anew; that is done for some rows at a time.
        """
        starts, ends, tk = self._intervals("mask")
        if query is not None:
            checks.places("query", query, starts.shape[2])
            starts, ends = starts[:, :, query], ends[:, :, query]
        if key is None:
            return self._raw(starts, ends, tk)
        checks.places("key", key, tk)
        if key.shape != (tk,):
            raise ValueError(f"key: expected shape [{tk}], got {list(key.shape)}")
        rows = [
            algebra.from_dense(algebra.contains(s, e, tk)[..., key])
            for s, e in zip(starts.split(256, 2), ends.split(256, 2), strict=True)
        ]
        m = max(s.shape[-1] for s, _ in rows)
        padded = [[torch.nn.functional.pad(x, (0, m - x.shape[-1]), value=tk) for x in row] for row in rows]
        return self._raw(torch.cat([p[0] for p in padded], 2), torch.cat([p[1] for p in padded], 2), tk)

    def with_keys(self, visible: torch.Tensor) -> IntervalMask:
        """The mask without the keys that are False in `visible`, a bool tensor [B, Tk]: padding, for example.

        By intervals; where values cannot be read, under torch.compile for example, by lifetimes of the keys.
        """
        _checks.booleans("visible", visible)
        if visible.dim() != 2 or visible.shape[1] != self.tk:
            raise ValueError(f"visible: expected shape [B, {self.tk}], got {list(visible.shape)}")
        if _checks.traced(visible):
            return self.with_live_keys(visible)
        starts, ends, tk = self._intervals("mask", lifetimes=True)
        keys = algebra.from_dense(visible[:, None, None])
        intervals = algebra.intersection((starts.to(visible.device), ends.to(visible.device)), keys, tk)
        return self._of(intervals, tk)._living(self._lifetime)

    def with_live_keys(self, visible: torch.Tensor) -> IntervalMask:
        """`with_keys` by lifetimes of the keys alone: nothing is read from the device, and no interval is cut."""
        if self.tq is None:
            raise ValueError(_ANY)
        return self._living(key_lifetimes.joined(self._lifetime, key_lifetimes.of_keys(visible, self.tq)))

    def with_key_lifetime(self, key_start: torch.Tensor, key_stop: torch.Tensor) -> IntervalMask:
        """The same mask where row t sees key j only if key_start[j] <= t < key_stop[j]; int32 [B|1, H|1, Tk]."""
        if self.tk is None:
            raise ValueError(_ANY)
        checks.lifetime(key_start, key_stop, self.tk)
        return self._living((key_start.clone(), key_stop.clone()))

    @property
    def _lifetime(self) -> Lifetime:
        return key_lifetimes.of(self.key_start, self.key_stop)

    def _living(self, lifetime: Lifetime) -> IntervalMask:
        mask = self._copy()
        mask.key_start, mask.key_stop = (None, None) if lifetime is None else (x.contiguous() for x in lifetime)
        return mask

    def with_shift(self, shift: torch.Tensor) -> IntervalMask:
        """The same mask with a rotation of the query for every interval: int32, shaped as `starts` up to broadcasting."""
        starts, ends, tk = self._intervals("mask", lifetimes=True, shifts=True)
        return IntervalMask(starts, ends, tk=tk, key_start=self.key_start, key_stop=self.key_stop, shift=shift)

    # --- for kernels ----------------------------------------

    def bound(self, tq: int | None, tk: int | None) -> IntervalMask:
        """The mask with these sizes; itself if it has them.

        Raises:
            ValueError: if it has others.
        """
        if tq is None or tk is None:
            raise ValueError(_ANY)
        if self.tq is None:
            return self._plain(self.plain_causal, self.sink_tokens, self.window, tq, tk)  # type: ignore[arg-type]
        if (self.tq, self.tk) != (tq, tk):
            raise ValueError(f"mask: expected {tq} rows and {tk} keys, as q and k have, got {self.tq} and {self.tk}")
        return self

    def lower(self, tq: int, tk: int) -> tuple[Any, ...]:
        """(starts, ends, key_start, key_stop, sink_tokens, window, causal), as the operators take them.

        Raises:
            ValueError: if the mask has other sizes.
        """
        if self.tq is not None and (self.tq != tq or self.tk != tk):
            raise ValueError(f"mask: expected {tq} rows and {tk} keys, as q and k have, got {self.tq} and {self.tk}")
        if _DEBUG and self.starts is not None and self.ends is not None and not torch.compiler.is_compiling():
            checks.sorted_intervals(self.starts, self.ends, tk)
        return (self.starts, self.ends, self.key_start, self.key_stop, self.sink_tokens, self.window, self.plain_causal)

    def plan(self, per_slot: bool = False) -> list[torch.Tensor]:
        """Which tiles the kernels visit; see `tile_plan`. `per_slot`: for each interval alone [.., m, ..].

        Computed once, and again when `starts` or `ends` have been written to or exchanged.
        """
        if self.starts is None or self.ends is None or self.tk is None:
            raise ValueError("mask: expected one of intervals, got a plain one, which needs no plan")
        return plan_of(self.starts, self.ends, self.tk, per_slot)

    def materialize(
        self, tq: int | None = None, tk: int | None = None, device: torch.device | str | None = None
    ) -> IntervalMask:
        """The mask as intervals in tensors; itself if it is that already."""
        if self.starts is not None:
            return self if device is None else self.to(device)
        bound = self if self.tq is not None else self.bound(tq, tk)
        assert bound.tq is not None and bound.tk is not None
        if self.plain_causal:
            intervals = builders.sink(bound.tq, bound.tk, self.sink_tokens, self.window)
        else:
            intervals = builders.stack((torch.zeros(bound.tq, dtype=torch.int64), bound.tk))
        mask = self._of(intervals, bound.tk)._living(self._lifetime)
        return mask if device is None else mask.to(device)

    def to(self, device: torch.device | str) -> IntervalMask:
        """The mask with its tensors on another device."""
        mask = self._copy()
        for name in ("starts", "ends", "key_start", "key_stop", "shift"):
            tensor = getattr(self, name)
            setattr(mask, name, None if tensor is None else _counted(tensor.to(device)))
        return mask

    def _copy(self) -> IntervalMask:
        mask = IntervalMask.__new__(IntervalMask)
        mask.__dict__.update(self.__dict__)
        return mask

    def _intervals(
        self, name: str, lifetimes: bool = False, shifts: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        if self.tq is None:
            raise ValueError(f"{name}: expected a mask with sizes; give tq and tk to its builder")
        if self.key_start is not None and not lifetimes:
            raise ValueError(f"{name}: expected a mask without key lifetimes, which are not intervals of rows")
        if self.shift is not None and not shifts:
            raise ValueError(
                f"{name}: expected a mask without shift, which belongs to its intervals; give it to the result"
            )
        mask = self.materialize()
        assert mask.starts is not None and mask.ends is not None and mask.tk is not None
        return mask.starts, mask.ends, mask.tk

    # --- questions ----------------------------------------

    @property
    def num_intervals(self) -> int:
        """Intervals per row, m."""
        if self.starts is not None:
            return self.starts.shape[3]
        return 2 if self.sink_tokens > 0 and self.window >= 0 else 1

    def to_dense(self, tq: int | None = None, tk: int | None = None) -> torch.Tensor:
        """bool [B|1, H|1, Tq, Tk], True where a row sees a key. Sizes are needed where the mask has none."""
        mask = self.materialize(tq, tk)
        assert mask.starts is not None and mask.ends is not None and mask.tk is not None
        dense = algebra.contains(mask.starts, mask.ends, mask.tk)
        return dense & key_lifetimes.alive(mask._lifetime, torch.arange(dense.shape[2], device=dense.device))

    def is_causal(self) -> bool:
        """Whether no row sees a key behind its own position, whatever the key lifetimes."""
        if self.plain_causal or self.tq is None:
            return self.plain_causal
        starts, ends, tk = self._intervals("mask", lifetimes=True, shifts=True)
        stop = torch.arange(self.tq, device=ends.device)[:, None] + 1 + tk - self.tq
        return bool(((starts >= ends) | (ends <= stop)).all())

    def is_closed(self, lo: int, hi: int) -> bool:
        """Whether tokens [lo, hi) see only each other.

        Then, by induction over the layers, their hidden states do not depend on any other token, and their keys and values may be
        kept whatever happens to the rest. For self attention, Tq = Tk.

        Raises:
            ValueError: if the mask has no sizes, Tq != Tk, or lo, hi are out of range.
        """
        starts, ends, tk = self._intervals("mask", lifetimes=True, shifts=True)
        if self.tq != tk:
            raise ValueError(f"mask: expected one of self attention, as many rows as keys, got {self.tq} and {tk}")
        if not 0 <= lo <= hi <= tk:
            raise ValueError(f"lo, hi: expected 0 <= lo <= hi <= {tk}, got {lo} and {hi}")
        return key_lifetimes.closed(starts, ends, self._lifetime, tk, lo, hi)

    def to_mask_mod(self) -> Callable[..., torch.Tensor]:
        """The mask as `mask_mod(b, h, q, kv)` of FlexAttention. Needs sizes."""
        starts, ends, _ = self._intervals("mask", lifetimes=True, shifts=True)
        return interop.mask_mod(starts, ends, self.key_start, self.key_stop)

    def to_flashmask(self) -> torch.Tensor:
        """The mask as FlashMask's startend_row_indices (arXiv 2410.01359): int32 [B|1, H|1, Tk, 4], for causal=False.

        For every key (LTS, LTE, UTS, UTE): rows [LTS, LTE) and [UTS, UTE) do not see it.

        Raises:
            ValueError: if some key is hidden from more than two runs of rows.
        """
        if self.tq is None:
            raise ValueError(_ANY)
        return interop.flashmask(self)

    def __repr__(self) -> str:
        sizes = f"tq={self.tq}, tk={self.tk}"
        if self.starts is None:
            kind = f"sink_tokens={self.sink_tokens}, window={self.window}, " if self.window >= 0 else ""
            text = f"causal={self.plain_causal}, {kind}{sizes}"
        else:
            text = f"{sizes}, intervals={list(self.starts.shape)}"
        more = [n for n in ("key_start", "shift") if getattr(self, n) is not None]
        return f"IntervalMask({', '.join([text, *more])})"


def _counted(x: torch.Tensor) -> torch.Tensor:
    """`x`, contiguous, with a version counter, by which `plan` sees that it was written to: inference tensors have none."""
    if torch.compiler.is_compiling() or not x.is_inference():
        return x.contiguous()
    with torch.inference_mode(False):
        return x.clone(memory_format=torch.contiguous_format)
