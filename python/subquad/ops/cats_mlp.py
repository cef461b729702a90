"""The CATS gated MLP: sparse kernels for a few tokens, dense products with a fused mask for many tokens and for training."""

from __future__ import annotations

from typing import Any

import torch

from .. import _checks
from ..contract.cats_mlp import MAX_SPARSE_TOKENS, most_tokens
from ..reference import cats_mlp as reference
from ..reference.cats_activation import ACTIVATIONS, activate, active_mask
from . import _call
from ._autograd import once_differentiable, without_autocast
from ._linear import linear_fp32
from .cats_activation import GRADS

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
    at_once: torch.Tensor | None = _call.at_once(
        "cats_mlp_fwd", backend, _arguments,
        x, w_gate, w_up, w_down, threshold, b_gate, b_up, b_down,
        activation, inclusive, mask_mode, prefill, max_sparse_tokens, grad,
    )  # fmt: skip
    if at_once is not None:
        return at_once
    x, w_gate, w_up, w_down, b_gate, b_up, b_down = _call.autocast(x, w_gate, w_up, w_down, b_gate, b_up, b_down)
    weights = (w_gate, w_up, w_down, b_gate, b_up, b_down)
    tokens = _check_tensors(x, *weights)
    if (on_parts := _call.on_parts("cats_mlp", x)) is not None:
        names = ("w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down")
        placed: torch.Tensor = on_parts(
            {"x": x, **dict(zip(names, weights, strict=True)), "threshold": threshold},
            activation=activation, inclusive=inclusive, mask_mode=mask_mode, prefill=prefill,
            max_sparse_tokens=max_sparse_tokens, grad=grad, backend=backend,
        )  # fmt: skip
        return placed
    t = _checks.threshold(threshold, w_gate.shape[0], x.device)
    code = _checks.choice("activation", activation, ACTIVATIONS)
    _checks.flag("inclusive", inclusive)
    union = bool(_checks.choice("mask_mode", mask_mode, MASK_MODES))
    _checks.choice("prefill", prefill, PREFILLS)
    straight_through = bool(_checks.choice("grad", grad, GRADS))
    limit = sparse_limit(max_sparse_tokens)
    if prefill == "dense" and tokens > limit:  # in this order: a size of a graph is asked only where it matters
        t = torch.full_like(t[:1], -1.0)
    device = x.device.type
    flat = x if x.dim() == 2 else x.reshape(tokens, x.shape[-1])
    name = _call.choose("cats_mlp", device, backend, dtype=x.dtype)

    def define(*_: object) -> torch.Tensor:
        return reference.cats_mlp(
            flat, w_gate, w_up, w_down, t, b_gate=b_gate, b_up=b_up, b_down=b_down,
            activation=activation, inclusive=inclusive, mask_mode=mask_mode, grad=grad,
        )  # fmt: skip

    if tokens == 0:
        return define().view(x.shape)
    most = most_tokens(name, device, union, limit)
    training = torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in (x, *weights))
    kernels = name != "reference" and not _call.by_definition((x, *weights))
    if kernels and (training or (most is not None and tokens > most)):
        _checks.not_double("x", x, name)
        for tensor, called in zip(
            (x, *weights), ("x", "w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down"), strict=True
        ):
            if tensor is not None:
                _checks.memory(called, tensor)
        options = (
            activation,
            code,
            inclusive,
            union,
            straight_through,
            _call.choose("cats_activation", device, backend),
        )
        with without_autocast(device):
            y = _DenseMLP.apply(flat, *weights, t, options) if training else _dense(flat, *weights, t, options)[0]
        return y.view(x.shape)
    arguments = (flat, w_gate, w_up, w_down, t, b_gate, b_up, b_down, code, inclusive, union)
    y = _call.run("cats_mlp_fwd", backend, arguments, define)
    if kernels and not torch.compiler.is_compiling() and tokens > MAX_SPARSE_TOKENS and not_finite(y):
        y = y if bool(w_down.isfinite().all()) else define()  # dense products read the columns of dead neurons, too
    return y if flat is x else y.view(x.shape)


