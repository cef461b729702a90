"""Linear attention with decay, optionally normalised: whole sequences, and one decoding step in place."""

from __future__ import annotations

from typing import Any

import torch

from .. import _checks
from .._packing import Packed
from ..contract.gated_linear_attention import MAX_HEAD_DIM
from ..reference import gated_linear_attention as reference
from . import _call

State = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def gated_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | Packed | None = None,
    normalize: bool = False,
    eps: float = 1e-10,
    backend: str | None = None,
) -> tuple[torch.Tensor, State | None]:
    r"""S_t = diag(exp g_t) S_{t-1} + k_t v_t^T, o_t = scale q_t^T S_t, in time linear in T (GLA, arXiv 2312.06635).

    With `normalize`, o_t is divided by scale q_t^T z_t + eps, where z_t = exp(g_t) z_{t-1} + k_t (LAWCAT, arXiv
    2509.18467): for positive features a weighted mean of past values. States are float32 always. Any gate down to -inf is
    exact; positive gates are too, while the states stay finite. Differentiable in everything, through both results.

    Heads: HS = max(HK, HV, HG) states; HK, HV and HG divide HS, HS divides HQ. State head s reads k head s * HK // HS and
    so on, query head h reads state h * HS // HQ. Nothing is repeated in memory.

    Args:
        q: queries [B, T, HQ, K], float32, bfloat16, float16 (float64 on the reference backend), K in 1..256; any strides.
        k: keys [B, T, HK, K].
        v: values [B, T, HV, V], V in 1..256.
        g: logarithm of the decay, per key channel [B, T, HG, K] or per head [B, T, HG], float32 or q's dtype; None: no decay.
        scale: factor of the scores; None for K ** -0.5.
        initial_state: S [N, HS, K, V] float32; with `normalize` the pair (S, z [N, HS, K]), where z may also be
            [N, 1, HS, K], or one tensor [N, HS, K, V + 1] with z as its last column. N is B, or the number of sequences.
        output_final_state: also return the state after the last token: S, with `normalize` (S, z), or one tensor with z as
            its last column where `initial_state` was one.
        cu_seqlens: [N + 1] int32 or int64, the bounds of N sequences packed into B = 1; empty ones are allowed. Or a
            `subquad.Packed` of them, checked before.
        normalize: divide by the decayed sum of the scores.
        eps: added to that sum.
        backend: "native", "triton", "reference", or None to choose.

    Returns:
        (o [B, T, HQ, V] in q's dtype, final state or None).

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: shapes, head counts or devices that do not fit; cu_seqlens that do not start at 0, decrease or do not
            end at T (on a GPU checked under SUBQUAD_DEBUG=1 only); a scale or eps that is not finite; a backend that
            cannot run.

    Example:
        >>> import torch, subquad
        >>> q, k, v = (torch.rand(1, 6, 2, 8) for _ in range(3))
        >>> o, (s, z) = subquad.gated_linear_attention(q, k, v, normalize=True, output_final_state=True)
        >>> o.shape, s.shape, z.shape
        (torch.Size([1, 6, 2, 8]), torch.Size([1, 2, 8, 8]), torch.Size([1, 2, 8]))
    """
    q, k, v = _call.autocast(q, k, v)
    states = _check_rows(q, k, v, g, 4)
    for name, flag in (("normalize", normalize), ("output_final_state", output_final_state)):
        _checks.flag(name, flag)
    scale = q.shape[3] ** -0.5 if scale is None else _checks.number("scale", scale)
    eps = _checks.number("eps", eps)
    packed = None if cu_seqlens is None else Packed.of(cu_seqlens, q)
    count = q.shape[0] if packed is None else packed.sequences
    s0, z0 = _initial_state(initial_state, normalize, (count, states, k.shape[3], v.shape[3]), q)
    bounds = None if packed is None else packed.int64
    arguments = (q, k, v, g, s0, z0, bounds, scale, eps, normalize)
    o, _, s, z = _call.run("gated_linear_attention_fwd", backend, arguments, _define, tokens=q.shape[1])
    if not output_final_state:
        return o, None
    if z is None or not normalize:
        return o, s
    return o, torch.cat([s, z.unsqueeze(-1)], -1) if isinstance(initial_state, torch.Tensor) else (s, z)


