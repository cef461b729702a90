"""Which tokens of a call are real and which sequences they form, read off whatever a model is told about them.

The one place that knows the forms: masks in two dimensions, in four, of this package, by kind of layer, or absent; bounds of
packed sequences and positions that start again; caches that grow, that are preallocated, that slide.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from .. import _checks
from .._derived import Derived, versioned
from .._packing import Packed
from ..masks import IntervalMask
from ..masks.additive import shown
from ..masks.model_mask import ModelMask

# What says where packed sequences begin: the package's own name and that of transformers' collators for flash attention.
BOUNDS = ("cu_seqlens", "cu_seq_lens_q")
TOLD = (*BOUNDS, "cu_seq_lens_k", "seq_idx", "position_ids")
# Of rotations and positions, which all layers of a model are given: the device is asked once.
_TOKENS, _RESTARTS = Derived(), Derived()
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of a call [B, T], the same object for all layers of a model that are told the same.

    Attributes:
        real: bool [B, T], False at padding; None: all are.
        begins: bool [B, T], True at real tokens that see nothing before them: packed sequences begin there. None: nowhere.
        packed: the bounds themselves, where B = 1 and all that is known is these.
    """

    real: torch.Tensor | None = None
    begins: torch.Tensor | None = None
    packed: Packed | None = None
    _made: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, from the first layer that asks for this key; a graph, which has no repetitions, asks every time.

        Args:
            key: what the result depends on beside the tokens.
            make: computes it; it must not refer to the rotation that `read` was given.
        """
        if torch.compiler.is_compiling():
            return make()
        if key not in self._made:
            self._made[key] = make()
        result: T = self._made[key]
        return result

    def __getitem__(self, columns: slice) -> Tokens:
        real, begins = (None if x is None else x[:, columns] for x in (self.real, self.begins))
        return Tokens(real, begins)


def sliding_window(attention: nn.Module) -> int | None:
    """The window of an attention layer of transformers: some keep it in their config only, or have it without sliding."""
    if getattr(attention, "is_sliding", None) is False:
        return None
    config = getattr(attention, "config", None)
    window: int | None = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    return window


def chunk_size(attention: nn.Module) -> int | None:
    """The chunks of an attention layer of transformers (Llama 4), outside of which it sees nothing; None for one without."""
    config = getattr(attention, "config", None)
    size: int | None = getattr(config, "attention_chunk_size", None)
    kinds, index = getattr(config, "layer_types", None), getattr(attention, "layer_idx", None)
    return size if kinds is None or index is None or kinds[index] == "chunked_attention" else None


def keys_of(
    mask: Any, tokens: Tokens, length: int, keys: int, seen: int | torch.Tensor | None = None
) -> torch.Tensor | None:
    """Which of the keys, those of earlier calls among them, are tokens by the mask of a call: bool [B|1, keys]; None: all.

    Args:
        mask: see `read`, which has checked it; keys that it has no columns for are no tokens.
        tokens: what `read` made of it.
        length, keys: T and N, the columns of a preallocated cache among them.
        seen: positions before these; None without a cache.

    Raises:
        ValueError: a mask without columns for what a cache has seen.
    """
    mask = of_one_kind(mask)
    if mask is None or (isinstance(mask, ModelMask) and mask.padded_causal and mask.padding is None):
        return None
    if isinstance(mask, ModelMask) and mask.padded_causal:
        assert mask.padding is not None
        columns = mask.padding
    elif isinstance(mask, IntervalMask):
        columns = _seen_by(mask.to_dense(), tokens)
    elif mask.dim() == 2:
        columns = mask.bool()
    else:
        columns = _seen_by(mask, tokens)
    least = length + (seen if isinstance(seen, int) else 0)
    if columns.shape[1] < least:
        raise ValueError(f"attention_mask: expected a column for each of {least} keys, got {columns.shape[1]}")
    if seen is None:
        return columns[:, columns.shape[1] - keys :]
    missing = keys - columns.shape[1]
    return nn.functional.pad(columns, (0, missing)) if missing > 0 else columns[:, :keys]


def _seen_by(mask: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """Columns that some token sees, bool [B|1, >= T], of a mask in four dimensions."""
    visible = _visible(mask)[:, 0]
    return (visible if tokens.real is None else visible & tokens.real[..., None]).any(1)


def firsts_of(tokens: Tokens, length: int) -> torch.Tensor | None:
    """The column in which the sequence of every token begins, int32 [B or 1, T]; None where each row is one sequence."""
    if tokens.packed is not None:
        return tokens.packed.int32[tokens.packed.sequence.long()][None]
    if tokens.begins is None:
        return None
    place = torch.arange(length, device=tokens.begins.device)
    begun = torch.where(tokens.begins, place, -1).cummax(1).values
    earliest = 0 if tokens.real is None else tokens.real.int().argmax(1, keepdim=True)
    return torch.where(begun < 0, earliest, begun).int()


def refuse_packed(tokens: Tokens, fresh: torch.Tensor | None = None) -> None:
    """ValueError for sequences that begin behind others in a row, which a cache would take for one.

    `fresh`: bool [B], rows without a past; None: that is not to be looked at.
    """
    packed, begins = tokens.packed is not None and tokens.packed.sequences > 1, tokens.begins
    if begins is not None:
        real = torch.ones_like(begins) if tokens.real is None else tokens.real
        first = real.cumsum(1) == 1
        packed = bool((begins & ~(first if fresh is None else first & fresh[:, None])).any())
    if packed:
        raise ValueError("past_key_values: expected None with packed sequences, which a cache cannot tell apart")


def tokens_of(
    mask: Any, batch: int, length: int, window: int | None = None, seen: int | torch.Tensor | None = None
) -> torch.Tensor | None:
    """`Tokens.real` of `read`."""
    return read(mask, batch, length, window, seen).real


def padding_of(mask: Any, batch: int, length: int, seen: int | torch.Tensor | None = None) -> torch.Tensor | None:
    """`Tokens.real` of any attention, causal or not: a token is real where it sees itself."""
    mask = of_one_kind(mask)
    if isinstance(mask, IntervalMask) and not (isinstance(mask, ModelMask) and mask.padded_causal):
        mask = mask.to_dense(*(() if mask.tq is not None else (length, length)))
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        return read(mask, batch, length, None, seen).real
    _check_pairs(mask, batch, length)
    own = columns_of(seen, length, mask.shape[3], mask.device)
    return _visible(mask)[:, 0, :, own].diagonal(0, 1, 2).expand(batch, -1)


def read(
    mask: Any,
    batch: int,
    length: int,
    window: int | None = None,
    seen: int | torch.Tensor | None = None,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    **told: Any,
) -> Tokens:
    """The tokens of the current `length` positions, from any mask that a causal model is given.

    The rotation stands for the call of a model, which makes one for all layers: what the first layer finds serves those after it.
    It is kept no longer than the rotation, and used where all arguments are the same and nothing has been written to; not for
    tensors of inference mode, which do not tell, and on a GPU not beside a `seen` that is a tensor, of which each layer has one.

    Args:
        mask: see `LawcatAttention.forward`.
        batch, length: B and T.
        window: of the sliding window that the mask may have, since linear attention does not need it.
        seen: positions before these; None without a cache. A preallocated cache has columns for later ones, a sliding one lacks
            those of the first.
        position_embeddings: (cos, sin) as the model has them, or None.
        told: what else a model tells its layers, of which `TOLD` are read; `output_attentions` is refused. As in transformers,
            positions that do not go on begin a sequence where there is neither a mask nor a cache; otherwise those that start
            from 0 do, where there is no padding.

    Raises:
        TypeError: something that is no mask.
        ValueError: a mask of another shape, or that is not causal with padding or packed sequences.
    """
    if told.get("output_attentions"):
        raise ValueError("output_attentions: there is no matrix of weights; expected False, got True")
    mask = of_one_kind(mask)
    if isinstance(mask, ModelMask) and mask.mix is not None:
        raise ValueError("attention_mask: this layer cannot attend to tokens that lie on several ranks")
    cos = position_embeddings[0] if isinstance(position_embeddings, tuple | list) and position_embeddings else None
    if not isinstance(cos, torch.Tensor) or torch.compiler.is_compiling():
        return _read(mask, batch, length, window, seen, told)
    parts = vars(mask).values() if isinstance(mask, IntervalMask) else ()
    known = int(seen) if isinstance(seen, torch.Tensor) and _checks.readable(seen) else seen
    key = versioned(batch, length, window, known, *(told.get(name) for name in TOLD), mask, *parts)
    make = partial(_read, mask, batch, length, window, seen, told)
    return make() if key is None else _TOKENS.get(cos, key, make)


def _read(
    mask: Any, batch: int, length: int, window: int | None, seen: int | torch.Tensor | None, told: dict[str, Any]
) -> Tokens:
    if isinstance(mask, IntervalMask):
        tokens = _of_intervals(mask, batch, length, window, seen)
    elif mask is None:
        tokens = Tokens()
    elif not isinstance(mask, torch.Tensor):
        raise TypeError(f"attention_mask: expected a tensor or a mask of the model, got {type(mask).__name__}")
    elif mask.dim() == 2:
        tokens = Tokens(_of_columns(mask, batch, length, seen))
    else:
        tokens = _of_pairs(mask, batch, length, window, seen)
    return _with_bounds(tokens, batch, length, seen, told, masked=mask is not None)


def of_one_kind(mask: Any) -> Any:
    """One of the masks that a model has by kind of layer: all show the same tokens, the widest most of them."""
    if not isinstance(mask, Mapping):
        return mask
    kinds = [mask[kind] for kind in ("full_attention", *mask) if mask.get(kind) is not None]
    return kinds[0] if kinds else None


def columns_of(seen: int | torch.Tensor | None, length: int, width: int, device: torch.device) -> slice | torch.Tensor:
    """Which of a mask's columns are those of the current positions: after what was seen, or the last ones."""
    if isinstance(seen, torch.Tensor):
        return torch.arange(length, device=device) + seen.to(device).clamp_max(width - length)
    past = width - length if seen is None else min(seen, width - length)
    return slice(past, past + length)