def _arguments(
    x: torch.Tensor, w_gate: Any, w_up: Any, w_down: Any, threshold: Any, b_gate: Any, b_up: Any, b_down: Any,
    activation: Any, inclusive: Any, mask_mode: Any, prefill: Any, max_sparse_tokens: Any, grad: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """Those of the operator, unchecked but for names; of calls with few tokens, for which no dense product is made."""
    code, union = few_tokens(x, activation, mask_mode, prefill, max_sparse_tokens, grad)
    t = _checks.unread_threshold(threshold, x.device)
    return x, w_gate, w_up, w_down, t, b_gate, b_up, b_down, code, inclusive, union


def few_tokens(
    x: torch.Tensor, activation: str, mask_mode: str, prefill: str, max_sparse_tokens: int | None, grad: str
) -> tuple[int, bool]:
    """The activation's code and whether masks are united, for calls that the sparse kernels take; raises for others."""
    _checks.choice("prefill", prefill, PREFILLS)
    _checks.choice("grad", grad, GRADS)
    if not 0 < x.numel() // x.shape[-1] <= sparse_limit(max_sparse_tokens):
        raise ValueError("x: expected a few tokens")
    union = _checks.choice("mask_mode", mask_mode, MASK_MODES) == 1
    return _checks.choice("activation", activation, ACTIVATIONS), union


def sparse_limit(limit: int | None) -> int:
    """`max_sparse_tokens` as a number."""
    if limit is None:
        return MAX_SPARSE_TOKENS
    if isinstance(limit, bool) or not isinstance(limit, int):
        raise TypeError(f"max_sparse_tokens: expected an int, got {type(limit).__name__}")
    if not 0 <= limit <= MAX_SPARSE_TOKENS:
        raise ValueError(f"max_sparse_tokens: expected 0 to {MAX_SPARSE_TOKENS}, got {limit}")
    return limit


def _check_tensors(
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    b_gate: torch.Tensor | None,
    b_up: torch.Tensor | None,
    b_down: torch.Tensor | None,
) -> int:
    """The number of tokens."""
    _checks.tensor("x", x)
    _checks.tensor("w_gate", w_gate)
    if w_gate.dim() != 2:
        raise ValueError(f"w_gate: expected shape [I, H], got {list(w_gate.shape)}")
    neurons, hidden = w_gate.shape
    if x.dim() == 0 or x.shape[-1] != hidden:
        raise ValueError(f"x: expected shape [..., {hidden}] to match w_gate {list(w_gate.shape)}, got {list(x.shape)}")
    for name, value, shape in (
        ("w_gate", w_gate, (neurons, hidden)),
        ("w_up", w_up, (neurons, hidden)),
        ("w_down", w_down, (hidden, neurons)),
        ("b_gate", b_gate, (neurons,)),
        ("b_up", b_up, (neurons,)),
        ("b_down", b_down, (hidden,)),
    ):
        if value is not None or name.startswith("w_"):
            _checks.like(name, value, shape, x, "x")
    for name, value in (("w_gate", w_gate), ("w_up", w_up)):
        if value.stride(1) != 1 and hidden > 1:
            raise ValueError(f"{name}: expected a contiguous last dimension, got strides {list(value.stride())}")
    if 1 not in w_down.stride() and hidden > 1 and neurons > 1:
        raise ValueError(f"w_down: expected strides (1, n) or (n, 1), got {list(w_down.stride())}")
    return x.numel() // hidden if hidden else 0


def _dense(
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    b_gate: torch.Tensor | None,
    b_up: torch.Tensor | None,
    b_down: torch.Tensor | None,
    t: torch.Tensor,
    options: tuple[Any, ...],
) -> tuple[torch.Tensor, ...]:
    """Dense products with the mask fused into the gated unit. Returns y and what the backward needs: z, u, h, t."""
    activation, code, inclusive, union, _, backend = options
    z = linear_fp32(x, w_gate, b_gate)
    u = linear_fp32(x, w_up, b_up)
    if union:  # a column woken by any token is active for all, any other for none
        woken = active_mask(activate(z, activation), t, inclusive).any(0)
        t = torch.where(woken, -1.0, torch.inf)
    h = _call.call("cats_glu_fwd", backend, z, u, t, code, inclusive)
    y = linear_fp32(h, w_down, b_down)
    if not_finite(y):
        bias = None if b_down is None else b_down.float()
        y = reference.down_product(h, w_down.float(), bias, active_mask(activate(z, activation), t, inclusive))
    return y.to(x.dtype), z, u, h, t


def not_finite(y: torch.Tensor) -> bool:
    """Whether a product may have read an Inf or NaN in the column of a dead neuron. Nothing is read back from a GPU for that."""
    return _checks.readable(y) and not bool(y.isfinite().all())


class _DenseMLP(torch.autograd.Function):
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
        y, z, u, h, t = _dense(x, w_gate, w_up, w_down, b_gate, b_up, b_down, t, options)
        ctx.save_for_backward(x, w_gate, w_up, w_down, z, u, h if w_down.requires_grad else None, t)
        ctx.biases = tuple(None if b is None else b.dtype for b in (b_gate, b_up, b_down))
        ctx.options = options
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, w_gate, w_up, w_down, z, u, h, t = ctx.saved_tensors
        need_x, need_gate, need_up, need_down, need_b_gate, need_b_up, need_b_down = ctx.needs_input_grad[:7]
        grad_h = linear_fp32(grad_y, w_down.t())
        _, code, inclusive, _, straight_through, backend = ctx.options
        dz, du = _call.call("cats_glu_bwd", backend, grad_h, z, u, t, code, inclusive, straight_through)
        grad_x = (linear_fp32(dz, w_gate.t()) + linear_fp32(du, w_up.t())).to(x.dtype) if need_x else None
        wide_x = x.float() if need_gate or need_up else None
        grad_gate = (dz.t() @ wide_x).to(x.dtype) if need_gate else None
        grad_up = (du.t() @ wide_x).to(x.dtype) if need_up else None
        grad_down = (grad_y.float().t() @ h).to(x.dtype) if need_down else None
        grad_b_gate = dz.sum(0).to(ctx.biases[0]) if need_b_gate else None
        grad_b_up = du.sum(0).to(ctx.biases[1]) if need_b_up else None
        grad_b_down = grad_y.float().sum(0).to(ctx.biases[2]) if need_b_down else None
        return grad_x, grad_gate, grad_up, grad_down, grad_b_gate, grad_b_up, grad_b_down, None, None