def _define(*arguments: Any) -> tuple[Any, ...]:
    o, s, z = reference.gated_linear_attention(*arguments)
    return o, None, s, z


def gated_linear_attention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    state: torch.Tensor,
    *,
    z: torch.Tensor | None = None,
    state_indices: torch.Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-10,
    backend: str | None = None,
) -> torch.Tensor:
    r"""One token of `gated_linear_attention` per row; `state` and `z` are updated in place. Not differentiable.

    Under autocast q, k and v are cast as in `gated_linear_attention`.

    Args:
        q: queries [B, HQ, K], float32, bfloat16, float16 (float64 on the reference backend).
        k: keys [B, HK, K].
        v: values [B, HV, V].
        g: logarithm of the decay [B, HG, K] or [B, HG], float32 or q's dtype; None: no decay.
        state: pool of states [P, HS, K, V], float32; P = B without `state_indices`. Contiguous, or it is copied at every step.
        z: pool of key sums [P, HS, K], float32, likewise; given, the result is normalised.
        state_indices: [B] int32 or int64, the row's place in the pool; -1 skips the row: its result is 0 and no state
            changes. Two rows must not share a state.
        scale: factor of the scores; None for K ** -0.5.
        eps: added to the normaliser.
        backend: "native", "triton", "reference", or None to choose.

    Returns:
        o [B, HQ, V] in q's dtype.

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: shapes, head counts or devices that do not fit, indices outside the pool (on a GPU checked under
            SUBQUAD_DEBUG=1 only), states that share memory, a tensor that requires a gradient while gradients are enabled, a
            backend that cannot run.

    Example:
        >>> import torch, subquad
        >>> q, k, v, state = torch.rand(1, 2, 8), torch.rand(1, 2, 8), torch.rand(1, 2, 4), torch.zeros(1, 2, 8, 4)
        >>> subquad.gated_linear_attention_step(q, k, v, None, state).shape, bool(state.any())
        (torch.Size([1, 2, 4]), True)
    """
    operator = "gated_linear_attention_step_"
    at_once: torch.Tensor | None = _call.at_once(
        operator, backend, _step_arguments, q, k, v, g, state, z, state_indices, scale, eps
    )
    if at_once is not None:
        return at_once
    q, k, v = _call.autocast(q, k, v)
    states = _check_rows(q, k, v, g, 3)
    batch, _, width = q.shape
    pool = batch
    if state_indices is not None:
        pool = state.shape[0] if isinstance(state, torch.Tensor) and state.dim() else 0
        state_indices = _checks.indices("state_indices", state_indices, batch, pool, q.device).to(torch.int64)
    _state("state", state, (pool, states, width, v.shape[2]), q)
    if z is not None:
        _state("z", z, (pool, states, width), q)
    scale = width**-0.5 if scale is None else _checks.number("scale", scale)
    eps = _checks.number("eps", eps)
    arguments = (q, k, v, g, state, z, state_indices, scale, eps)
    define = reference.gated_linear_attention_step
    hint = "call it under torch.no_grad(), or use gated_linear_attention with initial_state"
    o: torch.Tensor = _call.step(operator, backend, arguments, define, hint=hint)
    return o


def _step_arguments(
    q: torch.Tensor, k: Any, v: Any, g: Any, state: torch.Tensor, z: Any, indices: Any, scale: float | None, eps: Any
) -> tuple[Any, ...]:
    """Those of the operator, unchecked but for the numbers of indices."""
    if indices is not None:
        indices = _checks.indices("state_indices", indices, len(q), len(state), q.device).to(torch.int64)
    return q, k, v, g, state, z, indices, q.shape[-1] ** -0.5 if scale is None else scale, eps