def _of_columns(mask: torch.Tensor, batch: int, length: int, seen: int | torch.Tensor | None) -> torch.Tensor:
    if mask.shape[0] != batch or mask.shape[1] < length:
        raise ValueError(f"attention_mask: expected shape [{batch}, >= {length}], got {list(mask.shape)}")
    if mask.is_floating_point() and not torch.compiler.is_compiling() and bool((mask < 0).any()):
        raise ValueError("attention_mask: expected 0 or 1 in two dimensions, got negative numbers")
    return mask[:, columns_of(seen, length, mask.shape[1], mask.device)].bool()


def _of_intervals(
    mask: IntervalMask, batch: int, length: int, window: int | None, seen: int | torch.Tensor | None
) -> Tokens:
    if not isinstance(mask, ModelMask):
        raise ValueError("attention_mask: expected a causal mask of the model, got another IntervalMask")
    if not mask.padded_causal:
        return _of_pairs(mask.to_dense(), batch, length, window, seen)
    padding, ids = mask.padding, getattr(mask, "sequence_ids", None)
    first = 0 if mask.first_row is None else mask.first_row
    real, ids = (
        None if x is None else x[:, columns_of(first, length, x.shape[1], x.device)].expand(batch, -1)
        for x in (padding, ids)
    )
    if ids is None or length == 1 or (torch.compiler.is_compiling() and seen is not None):  # those come without a cache
        return Tokens(real)
    return Tokens(real, _apart(ids, real))


