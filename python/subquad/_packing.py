"""Sequences packed one after the other into a batch of one: their bounds, checked and converted once."""

from __future__ import annotations

from itertools import pairwise

import torch

from . import _checks
from ._derived import Derived


def bounds(name: str, value: object, tokens: int | None = None) -> torch.Tensor:
    """`value` is bounds of sequences, int32 or int64 [N + 1]: 0 first, never decreasing, `tokens` last where it is given."""
    cu = _checks.integers(name, value)
    if cu.dim() != 1 or cu.shape[0] < 1:
        raise ValueError(f"{name}: expected shape [N + 1], got {list(cu.shape)}")
    if _checks.readable(cu):
        numbers = cu.tolist()
        last = numbers[-1] if tokens is None else tokens
        if numbers[0] != 0 or numbers[-1] != last or any(a > b for a, b in pairwise(numbers)):
            got = _checks.shown(numbers)
            raise ValueError(f"{name}: expected numbers from 0 to {last} that do not decrease, got {got}")
    return cu


class Packed:
    """N sequences in one row of T tokens; what `cu_seqlens` of the ops and layers may be instead of a tensor.

    Made once for a batch and given to every layer, it spares them the checks and the conversions, which ask the device for
    values or launch kernels. The layers of this package do so by themselves with the tensor that a model hands through.

    Attributes:
        tokens: T.
        sequences: N.
        int32, int64: the bounds [N + 1], contiguous.
        sequence: int32 [T], the sequence of every token.

    Args:
        cu_seqlens: int32 or int64 [N + 1], the bounds of the sequences: 0 first, T last, never decreasing (empty sequences are
            allowed). On a GPU the values are checked under SUBQUAD_DEBUG=1 only.
        tokens: T; None for the last bound, which on a GPU waits for the device.

    Raises:
        TypeError: not a tensor of int32 or int64.
        ValueError: another shape, or other values.

    Example:
        >>> import torch, subquad
        >>> packed = subquad.Packed(torch.tensor([0, 3, 3, 5]))
        >>> packed.sequences, packed.tokens, packed.sequence.tolist()
        (3, 5, [0, 0, 0, 2, 2])
    """

    def __init__(self, cu_seqlens: torch.Tensor, tokens: int | None = None) -> None:
        cu = bounds("cu_seqlens", cu_seqlens, tokens)
        tokens = int(cu[-1]) if tokens is None else tokens
        self.tokens, self.sequences = tokens, cu.shape[0] - 1
        # Copies: what happens to the argument later has nothing to do with this.
        self.int32, self.int64 = (cu.detach().to(t, copy=True).contiguous() for t in (torch.int32, torch.int64))
        place = torch.arange(tokens, device=cu.device, dtype=torch.int32)
        self.sequence = torch.searchsorted(self.int32, place, right=True, out_int32=True) - 1

    @classmethod
    def of(cls, cu_seqlens: torch.Tensor | Packed, x: torch.Tensor) -> Packed:
        """The bounds of the tokens of `x` [1, T, ...], which may have been looked at before.

        Raises:
            TypeError: neither a tensor of int32 or int64 nor a `Packed`.
            ValueError: x has a batch, another device or another number of tokens; bounds that are none.
        """
        batch, tokens = x.shape[:2]
        cu = cu_seqlens.int64 if isinstance(cu_seqlens, Packed) else cu_seqlens
        if isinstance(cu, torch.Tensor):
            _checks.same_device("cu_seqlens", cu, x.device)
        if batch != 1:
            raise ValueError(f"cu_seqlens: expected a batch of 1 with packed sequences, got {batch}")
        if isinstance(cu_seqlens, Packed):
            if cu_seqlens.tokens != tokens:
                raise ValueError(f"cu_seqlens: expected sequences of {tokens} tokens in all, got {cu_seqlens.tokens}")
            return cu_seqlens
        return cls(cu_seqlens, tokens)

    @classmethod
    def remembered(cls, cu_seqlens: torch.Tensor | Packed, x: torch.Tensor) -> Packed:
        """`of`, for the layers of a model, which are all given the same tensor: the first one's answer serves the others."""
        if isinstance(cu_seqlens, torch.Tensor):
            return cls.of(_REMEMBERED.get(cu_seqlens, (x.shape[1],), lambda: cls.of(cu_seqlens, x)), x)
        return cls.of(cu_seqlens, x)

    def __repr__(self) -> str:
        return f"Packed({self.sequences} sequences, {self.tokens} tokens)"


_REMEMBERED = Derived()  # of bounds: their `Packed`