def _check_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor | None, dims: int) -> int:
    """Shapes [..., H, D] of one token or of many; returns the number of states."""
    _checks.tensor("q", q)
    lead, device = q.shape[: dims - 2], q.device
    for name, x in (("q", q), ("k", k), ("v", v)):
        _checks.tensor(name, x)
        shape = x.shape
        if len(shape) != dims:
            form = "[B, T, H, D]" if dims == 4 else "[B, H, D]"
            raise ValueError(f"{name}: expected shape {form}, got {list(shape)}")
        if x.dtype is not q.dtype:
            raise TypeError(f"{name}: expected {q.dtype} as q has, got {x.dtype}")
        _same_rows(name, x, lead, device)
        if not 1 <= shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(f"{name}: expected a head dimension in 1..{MAX_HEAD_DIM}, got {shape[-1]}")
        if shape[-2] == 0:
            raise ValueError(f"{name}: expected at least one head, got {list(shape)}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k: expected a head dimension of {q.shape[-1]} as q has, got {k.shape[-1]}")
    heads = {"k": k.shape[-2], "v": v.shape[-2]}
    if g is not None:
        heads["g"] = _check_gate(g, q, dims)
    states = max(heads.values())
    for name, count in heads.items():
        if states % count:
            raise ValueError(f"{name}: expected a number of heads that divides {states}, got {count}")
    if q.shape[-2] % states:
        raise ValueError(f"q: expected a multiple of {states} heads, the largest of k, v and g, got {q.shape[-2]}")
    return states


def _same_rows(name: str, x: torch.Tensor, lead: torch.Size, device: torch.device) -> None:
    """`x` lies where q does and has its leading sizes."""
    _checks.same_device(name, x, device, "q")
    if x.shape[: len(lead)] != lead:
        raise ValueError(f"{name}: expected leading sizes {list(lead)} as q has, got {list(x.shape)}")


def _check_gate(g: torch.Tensor, q: torch.Tensor, dims: int) -> int:
    _checks.tensor("g", g)
    if g.dim() not in (dims, dims - 1) or (g.dim() == dims and g.shape[-1] != q.shape[-1]) or g.shape[dims - 2] == 0:
        lead = "B, T" if dims == 4 else "B"
        raise ValueError(f"g: expected shape [{lead}, H, {q.shape[-1]}] or [{lead}, H], got {list(g.shape)}")
    if g.dtype not in (torch.float32, q.dtype):
        raise TypeError(f"g: expected float32 or {q.dtype} as q has, got {g.dtype}")
    _same_rows("g", g, q.shape[: dims - 2], q.device)
    return g.shape[dims - 2]


def _initial_state(
    state: State | None, normalize: bool, shape: tuple[int, ...], q: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if state is None:
        return None, None
    if normalize:
        if isinstance(state, torch.Tensor):
            wide = _state("initial_state", state, (*shape[:3], shape[3] + 1), q)
            return wide[..., :-1].contiguous(), wide[..., -1].contiguous()
        if not isinstance(state, (tuple, list)) or len(state) != 2:
            raise TypeError("initial_state: expected the pair (S, z) because normalize=True")
        s, z = state
        if isinstance(z, torch.Tensor) and z.dim() == 4 and z.shape[1] == 1:
            z = z.squeeze(1)
        return _state("initial_state[0]", s, shape, q), _state("initial_state[1]", z, shape[:3], q)
    if isinstance(state, (tuple, list)):
        raise TypeError("initial_state: expected one tensor because normalize=False, got a sequence")
    return _state("initial_state", state, shape, q), None


def _state(name: str, x: object, shape: tuple[int, ...], q: torch.Tensor) -> torch.Tensor:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(x.shape)}")
    expected = torch.float64 if q.dtype is torch.float64 else torch.float32
    if x.dtype is not expected:
        raise TypeError(f"{name}: expected {expected}, got {x.dtype}")
    _checks.dense(name, x)
    _checks.same_device(name, x, q.device, "q")
    return x
