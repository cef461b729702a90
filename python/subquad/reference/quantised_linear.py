r"""Weights in few bits, and the product with them.

A row of K weights is cut into groups of 32. Group g has codes $c$, a scale $d_g$ and, in one format, a minimum $m_g$, fp16:

$$ w_i = d_g c_i \;\text{(int8)}, \quad d_g (c_i - 8) \;\text{(int4)}, \quad d_g c_i + m_g \;\text{(int4\_min)},
   \qquad y = x W^\top + b . $$

These are the numbers of the GGUF blocks Q8_0, Q4_0 and Q4_1. In memory a row is one run of bytes: its codes, its scales, its
minima. Four bits: byte j of a group's 16 holds element j in its low half and element j + 16 in its high one, as in GGUF.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ._common import upcast

GROUP = 32


@dataclass(frozen=True)
class Format:
    """How a group of 32 weights is stored: `bits` a code, then one fp16 scale, then, if it has one, an fp16 minimum."""

    bits: int
    minimum: bool
    gguf: str

    @property
    def code_bytes(self) -> int:
        """Of a group."""
        return GROUP * self.bits // 8

    @property
    def group_bytes(self) -> int:
        """Of a group, with its scale and minimum."""
        return self.code_bytes + (4 if self.minimum else 2)


FORMATS = {"int8": Format(8, False, "Q8_0"), "int4": Format(4, False, "Q4_0"), "int4_min": Format(4, True, "Q4_1")}


def quantise(weight: torch.Tensor, format: str) -> torch.Tensor:
    """uint8 [N, K / 32 * group_bytes] of weight [N, K], finite.

    Scales are rounded away from 0 and codes are chosen for the rounded scale, so that no code is clipped but one: the opposite
    of an extreme in int4, whose codes reach from -8 to 7. |w - w'| <= d / 2 but there, where it is d.
    """
    kind = FORMATS[format]
    groups = weight.detach().double().unflatten(-1, (-1, GROUP))
    minimum = None
    if format == "int8":
        scale = _half_beyond(groups.abs().amax(-1) / 127)
        codes = _divide(groups, scale)
    elif format == "int4":
        extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
        scale = _half_beyond(extreme / -8)
        codes = (_divide(groups, scale) + 8).clamp(max=15)
    else:
        least = groups.amin(-1)
        minimum = torch.where(least < 0, _half_beyond(least), _half_within(least))
        scale = _half_beyond((groups.amax(-1) - minimum.double()) / 15)
        codes = _divide(groups - minimum.double().unsqueeze(-1), scale)
    codes = codes.to(torch.int16)
    if kind.bits == 4:
        low, high = codes.unflatten(-1, (2, 16)).unbind(-2)
        codes = low | high << 4
    return pack((codes & 0xFF).to(torch.uint8), scale, minimum)


def pack(codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None) -> torch.Tensor:
    """The bytes of rows: codes uint8 [N, G, code_bytes], scale and minimum fp16 [N, G]."""
    parts = [codes.flatten(-2), scale.contiguous().view(torch.uint8)]
    if minimum is not None:
        parts.append(minimum.contiguous().view(torch.uint8))
    return torch.cat(parts, dim=-1)


def unpack(weight: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(codes int16 [N, G, 32], scale fp16 [N, G], minimum fp16 [N, G] or None) of the bytes of rows."""
    kind = FORMATS[format]
    groups = weight.shape[-1] // kind.group_bytes
    data, numbers = weight.split([groups * kind.code_bytes, groups * (kind.group_bytes - kind.code_bytes)], dim=-1)
    return integers(data, format), *halves(numbers, format)


def integers(data: torch.Tensor, format: str) -> torch.Tensor:
    """int16 [N, G, 32] of the codes of rows, [N, G * code_bytes]."""
    kind = FORMATS[format]
    data = data.unflatten(-1, (data.shape[-1] // kind.code_bytes, kind.code_bytes))
    raw = data.view(torch.int8) if kind.bits == 8 else torch.cat((data & 0xF, data >> 4), dim=-1)
    return raw.to(torch.int16)


def halves(data: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(scale, minimum or None) fp16 [N, G] of their bytes, one behind the other."""
    numbers = data.unflatten(-1, (data.shape[-1] // 2, 2)).clone(memory_format=torch.contiguous_format)
    numbers = numbers.view(torch.float16).squeeze(-1)
    if not FORMATS[format].minimum:
        return numbers, None
    scale, minimum = numbers.chunk(2, dim=-1)
    return scale, minimum


def dequantise(weight: torch.Tensor, format: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[N, K] of the bytes of rows, in float32 or float64, in which every product of a code and a scale is exact."""
    codes, scale, minimum = unpack(weight, format)
    return values(
        codes, scale.unsqueeze(-1), None if minimum is None else minimum.unsqueeze(-1), format, dtype
    ).flatten(-2)


def values(
    codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None, format: str, dtype: torch.dtype
) -> torch.Tensor:
    """What codes stand for, with scales and minima that broadcast to them."""
    found = (codes - 8 if format == "int4" else codes).to(dtype) * scale.to(dtype)
    return found if minimum is None else found + minimum.to(dtype)


def quantised_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, format: str
) -> torch.Tensor:
    """y [M, N] of x [M, K], weight uint8 [N, row bytes], bias [N]."""
    wide = upcast(x)
    return F.linear(wide, dequantise(weight, format, wide.dtype), None if bias is None else upcast(bias)).to(x.dtype)


def _half_beyond(x: torch.Tensor) -> torch.Tensor:
    """fp16 of the least magnitude that is not below |x|, with the sign of x."""
    magnitude = x.abs()
    half = magnitude.half()
    bits = half.view(torch.int16) + (half.double() < magnitude).to(
        torch.int16
    )  # neighbours in order have bits in order
    return bits.view(torch.float16).copysign(x.half())


def _half_within(x: torch.Tensor) -> torch.Tensor:
    """fp16 of the largest magnitude that is not above x, which is not negative."""
    half = x.half()
    return (half.view(torch.int16) - (half.double() > x).to(torch.int16)).view(torch.float16)


def _divide(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Rounded quotients, 0 where the scale is."""
    wide = scale.double().unsqueeze(-1)
    return torch.where(wide == 0, 0.0, x / wide).round()
