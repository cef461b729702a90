r"""The CATS gated MLP on weights in few bits.

The formula is that of `cats_mlp`; the weights are those of `quantised_linear`, all three neuron by neuron: row i of the down
projection holds its column i, so that an inactive neuron is not read. Its groups lie either along that row, or, as in a GGUF
file, along the neurons: then 32 neurons share the scales and minima of a block,

$$ W_d[c, i] = d_{\lfloor i / 32 \rfloor, c}\, q_{ic} + m_{\lfloor i / 32 \rfloor, c} . $$
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._common import upcast
from .cats_activation import activate, active_mask
from .cats_mlp import cats_mlp
from .quantised_linear import FORMATS, GROUP, dequantise, halves, integers, unpack, values


def dequantise_down(
    w_down: torch.Tensor, format: str, down_scales: torch.Tensor | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """[I, H] of the down projection, neuron by neuron: rows of `quantised_linear`, or codes alone [I, H / 32 * code bytes] with
    the bytes of the scales, and behind them of the minima, of 32 neurons each: [I / 32, 2 H or 4 H]."""
    if down_scales is None:
        return dequantise(w_down, format, dtype)
    codes = integers(w_down, format).flatten(-2).unflatten(0, (down_scales.shape[0], GROUP))
    scale, minimum = halves(down_scales, format)
    least = None if minimum is None else minimum.unsqueeze(1)
    return values(codes, scale.unsqueeze(1), least, format, dtype).flatten(0, 1)


def by_neuron(rows: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scales) as `dequantise_down` takes them, of a down projection [H, I / 32 * group bytes] in rows along the neurons.

    The same numbers in the same number of bytes: nothing is rounded.
    """
    codes, scale, minimum = unpack(rows, format)
    across = codes.flatten(-2).t().unflatten(-1, (rows.shape[0] // GROUP, GROUP))  # [I, H / 32, 32]
    if FORMATS[format].bits == 4:
        low, high = across.unflatten(-1, (2, GROUP // 2)).unbind(-2)
        across = low | high << 4
    numbers = [x.t().contiguous().view(torch.uint8) for x in (scale, minimum) if x is not None]
    return (across & 0xFF).to(torch.uint8).flatten(-2).contiguous(), torch.cat(numbers, dim=-1)


def quantised_cats_mlp(
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    threshold: torch.Tensor,
    *,
    formats: tuple[str, str, str],
    down_scales: torch.Tensor | None = None,
    b_gate: torch.Tensor | None = None,
    b_up: torch.Tensor | None = None,
    b_down: torch.Tensor | None = None,
    activation: str = "silu",
    inclusive: bool = False,
    mask_mode: str = "token",
    grad: str = "masked",
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y [N, H], mask bool [N, I]) of x [N, H], w_gate and w_up uint8 [I, row bytes], threshold [] or [1] or [I].

    `mask` [N, I] replaces the threshold test, so that a kernel can be judged with the mask it took itself.
    """
    wide = upcast(x)
    gate, up = (dequantise(w, format, wide.dtype) for w, format in zip((w_gate, w_up), formats, strict=False))
    down = dequantise_down(w_down, formats[2], down_scales, wide.dtype)
    if mask is None:
        z = F.linear(wide.detach(), gate, None if b_gate is None else upcast(b_gate.detach()))
        mask = active_mask(activate(z, activation), threshold, inclusive)
        if mask_mode == "union":
            mask = mask.any(0, keepdim=True).expand_as(mask)
    biases = {"b_gate": b_gate, "b_up": b_up, "b_down": b_down}
    options = {"activation": activation, "inclusive": inclusive, "mask_mode": mask_mode, "grad": grad}
    y = cats_mlp(wide, gate, up, down.t(), threshold, **biases, **options, mask=mask)  # type: ignore[arg-type]
    return y.to(x.dtype), mask
