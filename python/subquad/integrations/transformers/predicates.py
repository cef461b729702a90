"""What a mask function of transformers means.

The library describes a mask by a predicate (batch, head, query, key) -> bool, composed of closures in one normal form: causal or
both ways; narrowed to a window or to chunks; widened by blocks of tokens that see each other; narrowed to the sequences of a
packed row. Asking it about every pair of positions costs T^2. But what a token sees is then one run of keys with its own among
them, up to the window; and where runs break, the predicate itself tells when it is asked about neighbours, in O(T).

So `recognised` only has to know that a predicate has this form. The closures are read for it, by the objects that the library
exports and by the qualified names of those that are made anew for each model. torch.compile cannot open closures that it makes
itself; there the keywords beside them tell, and that no function of a user's is among them (`use_vmap`). What is not exactly of
this form is not recognised, and a caller then asks the predicate about every pair; a library that changes its closures makes
masks slower, never wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ... import _checks

Predicate = Callable[..., Any]


@dataclass(frozen=True)
class Pattern:
    """The form of a predicate.

    Attributes:
        causal: whether no token sees one behind it, blocks apart.
        window: tokens up to its own that a token sees, or before its own (not causal); -1: all.
        ahead: tokens behind its own that a token sees, where it is not causal but has a window.
        cut: whether the window cuts blocks too, which otherwise reach beyond it.
        chunked: whether there are chunks.
        broken: whether there are sequences, chunks or blocks: runs that the predicate must be asked for.
        sequences: whether only packed sequences break it, and `apart` tells them.
        apart: the predicate, or the part of it, that is False across sequences.
        linear: whether it is causal but for a window and sequences, which linear attention can follow.
    """

    causal: bool = True
    window: int = -1
    ahead: int = -1
    cut: bool = False
    chunked: bool = False
    broken: bool = False
    apart: Predicate | None = None
    linear: bool = True


def recognised(function: Predicate | None, batch_size: int, length: int, keywords: dict[str, Any]) -> Pattern | None:
    """The pattern of a mask function over `batch_size` rows and `length` keys, or None; `keywords` came with it."""
    from transformers import masking_utils

    if function is None or function is masking_utils.causal_mask_function:
        return Pattern()
    if function is getattr(masking_utils, "bidirectional_mask_function", None):
        return Pattern(causal=False, linear=False)
    if torch.compiler.is_dynamo_compiling():
        return _told(function, keywords)
    return _read(function, batch_size, length, trusted=keywords.get("use_vmap") is False)


def _told(function: Predicate, keywords: dict[str, Any]) -> Pattern | None:
    """By the keywords that transformers gives a mask function beside the predicate."""
    if keywords.get("use_vmap", True):
        return None
    size = keywords.get("local_size")
    window = -1 if size is None else size
    if window == 0:
        return None
    if "allow_is_bidirectional_skip" in keywords:
        return Pattern(causal=False, window=window, ahead=window, linear=False)
    chunks = size is not None and getattr(keywords.get("config"), "attention_chunk_size", None) == size
    blocks = function.__qualname__.startswith("or_masks.")  # dynamo does not tell the module of its closures
    sequences = not chunks and not blocks and size != 1  # with a window of one, no token sees its neighbour
    return Pattern(window=window, broken=True, chunked=chunks, apart=function if sequences else None, linear=sequences)


def _read(function: Predicate, batch_size: int, length: int, trusted: bool) -> Pattern | None:
    """By the closures. `trusted`: the library has made all tables itself; else they are looked at, where that is possible."""
    packed, blocks, cut = None, False, None
    pair = _parts(function, "and_masks")
    if pair and _made_by(pair[1], "packed_sequence_mask_function"):
        function, packed = pair
        ids = _closed_over(packed)["packed_sequence_mask"]
        if ids.shape != (batch_size, length) or not _in_runs(ids, trusted):
            return None
    pair = _parts(function, "and_masks")
    if pair and _made_by(pair[1], "sliding_window_overlay") and _parts(pair[0], "or_masks"):
        function, cut = pair[0], _closed_over(pair[1])["sliding_window"]
    pair = _parts(function, "or_masks")
    if pair and _made_by(pair[1], "blockwise_overlay"):
        function, blocks = pair[0], True
        ids = _closed_over(pair[1])["block_sequence_ids"]
        if ids.shape[0] != batch_size or not _in_runs(torch.where(ids < 0, -1, ids), trusted, but=-1):
            return None
    if packed is not None and _made_by(function, "remap_positions_for_packed_sequence"):
        inside = _closed_over(function)
        if not _consecutive(inside["position_ids"], _closed_over(packed)["packed_sequence_mask"], trusted):
            return None
        function = inside["mask_function"]
    base = _base(function)
    if base is None:
        return None
    if blocks and (base.chunked or not base.causal or (cut is not None and base.window >= 0)):
        return None  # a block across the edge of a chunk hides it from neighbours, one beyond a window is cut by it
    window = base.window if cut is None else cut
    broken = packed is not None or blocks or base.chunked
    if broken and window == 0:
        return None  # a token does not see itself
    return replace(
        base, window=window, cut=cut is not None, broken=broken, apart=packed, linear=base.linear and not blocks
    )


def _base(function: Predicate) -> Pattern | None:
    """Causal or not, with a window or with chunks."""
    from transformers import masking_utils

    causal = function is masking_utils.causal_mask_function
    both_ways = getattr(masking_utils, "bidirectional_mask_function", None)
    if causal or function is both_ways:
        return Pattern(causal=causal, linear=causal)
    pair: tuple[Any, ...] = _parts(function, "and_masks") or ()
    base = next((part for part in pair if part in (masking_utils.causal_mask_function, both_ways)), None)
    if base is None:
        return None
    narrowed = pair[0] if pair[1] is base else pair[1]
    inside = _closed_over(narrowed)
    if base is not both_ways:
        if _made_by(narrowed, "sliding_window_overlay"):
            return Pattern(window=inside["sliding_window"])
        return Pattern(chunked=True, linear=False) if _made_by(narrowed, "chunked_overlay") else None
    if _made_by(narrowed, "sliding_window_bidirectional_overlay"):
        return Pattern(False, inside["sliding_window"], inside["sliding_window"], linear=False)
    if _made_by(narrowed, "sliding_window_mask_function", "transformers.models."):
        return _uneven(inside["sliding_window"], inside.get("is_causal", False))
    return None


def _uneven(window: Any, causal: bool) -> Pattern | None:
    """A window of encoders with a number of tokens to each side: (left, own included; right, own included) or both together."""
    if isinstance(window, int):
        left, right = (window, 0) if causal else ((window + 1) // 2, window // 2 + 1)
    else:
        left, right = window
    return Pattern(False, left - 1, max(right - 1, 0), linear=False) if left > 0 else None


# --- runs ----------------------------------------


def neighbours(
    function: Predicate, batch_size: int, first: int, count: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(behind, ahead) bool [B, count]: whether the token at each of these positions sees the one before it, the one after it.

    What the first is said to see before it, and the last after it, means nothing.
    """
    batch = torch.arange(batch_size, device=device)[:, None]
    head = torch.zeros_like(batch)
    place = torch.arange(count, device=device)[None]
    seen = (
        function(batch, head, place + first, other.clamp(0, count - 1) + first).expand(batch_size, count)
        for other in (place - 1, place + 1)
    )
    return next(seen), next(seen)