def _of_pairs(
    mask: torch.Tensor, batch: int, length: int, window: int | None, seen: int | torch.Tensor | None
) -> Tokens:
    """From which position sees which, in four dimensions. A row that is padding may see anything."""
    _check_pairs(mask, batch, length)
    visible = _visible(mask)
    compiling = torch.compiler.is_compiling()
    if isinstance(seen, torch.Tensor) and length > 1 and not compiling:
        seen = int(seen)
    own = columns_of(seen, length, mask.shape[3], mask.device)
    before = None
    if isinstance(own, slice) and own.start and window is None and not compiling:
        before = visible[:, 0, :, : own.start].any(-1)  # whether a row sees something of the past
    visible = visible[..., own]
    real = visible[:, 0].diagonal(0, 1, 2)
    if length == 1 or (compiling and seen is not None):  # nothing to compare; packed rows come without a cache
        return Tokens(real.expand(batch, -1))
    place, previous = torch.arange(length, device=mask.device), _before(real)
    sees = visible[:, 0].gather(2, previous.clamp_min(0)[..., None])[..., 0]
    begins = real & (previous >= 0) & ~sees
    if window is not None:
        begins = begins & (place - previous < window)
    if before is not None and seen:
        begins = begins | (real & (previous < 0) & ~before)
    if not compiling:
        sequence = begins.cumsum(1)
        want = (place <= place[:, None]) & real[:, None] & (sequence[:, :, None] == sequence[:, None])
        fitting = [want] if window is None else [want, want & (place > place[:, None] - window)]
        lost = seen is None and not bool(real.any())  # tokens stand in other columns than the last
        if lost or not any(bool(((visible == x[:, None]) | ~real[:, None, :, None]).all()) for x in fitting):
            raise ValueError(
                "attention_mask: expected a causal mask with padding or packed sequences, got another pattern"
            )
    return Tokens(real.expand(batch, -1), begins.expand(batch, -1))


def _check_pairs(mask: torch.Tensor, batch: int, length: int) -> None:
    if mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[2] != length or mask.shape[3] < length:
        raise ValueError(f"attention_mask: expected [B, 1, {length}, >= {length}] or [B, T], got {list(mask.shape)}")


