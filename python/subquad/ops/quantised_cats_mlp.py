"""The CATS gated MLP on quantised weights: kernels for a few tokens, products of rows for many tokens and for gradients."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from .. import _checks
from .._backends import backward_backend
from ..reference import quantised_cats_mlp as reference
from ..reference.cats_activation import ACTIVATIONS, activate, active_mask
from ..reference.cats_mlp import down_product
from ..reference.quantised_cats_mlp import dequantise_down
from ..reference.quantised_linear import FORMATS, GROUP
from . import _call
from ._autograd import once_differentiable, without_autocast
from .cats_activation import GRADS
from .cats_mlp import MASK_MODES, PREFILLS, few_tokens, not_finite, sparse_limit
from .quantised_linear import check_weight

_NAMES = tuple(FORMATS)
_BLOCK = 512  # neurons of a down projection with shared scales that are dequantised at a time


def quantised_cats_mlp(
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    threshold: float | torch.Tensor,
    *,
    format: str | tuple[str, str, str],
    down_scales: torch.Tensor | None = None,
    activation: str = "silu",
    inclusive: bool = False,
    mask_mode: str = "token",
    prefill: str = "masked",
    max_sparse_tokens: int | None = None,
    grad: str = "masked",
    b_gate: torch.Tensor | None = None,
    b_up: torch.Tensor | None = None,
    b_down: torch.Tensor | None = None,
    return_mask: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""`cats_mlp` with weights in groups of 32 codes: y = sum over {i : |s_i| > t_i} of s_i (x Wu^T)_i Wd[:, i], s = f(x Wg^T).

    Products are of the dequantised weights, accumulated in float32 and rounded once; of activations see `quantised_linear`. Up to
    `max_sparse_tokens` tokens without gradients only the codes of active neurons are read; beyond, blocks of dequantised rows are
    multiplied and the same mask is applied. Differentiable in x and the biases.

    Args:
        x: [..., H], float32, bfloat16 or float16 (float64 on the reference backend). Leading dimensions are tokens.
        w_gate, w_up: uint8 [I, H / 32 * group bytes], as `quantise` makes them.
        w_down: the transposed down projection [I, H], quantised in the same way, so that a row belongs to a neuron; with
            `down_scales` its codes alone, uint8 [I, H / 32 * code bytes].
        threshold: float, or float32 tensor [], [1] or [I]. Negative: dense. +inf: nothing but NaN is active.
        format: "int8", "int4" or "int4_min" of all three weights, or a triple of them for gate, up and down.
        down_scales: where 32 neurons share the scales of a channel, as in GGUF files: uint8 [I / 32, 2 H], the bytes of the fp16
            scales; "int4_min": [I / 32, 4 H], then those of the minima.
        activation, inclusive, mask_mode, prefill, max_sparse_tokens, grad: as in `cats_mlp`.
        b_gate, b_up, b_down: optional biases [I], [I], [H] in x's dtype.
        return_mask: also return which neurons were active.
        backend: "native", "triton", "reference", or None to choose.

    Returns:
        y [..., H] in x's dtype; with `return_mask` also the mask that was taken, bool [..., I]. Deterministic; on the sparse path
        with "token" masks a token's result does not depend on the others in the call.

    Raises:
        TypeError: wrong type, or dtypes that differ.
        ValueError: wrong shapes or devices, NaN threshold, unknown option, backend that cannot run.

    Example:
        >>> import torch, subquad
        >>> gate, up, down = (subquad.quantise(torch.randn(64, 32), "int4") for _ in range(3))
        >>> subquad.quantised_cats_mlp(torch.randn(1, 32), gate, up, down, 0.1, format="int4").shape
        torch.Size([1, 32])
    """
    at_once: tuple[torch.Tensor, torch.Tensor] | None = _call.at_once(
        "quantised_cats_mlp_fwd", backend, _arguments,
        x, w_gate, w_up, w_down, down_scales, threshold, b_gate, b_up, b_down,
        format, activation, inclusive, mask_mode, prefill, max_sparse_tokens, grad, return_mask,
    )  # fmt: skip
    if at_once is not None:
        return at_once if return_mask else at_once[0]
    x, b_gate, b_up, b_down = _call.autocast(x, b_gate, b_up, b_down)
    _checks.tensor("x", x)
    formats = _formats(format)
    neurons, hidden = _check_weights(x, w_gate, w_up, w_down, down_scales, formats)
    for name, value, size in (("b_gate", b_gate, neurons), ("b_up", b_up, neurons), ("b_down", b_down, hidden)):
        if value is not None:
            _checks.like(name, value, (size,), x, "x")
    if (on_parts := _call.on_parts("quantised_cats_mlp", x)) is not None:
        operands = {
            "x": x, "w_gate": w_gate, "w_up": w_up, "w_down": w_down, "threshold": threshold, "down_scales": down_scales,
            "b_gate": b_gate, "b_up": b_up, "b_down": b_down,
        }  # fmt: skip
        placed: torch.Tensor | tuple[torch.Tensor, torch.Tensor] = on_parts(
            operands, format=formats, activation=activation, inclusive=inclusive, mask_mode=mask_mode, prefill=prefill,
            max_sparse_tokens=max_sparse_tokens, grad=grad, return_mask=return_mask, backend=backend,
        )  # fmt: skip
        return placed
    t = _checks.threshold(threshold, neurons, x.device)
    code = _checks.choice("activation", activation, ACTIVATIONS)
    _checks.flag("inclusive", inclusive)
    _checks.flag("return_mask", return_mask)
    union = bool(_checks.choice("mask_mode", mask_mode, MASK_MODES))
    _checks.choice("prefill", prefill, PREFILLS)
    straight_through = bool(_checks.choice("grad", grad, GRADS))
    limit = sparse_limit(max_sparse_tokens)
    tokens = math.prod(x.shape[:-1])
    flat = x if x.dim() == 2 else x.reshape(tokens, hidden)
    if prefill == "dense" and tokens > limit:
        t = torch.full_like(t[:1], -1.0)

    def define(
        flat: torch.Tensor,
        w_gate: torch.Tensor,
        w_up: torch.Tensor,
        w_down: torch.Tensor,
        down_scales: torch.Tensor | None,
        t: torch.Tensor,
        b_gate: torch.Tensor | None,
        b_up: torch.Tensor | None,
        b_down: torch.Tensor | None,
        *_: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return reference.quantised_cats_mlp(
            flat, w_gate, w_up, w_down, t, formats=formats, down_scales=down_scales, b_gate=b_gate, b_up=b_up, b_down=b_down,
            activation=activation, inclusive=inclusive, mask_mode=mask_mode, grad=grad,
        )  # fmt: skip

    name = _call.choose("quantised_cats_mlp", x.device.type, backend, dtype=x.dtype)
    biases = (b_gate, b_up, b_down)
    codes = tuple(map(_NAMES.index, formats))
    arguments: tuple[Any, ...] = (flat, w_gate, w_up, w_down, down_scales, t, *biases, *codes, code, inclusive, union)
    training = torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in (x, *biases))
    kernels = name != "reference" and not _call.by_definition((x, *biases))
    mask: torch.Tensor | None
    if tokens == 0 or neurons == 0 or hidden == 0:
        y, mask = define(*arguments)
    elif kernels and (training or tokens > limit):
        _checks.not_double("x", x, name)
        for called, tensor in zip(("x", "b_gate", "b_up", "b_down"), (x, *biases), strict=True):
            if tensor is not None:
                _checks.memory(called, tensor)
        options: tuple[Any, ...] = (codes, hidden, code, inclusive, union, straight_through, *_products(x, backend))
        codes_of = (w_gate, w_up, w_down, down_scales)
        tensors: tuple[Any, ...] = (*(None if w is None else w.contiguous() for w in codes_of), t)
        layer = _Layer(*tensors, *options)
        with without_autocast(x.device.type):
            if training:
                y, z = _ManyTokens.apply(flat, *biases, *tensors, options)
            else:
                y, z, *_ = _many_tokens(layer, flat, *biases)
            if return_mask:
                mask = layer.mask(z)
    else:
        y, mask = _call.run("quantised_cats_mlp_fwd", backend, arguments, define)
    y = y if flat is x else y.view(x.shape)
    if not return_mask:
        return y
    assert mask is not None
    return y, mask.view(*x.shape[:-1], neurons)


