"""The CATS gated MLP: sparse kernels for a few tokens, dense products with a fused mask for many tokens and for training."""

from __future__ import annotations

from typing import Any

import torch

from .. import reference
from .._backends import resolve
from .._schemas import HANDLES
from ..reference.cats_activation import activate, active_mask
from . import _checks
from ._autograd import once_differentiable
from ._linear import linear_fp32
from .cats_activation import GRADS

MAX_SPARSE_TOKENS = 16
MAX_UNION_TOKENS = 256  # of the CPU kernel, which sees that many tokens at a time
MASK_MODES = ("token", "union")
PREFILLS = ("masked", "dense")


def cats_mlp(
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    threshold: float | torch.Tensor,
    *,
    activation: str = "silu",
    inclusive: bool = False,
    mask_mode: str = "token",
    prefill: str = "masked",
    max_sparse_tokens: int | None = None,
    grad: str = "masked",
    b_gate: torch.Tensor | None = None,
    b_up: torch.Tensor | None = None,
    b_down: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    r"""Gated MLP that computes only the neurons whose gate activation exceeds a threshold (CATS, arXiv 2404.08763).

    With s = f(x Wg^T) and S = {i : |s_i| > t_i}, y = sum over S of s_i (x Wu^T)_i Wd[:, i]. Up to `max_sparse_tokens` tokens
    without gradients, only the rows of `w_up` and columns of `w_down` in S are read; beyond, dense products with the same mask.
    The full gain needs `w_down` neuron-major, that is with strides (1, H) (`subquad.nn.CATSMLP` arranges it); any other
    layout is correct and saves the up projection alone.

    Args:
        x: [..., H], float32, bfloat16 or float16 (float64 on the reference backend). Leading dimensions are tokens.
        w_gate, w_up: [I, H], dtype and device of `x`; last dimension contiguous.
        w_down: [H, I]; strides (1, H) or (I, 1).
        threshold: float, or float32 tensor [], [1] or [I]. Negative: dense. +inf: nothing but NaN is active.
        activation: "silu", "gelu_tanh", "gelu" or "relu".
        inclusive: keep neurons that equal the threshold (paper) instead of dropping them (its code).
        mask_mode: "token" gives every token its own mask, exactly; "union" lets a token use what any token of the call woke.
        prefill: above `max_sparse_tokens`, "masked" applies the threshold, "dense" ignores it.
        max_sparse_tokens: most tokens for the sparse kernels, 0 to 16; None means 16.
        grad: "masked" or "ste" (straight-through), see `cats_activation`. The threshold receives no gradient.
        b_gate, b_up, b_down: optional biases [I], [I], [H].
        backend: "native", "triton", "reference", or None to choose.

    Returns:
        y [..., H] in x's dtype; accumulated in float32 and rounded once. Deterministic; on the sparse path with "token" masks a
        token's result does not depend on the others in the call.

    Raises:
        TypeError: wrong type, or dtypes that differ.
        ValueError: wrong shapes, strides or devices, NaN threshold, unknown option, backend that cannot run.

    Example:
        >>> import torch, subquad
        >>> x, w = torch.randn(1, 8), torch.randn(32, 8)
        >>> subquad.cats_mlp(x, w, w, torch.randn(8, 32), 0.1).shape
        torch.Size([1, 8])
    """
    _checks.flag("inclusive", inclusive)
    tokens, t, code, limit = _validate(
        x,
        w_gate,
        w_up,
        w_down,
        threshold,
        activation,
        mask_mode,
        prefill,
        max_sparse_tokens,
        grad,
        b_gate,
        b_up,
        b_down,
    )
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        b_gate, b_up, b_down = (None if b is None else b.to(dtype) for b in (b_gate, b_up, b_down))
        with torch.autocast(x.device.type, enabled=False):
            return cats_mlp(
                x.to(dtype), w_gate.to(dtype), w_up.to(dtype), w_down.to(dtype), threshold, activation=activation,
                inclusive=inclusive, mask_mode=mask_mode, prefill=prefill, max_sparse_tokens=max_sparse_tokens, grad=grad,
                b_gate=b_gate, b_up=b_up, b_down=b_down, backend=backend,
            )  # fmt: skip
    name = resolve("cats_mlp", x.device.type, backend)
    flat = x if x.dim() == 2 else x.reshape(tokens, x.shape[-1])
    if tokens > limit and prefill == "dense":
        t = torch.full_like(t[:1], -1.0)
    weights = (w_gate, w_up, w_down, b_gate, b_up, b_down)
    if name == "reference" or tokens == 0 or torch._C._are_functorch_transforms_active():
        y = reference.cats_mlp.cats_mlp(
            flat, w_gate, w_up, w_down, t, b_gate=b_gate, b_up=b_up, b_down=b_down,
            activation=activation, inclusive=inclusive, mask_mode=mask_mode, grad=grad,
        )  # fmt: skip
        return y.view(x.shape)
    _checks.not_double("x", x, name)
    union = mask_mode == "union"
    if torch.is_grad_enabled() and _needs_grad(x, weights):
        options = (
            activation,
            code,
            inclusive,
            union,
            grad == "ste",
            resolve("cats_activation", x.device.type, backend),
        )
        return _CATSMLP.apply(flat, *weights, t, options).view(x.shape)
    fused = name == "native" and x.device.type == "cpu" and not (union and tokens > MAX_UNION_TOKENS)
    if tokens > limit and not fused:  # the CPU kernel has a dense path of its own
        activation_backend = resolve("cats_activation", x.device.type, backend)
        return _dense(flat, *weights, t, activation, code, inclusive, union, activation_backend)[0].view(x.shape)
    biases = (
        weights[3:]
        if b_gate is b_up is b_down is None
        else [None if b is None else b.contiguous() for b in weights[3:]]
    )
    y = HANDLES[name]["cats_mlp_fwd"](flat.contiguous(), w_gate, w_up, w_down, t, *biases, code, inclusive, union)
    return y if flat is x else y.view(x.shape)


def _needs_grad(x: torch.Tensor, weights: tuple[torch.Tensor | None, ...]) -> bool:
    return x.requires_grad or any(w is not None and w.requires_grad for w in weights)


def _validate(
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    threshold: float | torch.Tensor,
    activation: str,
    mask_mode: str,
    prefill: str,
    max_sparse_tokens: int | None,
    grad: str,
    b_gate: torch.Tensor | None,
    b_up: torch.Tensor | None,
    b_down: torch.Tensor | None,
) -> tuple[int, torch.Tensor, int, int]:
    """Check everything before any kernel runs. Returns the token count, 1-D threshold, activation code and sparse limit."""
    _checks.tensor("x", x)
    _checks.tensor("w_gate", w_gate)
    if w_gate.dim() != 2:
        raise ValueError(f"w_gate: expected shape [I, H], got {list(w_gate.shape)}")
    neurons, hidden = w_gate.shape
    if x.dim() == 0 or x.shape[-1] != hidden:
        raise ValueError(f"x: expected shape [..., {hidden}] to match w_gate {list(w_gate.shape)}, got {list(x.shape)}")
    _checks.like("w_gate", w_gate, (neurons, hidden), x, "x")
    _checks.like("w_up", w_up, (neurons, hidden), x, "x")
    _checks.like("w_down", w_down, (hidden, neurons), x, "x")
    if w_gate.stride(1) != 1 and hidden > 1:
        raise ValueError(f"w_gate: expected a contiguous last dimension, got strides {list(w_gate.stride())}")
    if w_up.stride(1) != 1 and hidden > 1:
        raise ValueError(f"w_up: expected a contiguous last dimension, got strides {list(w_up.stride())}")
    if 1 not in w_down.stride() and hidden > 1 and neurons > 1:
        raise ValueError(f"w_down: expected strides (1, n) or (n, 1), got {list(w_down.stride())}")
    if b_gate is not None:
        _checks.like("b_gate", b_gate, (neurons,), x, "x")
    if b_up is not None:
        _checks.like("b_up", b_up, (neurons,), x, "x")
    if b_down is not None:
        _checks.like("b_down", b_down, (hidden,), x, "x")
    _checks.choice("mask_mode", mask_mode, MASK_MODES)
    _checks.choice("prefill", prefill, PREFILLS)
    _checks.choice("grad", grad, GRADS)
    limit = MAX_SPARSE_TOKENS if max_sparse_tokens is None else max_sparse_tokens
    if isinstance(limit, bool) or not isinstance(limit, int):
        raise TypeError(f"max_sparse_tokens: expected an int, got {type(limit).__name__}")
    if not 0 <= limit <= MAX_SPARSE_TOKENS:
        raise ValueError(f"max_sparse_tokens: expected 0 to {MAX_SPARSE_TOKENS}, got {max_sparse_tokens}")
    tokens = x.numel() // hidden if hidden else 0
    return tokens, _checks.threshold(threshold, neurons, x.device), _checks.activation_code(activation), limit


def _dense(
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    b_gate: torch.Tensor | None,
    b_up: torch.Tensor | None,
    b_down: torch.Tensor | None,
    t: torch.Tensor,
    activation: str,
    code: int,
    inclusive: bool,
    union: bool,
    backend: str,
) -> tuple[torch.Tensor, ...]:
    """Dense products with the mask fused into the gated unit. Returns y and what the backward needs: z, u, h, t."""
    z = linear_fp32(x, w_gate, b_gate)
    u = linear_fp32(x, w_up, b_up)
    if union:  # a column woken by any token is active for all, any other for none
        woken = active_mask(activate(z, activation), t, inclusive).any(0)
        t = torch.where(woken, -1.0, torch.inf)
    h = HANDLES[backend]["cats_glu_fwd"](z, u, t, code, inclusive)
    return linear_fp32(h, w_down, b_down).to(x.dtype), z, u, h, t


class _CATSMLP(torch.autograd.Function):
    """Training: dense products, one fused elementwise kernel each way. Bias-free formulas in specs: dz, du share h's support."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        w_gate: torch.Tensor,
        w_up: torch.Tensor,
        w_down: torch.Tensor,
        b_gate: torch.Tensor | None,
        b_up: torch.Tensor | None,
        b_down: torch.Tensor | None,
        t: torch.Tensor,
        options: tuple[Any, ...],
    ) -> torch.Tensor:
        activation, code, inclusive, union, straight_through, backend = options
        y, z, u, h, t = _dense(
            x, w_gate, w_up, w_down, b_gate, b_up, b_down, t, activation, code, inclusive, union, backend
        )
        ctx.save_for_backward(x, w_gate, w_up, w_down, z, u, h if w_down.requires_grad else None, t)
        ctx.biases = tuple(None if b is None else b.dtype for b in (b_gate, b_up, b_down))
        ctx.options = (code, inclusive, straight_through)
        ctx.backend = backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, w_gate, w_up, w_down, z, u, h, t = ctx.saved_tensors
        need_x, need_gate, need_up, need_down, need_b_gate, need_b_up, need_b_down = ctx.needs_input_grad[:7]
        grad_h = linear_fp32(grad_y, w_down.t())
        dz, du = HANDLES[ctx.backend]["cats_glu_bwd"](grad_h, z, u, t, *ctx.options)
        grad_x = (linear_fp32(dz, w_gate.t()) + linear_fp32(du, w_up.t())).to(x.dtype) if need_x else None
        wide_x = x.float() if need_gate or need_up else None
        grad_gate = (dz.t() @ wide_x).to(x.dtype) if need_gate else None
        grad_up = (du.t() @ wide_x).to(x.dtype) if need_up else None
        grad_down = (grad_y.float().t() @ h).to(x.dtype) if need_down else None
        grad_b_gate = dz.sum(0).to(ctx.biases[0]) if need_b_gate else None
        grad_b_up = du.sum(0).to(ctx.biases[1]) if need_b_up else None
        grad_b_down = grad_y.float().sum(0).to(ctx.biases[2]) if need_b_down else None
        return grad_x, grad_gate, grad_up, grad_down, grad_b_gate, grad_b_up, grad_b_down, None, None