def _visible(mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype is torch.bool:
        return mask
    if not mask.is_floating_point():
        raise ValueError(f"attention_mask: expected bool or float in four dimensions, got {mask.dtype}")
    return shown(mask)


# --- packed sequences ----------------------------------------


def _with_bounds(
    tokens: Tokens, batch: int, length: int, seen: int | torch.Tensor | None, told: dict[str, Any], masked: bool
) -> Tokens:
    """What bounds and positions add to what the mask says."""
    real, begins = tokens.real, tokens.begins
    name = next((name for name in BOUNDS if told.get(name) is not None), None)
    ids: torch.Tensor | None = None
    if name is not None:
        packed = _bounds(name, told, batch, length)
        if seen is not None and not torch.compiler.is_compiling() and int(seen):
            raise ValueError(f"{name}: expected None once the cache has seen tokens, here {int(seen)}")
        if real is None and begins is None:
            return Tokens(packed=packed)
        ids = packed.sequence[None]
    elif told.get("seq_idx") is not None:
        ids = told["seq_idx"]
        if ids.shape != (batch, length):
            raise ValueError(f"seq_idx: expected shape [{batch}, {length}], got {list(ids.shape)}")
    else:
        ids = restarts(told.get("position_ids"), real, length, anywhere=not masked and seen is None)
        if ids is not None and seen is not None and torch.compiler.is_compiling():
            _checks.hold(
                ~ids.any(),
                "position_ids: expected numbers that go on with a cache where a graph is compiled, got some that begin again",
            )
            ids = None
    if ids is not None:
        apart = _apart(ids, real)
        begins = apart if begins is None else begins | apart
    if begins is not None and torch.compiler.is_compiling():
        if seen is not None:
            raise ValueError(f"{name or 'seq_idx'}: expected None with a cache and a mask where a graph is compiled")
    elif begins is not None and not bool(begins.any()):
        begins = None
    return Tokens(real, None if begins is None else begins.expand(batch, -1))


def _bounds(name: str, told: dict[str, Any], batch: int, length: int) -> Packed:
    cu = told[name]
    if batch != 1:
        raise ValueError(f"{name}: expected None with a batch of {batch}, for sequences are packed into a batch of 1")
    device = cu.int64.device if isinstance(cu, Packed) else getattr(cu, "device", None)
    x = torch.empty(batch, length, 0, device=device)
    try:
        packed = Packed.remembered(cu, x)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("cu_seqlens", name)) from None
    other = told.get("cu_seq_lens_k") if name == "cu_seq_lens_q" else None
    if other is None or other is cu or torch.compiler.is_compiling():
        return packed
    if other.shape != cu.shape or not bool((other == cu).all()):
        raise ValueError("cu_seq_lens_k: expected the bounds of cu_seq_lens_q, got others")
    return packed


def restarts(positions: Any, real: torch.Tensor | None, length: int, anywhere: bool) -> torch.Tensor | None:
    """The sequence of every token, int64 [B|1, T], by positions that do not go on: anywhere, or from 0 where there is no padding.

    Rows whose positions never count on, all zeros for example, say nothing about sequences. None: each row is one. Compiled code
    cannot ask for that, and gets zeros.
    """
    if not isinstance(positions, torch.Tensor) or positions.dim() != 2 or positions.shape[1] != length or length == 1:
        return None
    compiling = torch.compiler.is_compiling()
    if not anywhere and not compiling and real is not None and not bool(real.all()):
        return None

    def make() -> torch.Tensor | None:
        goes_on = positions == positions.roll(1, 1) + 1
        restart = _but_first(~goes_on)
        if not anywhere:
            restart = restart & (positions == 0) & _but_first(goes_on).any(1, keepdim=True)
            if compiling and real is not None:
                restart = restart & real.all()
        return restart.cumsum(1) if compiling or bool(restart.any()) else None

    return _RESTARTS.get(positions, (anywhere,), make)


def _apart(ids: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Real tokens of another sequence than the real token before them, bool [B, T]."""
    if real is None:
        return _but_first(ids != ids.roll(1, 1))
    previous, ids = _before(real), ids.expand(real.shape)
    return real & (previous >= 0) & (ids.gather(1, previous.clamp_min(0)) != ids)


def _but_first(x: torch.Tensor) -> torch.Tensor:
    """x [B, T] without its first column. Sizes stay T, which an export may know nothing about."""
    return x & (torch.arange(x.shape[1], device=x.device) > 0)


def _before(real: torch.Tensor) -> torch.Tensor:
    """The position of the real token before each one, int64 [B, T]; -1 where there is none. Sizes stay T, as of `_but_first`."""
    place = torch.arange(real.shape[1], device=real.device)
    return torch.where(place > 0, torch.where(real, place, -1).cummax(1).values.roll(1, 1), -1)