def run_starts(joined: torch.Tensor) -> torch.Tensor:
    """Where the run of each place begins; `joined` [B, n]: it belongs to the run of the place before, if there is one."""
    place = torch.arange(joined.shape[-1], device=joined.device)
    return torch.where(joined, 0, place).cummax(-1).values


def run_stops(joined: torch.Tensor) -> torch.Tensor:
    """One past the end of the run of each place; `joined` [B, n]: it belongs to the run of the place after, if there is one."""
    count = joined.shape[-1]
    place = torch.arange(count, device=joined.device)
    return torch.where(joined, count, place + 1).flip(-1).cummin(-1).values.flip(-1)


def _in_runs(ids: torch.Tensor, trusted: bool, but: int | None = None) -> bool:
    """Whether equal numbers of a row stand side by side, those equal to `but` apart."""
    if _checks.traced(ids):
        return trusted
    ordered = ids.sort(-1).values
    begins, kinds = (x[:, 1:] != x[:, :-1] for x in (ids, ordered))
    if but is not None:
        begins, kinds = begins & (ids[:, 1:] != but), kinds & (ordered[:, 1:] != but)
        begins = torch.cat([ids[:, :1] != but, begins], 1)
        kinds = torch.cat([ordered[:, :1] != but, kinds], 1)
    return bool((begins.sum(-1) == kinds.sum(-1)).all())


def _consecutive(positions: torch.Tensor, ids: torch.Tensor, trusted: bool) -> bool:
    """Whether positions count on within each sequence."""
    if positions.shape != ids.shape:
        return False
    if _checks.traced(ids):
        return trusted
    return bool(((positions.diff(dim=-1) == 1) | (ids.diff(dim=-1) != 0)).all())


# --- closures ----------------------------------------


def _made_by(function: Predicate, factory: str, module: str = "transformers.masking_utils") -> bool:
    """Whether it is a closure of this function, of a module whose name begins so."""
    ours = getattr(function, "__module__", "").startswith(module)
    return ours and getattr(function, "__qualname__", "").startswith(f"{factory}.<locals>.")


def _parts(function: Predicate, factory: str) -> tuple[Predicate, Predicate] | None:
    """The two functions that `and_masks` or `or_masks` has joined."""
    if not _made_by(function, factory):
        return None
    parts = _closed_over(function).get("mask_functions", ())
    return parts if len(parts) == 2 else None


def _closed_over(function: Predicate) -> dict[str, Any]:
    """The variables that a function was closed over, by name."""
    code = getattr(function, "__code__", None)
    cells = getattr(function, "__closure__", None) or ()
    return {} if code is None else {n: c.cell_contents for n, c in zip(code.co_freevars, cells, strict=True)}