def _arguments(
    x: torch.Tensor, w_gate: torch.Tensor, w_up: Any, w_down: Any, down_scales: Any, threshold: Any, b_gate: Any, b_up: Any,
    b_down: Any, format: Any, activation: Any, inclusive: Any, mask_mode: Any, prefill: Any, max_sparse_tokens: Any, grad: Any,
    return_mask: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """Those of the operator, unchecked but for names; of calls with few tokens and at least one neuron."""
    _checks.flag("return_mask", return_mask)
    code, union = few_tokens(x, activation, mask_mode, prefill, max_sparse_tokens, grad)
    if not w_gate.shape[0]:
        raise ValueError("w_gate: expected neurons")
    t = _checks.unread_threshold(threshold, x.device)
    codes = map(_NAMES.index, _formats(format))
    return x, w_gate, w_up, w_down, down_scales, t, b_gate, b_up, b_down, *codes, code, inclusive, union


def _formats(format: str | tuple[str, str, str]) -> tuple[str, str, str]:
    if isinstance(format, str):
        _checks.choice("format", format, _NAMES)
        return (format, format, format)
    if not isinstance(format, (tuple, list)) or len(format) != 3:
        raise TypeError(f"format: expected a name or three of them, for gate, up and down, got {format!r}")
    for one in format:
        _checks.choice("format", one, _NAMES)
    return (format[0], format[1], format[2])


def _check_weights(
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    down_scales: torch.Tensor | None,
    formats: tuple[str, str, str],
) -> tuple[int, int]:
    """The numbers of neurons and of channels."""
    hidden = check_weight("w_gate", w_gate, formats[0])
    neurons = w_gate.shape[0]
    if x.dim() == 0 or x.shape[-1] != hidden:
        raise ValueError(f"x: expected shape [..., {hidden}] to match w_gate {list(w_gate.shape)}, got {list(x.shape)}")
    _checks.same_device("w_gate", w_gate, x.device, "x")
    groups = hidden // GROUP
    down = FORMATS[formats[2]]
    wanted = {
        "w_up": (w_up, (neurons, groups * FORMATS[formats[1]].group_bytes)),
        "w_down": (w_down, (neurons, groups * (down.group_bytes if down_scales is None else down.code_bytes))),
    }
    if down_scales is not None:
        if neurons % GROUP:
            raise ValueError(f"down_scales: expected None, for {neurons} neurons are no multiple of {GROUP}")
        wanted["down_scales"] = (down_scales, (neurons // GROUP, hidden * (down.group_bytes - down.code_bytes)))
    for name, (value, shape) in wanted.items():
        if not isinstance(value, torch.Tensor) or value.dtype != torch.uint8:
            got = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            raise TypeError(f"{name}: expected a uint8 tensor, got {got}")
        _checks.dense(name, value)
        if value.shape != shape:
            raise ValueError(
                f"{name}: expected shape {list(shape)} to match w_gate and format, got {list(value.shape)}"
            )
        _checks.same_device(name, value, x.device, "x")
    return neurons, hidden


# --- many tokens, and gradients ----------------------------------------


class _Layer(NamedTuple):
    """What has no gradients."""

    w_gate: torch.Tensor
    w_up: torch.Tensor
    w_down: torch.Tensor
    down_scales: torch.Tensor | None
    threshold: torch.Tensor
    formats: tuple[int, ...]
    hidden: int
    activation: int
    inclusive: bool
    union: bool
    straight_through: bool
    forward: str  # backend of products along rows
    transposed: str  # and of those across them
    elementwise: str

    def rows(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, format: int) -> torch.Tensor:
        """x W^T + bias in float32, W of `quantised_linear`."""
        y: torch.Tensor = _call.call("quantised_linear_fwd", self.forward, x, weight, bias, self.hidden, format)
        return y

    def across(self, x: torch.Tensor, weight: torch.Tensor, format: int) -> torch.Tensor:
        """x W in float32."""
        y: torch.Tensor = _call.call("quantised_linear_bwd", self.transposed, x, weight, self.hidden, format)
        return y

    def mask(self, z: torch.Tensor) -> torch.Tensor:
        """Which neurons are active, bool [N, I], of z [N, I]."""
        mask = active_mask(activate(z, ACTIVATIONS[self.activation]), self.threshold, self.inclusive)
        return mask.any(0).expand_as(mask).contiguous() if self.union else mask

    def down(self, h: torch.Tensor) -> torch.Tensor:
        """y [N, H] of h [N, I]."""
        if self.down_scales is None:
            return self.across(h, self.w_down, self.formats[2])
        y = h.new_zeros((h.shape[0], self.hidden))
        for i, block in self._blocks():
            y.addmm_(h[:, i : i + _BLOCK], block)
        return y

    def down_transposed(self, grad_y: torch.Tensor) -> torch.Tensor:
        """The gradient of h [N, I] of that of y [N, H]."""
        if self.down_scales is None:
            return self.rows(grad_y, self.w_down, None, self.formats[2])
        return torch.cat([grad_y @ block.t() for _, block in self._blocks()], dim=1)

    def _blocks(self) -> Any:
        assert self.down_scales is not None
        for i in range(0, self.w_down.shape[0], _BLOCK):
            scales = self.down_scales[i // GROUP : (i + _BLOCK) // GROUP]
            yield i, dequantise_down(self.w_down[i : i + _BLOCK], _NAMES[self.formats[2]], scales)


def _products(x: torch.Tensor, backend: str | None) -> tuple[str, str, str]:
    device = x.device.type
    forward = _call.choose("quantised_linear", device, backend, dtype=x.dtype)
    across = backward_backend("quantised_linear_fwd", forward, device)
    return forward, across, _call.choose("cats_activation", device, backend)


def _many_tokens(
    layer: _Layer,
    x: torch.Tensor,
    b_gate: torch.Tensor | None,
    b_up: torch.Tensor | None,
    b_down: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """y and what the backward needs: z, u, t. All in float32 until y, the mask fused between the products."""
    gate_bias, up_bias, down_bias = (None if b is None else b.float().contiguous() for b in (b_gate, b_up, b_down))
    wide = x.float().contiguous()
    z = layer.rows(wide, layer.w_gate, gate_bias, layer.formats[0])
    u = layer.rows(wide, layer.w_up, up_bias, layer.formats[1])
    # With "union" a column woken by any token is active for all, any other for none.
    t = torch.where(layer.mask(z)[0], -1.0, torch.inf) if layer.union else layer.threshold
    h = _call.call("cats_glu_fwd", layer.elementwise, z, u, t, layer.activation, layer.inclusive)
    y = layer.down(h)
    if down_bias is not None:
        y = y + down_bias
    if not_finite(y):
        w_down = dequantise_down(layer.w_down, _NAMES[layer.formats[2]], layer.down_scales)
        y = down_product(h, w_down.t(), down_bias, layer.mask(z))
    return y.to(x.dtype), z, u, t


class _ManyTokens(torch.autograd.Function):
    """`_many_tokens` with gradients of x and the biases."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        b_gate: torch.Tensor | None,
        b_up: torch.Tensor | None,
        b_down: torch.Tensor | None,
        w_gate: torch.Tensor,
        w_up: torch.Tensor,
        w_down: torch.Tensor,
        down_scales: torch.Tensor | None,
        threshold: torch.Tensor,
        options: tuple[Any, ...],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer = _Layer(w_gate, w_up, w_down, down_scales, threshold, *options)
        y, z, u, t = _many_tokens(layer, x, b_gate, b_up, b_down)
        ctx.save_for_backward(
            w_gate, w_up, w_down, down_scales, t, z, u, x, b_gate, b_up, b_down
        )  # the last: see _Raise
        ctx.options = options
        ctx.dtypes = (x.dtype, *(None if b is None else b.dtype for b in (b_gate, b_up, b_down)))
        ctx.mark_non_differentiable(z)
        return y, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        *tensors, z, u = ctx.saved_tensors[:7]
        layer = _Layer(*tensors, *ctx.options)
        need_x, need_b_gate, need_b_up, need_b_down = ctx.needs_input_grad[:4]
        x_dtype, gate_dtype, up_dtype, down_dtype = ctx.dtypes
        wide = grad_y.float().contiguous()
        grad_h = layer.down_transposed(wide)
        options = (layer.activation, layer.inclusive, layer.straight_through)
        dz, du = _call.call("cats_glu_bwd", layer.elementwise, grad_h, z, u, layer.threshold, *options)
        grad_x = None
        if need_x:
            through = layer.across(dz, layer.w_gate, layer.formats[0]) + layer.across(du, layer.w_up, layer.formats[1])
            grad_x = through.to(x_dtype)
        return (
            grad_x,
            dz.sum(0).to(gate_dtype) if need_b_gate else None,
            du.sum(0).to(up_dtype) if need_b_up else None,
            wide.sum(0).to(down_dtype) if need_b_down else None,
            *[None] * 6,
        )
