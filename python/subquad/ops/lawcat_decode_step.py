"""One decoding step of a LAWCAT layer in one launch: convolution, feature map, gate, state and normalised output."""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import _checks
from ..contract.lawcat_decode_step import MAX_DIM, MAX_TAPS
from ..reference import lawcat_decode_step as reference
from . import _call
from .causal_conv1d import activation_flag


def lawcat_decode_step(
    q0: torch.Tensor,
    k0: torch.Tensor,
    v: torch.Tensor,
    u: torch.Tensor | None,
    cq: torch.Tensor,
    ck: torch.Tensor,
    wphi: torch.Tensor,
    conv_q: torch.Tensor,
    conv_k: torch.Tensor,
    state: torch.Tensor,
    z: torch.Tensor | None = None,
    *,
    wphi_k: torch.Tensor | None = None,
    cq_bias: torch.Tensor | None = None,
    ck_bias: torch.Tensor | None = None,
    activation: str | None = None,
    state_indices: torch.Tensor | None = None,
    tau: float = 16.0,
    clamp_min: float | None = None,
    scale: float | None = None,
    eps: float = 1e-10,
    fm_eps: float = 1e-12,
    backend: str | None = None,
) -> torch.Tensor:
    r"""The next output of a LAWCAT layer (arXiv 2509.18467) between its projections; all pools are updated in place.

    What `causal_conv1d_update`, `feature_map` (softmax, both halves), logsigmoid(u) / tau and `gated_linear_attention_step` do
    one after the other, without rounding in between. Not differentiable.

    Heads: HS = state.shape[1] states. HKV, HV and HG divide HS, HS divides HQ. State head s has its own taps in `ck`, on the raw
    key head s * HKV // HS, and reads value head s * HV // HS and gate s * HG // HS; query head h reads state h * HS // HQ.

    Args:
        q0: projected queries [B, HQ, d], float32, bfloat16, float16 (float64 on the reference backend), d in 1..256.
        k0: projected keys [B, HKV, d], not repeated.
        v: values [B, HV, V], V in 1..256.
        u: logits of the gates, per key channel [B, HG, 2f] or per head [B, HG], float32 or q0's dtype; None: no decay.
        cq, ck: taps [HQ d, W] and [HS d, W], or [..., 1, W] as modules have them; W in 1..8.
        wphi: feature maps [HM, d, f], f in 1..128; HM divides HQ, and query head h takes map h * HM // HQ.
        conv_q, conv_k: pools of the last W-1 raw queries [P, HQ d, W-1] and keys [P, HKV d, W-1], in q0's dtype. Under autocast
            the other arguments are converted to that dtype, and 16-bit logits to that of `state`. All pools are contiguous, or
            they are copied at every step.
        state: pool of states [P, HS, 2f, V], float32; P = B without `state_indices`.
        z: pool of key sums [P, HS, 2f], float32; given, the result is normalised.
        wphi_k: maps of the keys [HMK, d, f], HMK divides HS; None for those of the queries.
        cq_bias, ck_bias: [HQ d] and [HS d], or None.
        activation: of the convolutions, None, "silu" or "swish".
        state_indices: [B] int32 or int64, the row's place in the pools; -1 skips the row: its result is 0 and no pool changes.
            Two rows must not share a place.
        tau: divides the logarithm of the gate.
        clamp_min: least logarithm of a gate, or None.
        scale: factor of the scores; None for (2f) ** -0.5.
        eps: added to the normaliser.
        fm_eps: least feature.
        backend: "native", "triton", "reference", or None to choose.

    Returns:
        o [B, HQ, V] in q0's dtype.

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: shapes, head counts or devices that do not fit, indices outside the pool (on a GPU checked under
            SUBQUAD_DEBUG=1 only), numbers out of range, pools that share memory, a tensor that requires a gradient while
            gradients are enabled, a backend that cannot run.

    Example:
        >>> import torch, subquad
        >>> q0, k0, v, taps = torch.rand(1, 2, 8), torch.rand(1, 2, 8), torch.rand(1, 2, 5), torch.rand(16, 4)
        >>> past, maps, state = [torch.zeros(1, 16, 3) for _ in range(2)], torch.rand(2, 8, 3), torch.zeros(1, 2, 6, 5)
        >>> subquad.lawcat_decode_step(q0, k0, v, None, taps, taps, maps, *past, state).shape, bool(state.any())
        (torch.Size([1, 2, 5]), True)
    """
    at_once: torch.Tensor | None = _call.at_once(
        "lawcat_decode_step_", backend, _arguments,
        q0, k0, v, u, cq, ck, cq_bias, ck_bias, wphi, wphi_k, conv_q, conv_k, state, z, state_indices,
        activation, tau, clamp_min, scale, eps, fm_eps,
    )  # fmt: skip
    if at_once is not None:
        return at_once
    q0, k0, v, cq, ck, wphi, wphi_k, cq_bias, ck_bias = _call.autocast(
        q0, k0, v, cq, ck, wphi, wphi_k, cq_bias, ck_bias, to=conv_q
    )
    if isinstance(u, torch.Tensor) and u.dtype is not torch.float32:
        (u,) = _call.autocast(u, to=state)  # float32 holds logits of any 16-bit type; those that are float32 stay so
    wphi_k = wphi if wphi_k is None else wphi_k
    cq, ck = (x[:, 0] if isinstance(x, torch.Tensor) and x.dim() == 3 and x.shape[1] == 1 else x for x in (cq, ck))
    indices = _check_shapes(
        q0, k0, v, u, cq, ck, cq_bias, ck_bias, wphi, wphi_k, conv_q, conv_k, state, z, state_indices
    )
    silu = activation_flag(activation)
    scale = state.shape[2] ** -0.5 if scale is None else scale
    for name, value in {"tau": tau, "eps": eps, "fm_eps": fm_eps, "scale": scale}.items():
        _checks.number(name, value)
    if not tau > 0:
        raise ValueError(f"tau: expected a number above 0, got {tau}")
    if not fm_eps >= 0:
        raise ValueError(f"fm_eps: expected a number that is not negative, got {fm_eps}")
    least = -math.inf if clamp_min is None else _checks.number("clamp_min", clamp_min)
    arguments = (
        q0, k0, v, u, cq, ck, cq_bias, ck_bias, wphi, wphi_k, conv_q, conv_k, state, z, indices,
        silu, tau, least, scale, eps, fm_eps,
    )  # fmt: skip
    define = reference.lawcat_decode_step
    o: torch.Tensor = _call.step(
        "lawcat_decode_step_", backend, arguments, define, hint="call it under torch.no_grad()"
    )
    return o


def _arguments(
    q0: torch.Tensor, k0: Any, v: Any, u: Any, cq: Any, ck: Any, cq_bias: Any, ck_bias: Any, wphi: Any, wphi_k: Any,
    conv_q: Any, conv_k: Any, state: torch.Tensor, z: Any, indices: Any,
    activation: Any, tau: Any, clamp_min: Any, scale: Any, eps: Any, fm_eps: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """Those of the operator, unchecked but for the activation's name, the numbers of indices and an infinite `clamp_min`."""
    if indices is not None:
        indices = _checks.indices("state_indices", indices, len(q0), len(state), q0.device).to(torch.int64)
    return (
        q0, k0, v, u, cq, ck, cq_bias, ck_bias, wphi, wphi if wphi_k is None else wphi_k, conv_q, conv_k, state, z, indices,
        activation_flag(activation), tau, -math.inf if clamp_min is None else _checks.number("clamp_min", clamp_min),
        state.shape[2] ** -0.5 if scale is None else scale, eps, fm_eps,
    )  # fmt: skip


# --- checks ----------------------------------------


def _heads(name: str, x: object, form: str, dims: int) -> None:
    _checks.tensor(name, x)
    assert isinstance(x, torch.Tensor)
    if x.dim() != dims or (x.numel() == 0 and any(size < 1 for size in x.shape[1:])):
        raise ValueError(f"{name}: expected shape {form}, got {list(x.shape)}")


def _check_shapes(
    q0: torch.Tensor,
    k0: torch.Tensor,
    v: torch.Tensor,
    u: torch.Tensor | None,
    cq: torch.Tensor,
    ck: torch.Tensor,
    cq_bias: torch.Tensor | None,
    ck_bias: torch.Tensor | None,
    wphi: torch.Tensor,
    wphi_k: torch.Tensor,
    conv_q: torch.Tensor,
    conv_k: torch.Tensor,
    state: torch.Tensor,
    z: torch.Tensor | None,
    state_indices: torch.Tensor | None,
) -> torch.Tensor | None:
    """Everything but the numbers; returns the indices as int64."""
    for name, x in (("q0", q0), ("k0", k0), ("v", v)):
        _heads(name, x, "[B, H, D]", 3)
    _heads("state", state, "[P, H, 2f, V]", 4)
    _heads("cq", cq, "[H d, W]", 2)
    _heads("wphi", wphi, "[H, d, f]", 3)
    batch, queries, d = q0.shape
    pool, states, keys, columns = state.shape
    taps, f = cq.shape[1], keys // 2
    for name, size, most in (
        ("cq", taps, MAX_TAPS),
        ("q0", d, MAX_DIM),
        ("v", columns, MAX_DIM),
        ("wphi", keys, MAX_DIM),
    ):
        if size > most:
            what = {"cq": "taps", "wphi": "features"}.get(name, "channels of a head")
            raise ValueError(f"{name}: expected at most {most} {what}, got {size}")
    if keys % 2:
        raise ValueError(f"state: expected an even number of features, [P, H, 2f, V], got {list(state.shape)}")
    if queries % states:
        raise ValueError(f"q0: expected a multiple of the {states} heads of state, got {queries}")
    for name, x, whole in (("k0", k0, states), ("v", v, states)):
        if whole % x.shape[1]:
            raise ValueError(f"{name}: expected a number of heads that divides {whole}, got {x.shape[1]}")
    maps, key_maps = (x.shape[0] if isinstance(x, torch.Tensor) and x.dim() else 0 for x in (wphi, wphi_k))
    shared = wphi_k is wphi
    for name, count, whole in (("wphi", maps, queries), ("wphi" if shared else "wphi_k", key_maps, states)):
        if count < 1 or whole % count:
            raise ValueError(f"{name}: expected a number of maps that divides the {whole} heads it is for, got {count}")
    expected: tuple[tuple[str, torch.Tensor | None, tuple[int, ...]], ...] = (
        ("k0", k0, (batch, k0.shape[1], d)),
        ("v", v, (batch, v.shape[1], columns)),
        ("cq", cq, (queries * d, taps)),
        ("ck", ck, (states * d, taps)),
        ("cq_bias", cq_bias, (queries * d,)),
        ("ck_bias", ck_bias, (states * d,)),
        ("wphi", wphi, (maps, d, f)),
        ("wphi_k", None if shared else wphi_k, (key_maps, d, f)),
        ("conv_q", conv_q, (pool, queries * d, taps - 1)),
        ("conv_k", conv_k, (pool, k0.shape[1] * d, taps - 1)),
    )
    for name, tensor, shape in expected:
        if tensor is not None:
            _checks.like(name, tensor, shape, q0, "q0")
    if u is not None:
        _check_logits(u, q0, states, keys)
    wide = torch.float64 if q0.dtype is torch.float64 else torch.float32
    sums: dict[str, torch.Tensor | None] = {"state": state, "z": z}
    for name, pool_of in sums.items():
        if pool_of is None:
            continue
        if not isinstance(pool_of, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(pool_of).__name__}")
        if name == "z" and pool_of.shape != (pool, states, keys):
            raise ValueError(f"z: expected shape {[pool, states, keys]}, got {list(pool_of.shape)}")
        if pool_of.dtype is not wide:
            raise TypeError(f"{name}: expected {wide}, got {pool_of.dtype}")
        if pool_of.device != q0.device:
            raise ValueError(f"{name}: expected device {q0.device} as q0 has, got {pool_of.device}")
    if state_indices is not None:
        return _checks.indices("state_indices", state_indices, batch, pool, q0.device).to(torch.int64)
    if pool != batch:
        raise ValueError(f"state: expected {batch} states, one per row of q0, got {pool}")
    return None


def _check_logits(u: torch.Tensor, q0: torch.Tensor, states: int, keys: int) -> None:
    _checks.tensor("u", u)
    if u.dim() not in (2, 3) or u.shape[0] != q0.shape[0] or (u.dim() == 3 and u.shape[2] != keys):
        raise ValueError(f"u: expected shape [{q0.shape[0]}, H, {keys}] or [{q0.shape[0]}, H], got {list(u.shape)}")
    if u.shape[1] < 1 or states % u.shape[1]:
        raise ValueError(f"u: expected a number of heads that divides {states}, got {u.shape[1]}")
    if u.dtype not in (torch.float32, q0.dtype):
        raise TypeError(f"u: expected float32 or {q0.dtype} as q0 has, got {u.dtype}")
    if u.device != q0.device:
        raise ValueError(f"u: expected device {q0.device} as q0 has, got {u.device}")
