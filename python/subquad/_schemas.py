"""The contract of every op: one schema, three namespaces, one fake.

`subquad::<op>` is implemented in C++ (CPU and CUDA), `subquad_triton::<op>` by Triton launchers, `subquad_simt::<op>` by the
CUDA sources running in the host emulator. All are defined here, at import, from the same string, so that schemas and fakes
exist whether or not a native library is present; a library only adds implementations when it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

NAMESPACES = {"native": "subquad", "triton": "subquad_triton", "simt": "subquad_simt"}


@dataclass(frozen=True)
class Op:
    """One op: the stem names its files, `args` its schema, `fake` its output metadata; `cuda` whether CUDA C++ has it."""

    stem: str
    args: str
    fake: Callable[..., Any]
    cuda: bool = True


def _like(tensor: torch.Tensor) -> torch.Tensor:
    """What kernels return for a tensor of the same kind: contiguous whatever the strides of the argument."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


_CATS_MLP = (
    "Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, Tensor threshold, Tensor? b_gate, Tensor? b_up, Tensor? b_down, "
    "int activation, bool inclusive, bool union_mask"
)
_THRESHOLD = "Tensor threshold, int activation, bool inclusive"
_INTERVAL_ATTENTION = (
    "Tensor q, Tensor k, Tensor v, Tensor? starts, Tensor? ends, Tensor? key_start, Tensor? key_stop, int sink_tokens, "
    "int window, bool causal, Tensor? key_bias, Tensor? sink_logits, float scale, Tensor[] plan"
)


def _interval_attention_fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    b, t, h = q.shape[:3]
    return q.new_empty((b, t, h, v.shape[3])), q.new_empty((b, t, h), dtype=torch.float32)


def _interval_attention_bwd(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *mask: Any,
) -> tuple[torch.Tensor, ...]:
    key_bias = mask[7]
    dkey_bias = (q.shape[0], q.shape[2], k.shape[1]) if key_bias is not None else (0,)
    return (*map(_like, (q, k, v)), lse.new_empty(dkey_bias), _like(lse))


_GLA = (
    "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? s0, Tensor? z0, Tensor? cu_seqlens, float scale, float eps, "
    "bool normalize"
)


def _gla_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    s0: torch.Tensor | None,
    z0: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    eps: float,
    normalize: bool,
) -> tuple[torch.Tensor, ...]:
    b, t, heads, width = q.shape
    states = max(k.shape[2], v.shape[2], 1 if g is None else g.shape[2])
    count = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wide = q.new_empty((), dtype=torch.float32)
    den = wide.new_empty((b if normalize else 0, t, heads))
    z = wide.new_empty((count if normalize else 0, states, width))
    return q.new_empty((b, t, heads, v.shape[3])), den, wide.new_empty((count, states, width, v.shape[3])), z


def _gla_bwd(
    grad_o: torch.Tensor,
    grad_s: torch.Tensor,
    grad_z: torch.Tensor | None,
    den: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    s0: torch.Tensor | None,
    z0: torch.Tensor | None,
    *_: Any,
) -> tuple[torch.Tensor, ...]:
    states, width, columns = grad_s.shape[1:]
    ds0 = grad_s.new_empty((0, states, width, columns)) if s0 is None else _like(s0)
    dz0 = grad_s.new_empty((0, states, width)) if z0 is None else _like(z0)
    return (*map(_like, (q, k, v)), grad_s.new_empty((0,)) if g is None else _like(g), ds0, dz0)


_FEATURE_MAP = "Tensor x, Tensor? weight, int kind, bool fullspace, float eps"


def _feature_map_fwd(
    x: torch.Tensor, weight: torch.Tensor | None, kind: int, fullspace: bool, eps: float
) -> torch.Tensor:
    width = x.shape[3] if weight is None else weight.shape[2]
    return x.new_empty((*x.shape[:3], 2 * width if fullspace else width))


_CONV_FEATURE_MAP = (
    "Tensor x, Tensor conv_weight, Tensor fm_weight, Tensor? conv_bias, Tensor? initial_state, Tensor? cu_seqlens, "
    "Tensor? sequence, int groups, bool silu, int kind, bool fullspace, float eps"
)


def _conv_feature_map_fwd(
    x: torch.Tensor,
    conv_weight: torch.Tensor,
    fm_weight: torch.Tensor,
    bias: Any,
    state: Any,
    cu_seqlens: Any,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`final_state` is empty unless it was asked for, which is the last argument."""
    width, f = fm_weight.shape[1:]
    fullspace = rest[-3]
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = (sequences, x.shape[2], conv_weight.shape[1] - 1) if rest[-1] else (0,)
    shape = (*x.shape[:2], conv_weight.shape[0] // width, 2 * f if fullspace else f)
    return x.new_empty(shape), x.new_empty(final)


def _conv_feature_map_bwd(
    grad_phi: torch.Tensor, grad_final: Any, x: torch.Tensor, conv_weight: torch.Tensor, fm_weight: torch.Tensor,
    bias: Any, state: Any, *_: Any,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """The last two are empty where the forward had no such argument."""
    rest = (x.new_empty((0,)) if a is None else _like(a) for a in (bias, state))
    return (*map(_like, (x, conv_weight, fm_weight)), *rest)


_CAUSAL_CONV1D = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, {}Tensor? cu_seqlens, Tensor? sequence, "
    "int groups, int head_dim, bool silu"
)


def _causal_conv1d_fwd(
    x: torch.Tensor, weight: torch.Tensor, bias: Any, state: Any, residual: Any, cu_seqlens: Any, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`final_state` is empty unless it was asked for, which is the last argument."""
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = (sequences, x.shape[2], weight.shape[1] - 1) if rest[-1] else (0,)
    return x.new_empty((*x.shape[:2], weight.shape[0])), x.new_empty(final)


def _causal_conv1d_bwd(
    grad_y: torch.Tensor, grad_final: Any, x: torch.Tensor, weight: torch.Tensor, bias: Any, state: Any, *_: Any
) -> tuple[torch.Tensor, ...]:
    return (*map(_like, (x, weight)), *(x.new_empty((0,)) if a is None else _like(a) for a in (bias, state)))


OPS: dict[str, Op] = {
    "cats_mlp_fwd": Op("cats_mlp", f"({_CATS_MLP}) -> Tensor", lambda x, *_: _like(x)),
    "cats_activation_fwd": Op("cats_activation", f"(Tensor z, {_THRESHOLD}) -> Tensor", lambda z, *_: _like(z)),
    "cats_activation_bwd": Op(
        "cats_activation",
        f"(Tensor grad_a, Tensor z, {_THRESHOLD}, bool straight_through) -> Tensor",
        lambda grad_a, z, *_: _like(z),
    ),
    "cats_glu_fwd": Op("cats_activation", f"(Tensor z, Tensor u, {_THRESHOLD}) -> Tensor", lambda z, u, *_: _like(u)),
    "cats_glu_bwd": Op(
        "cats_activation",
        f"(Tensor grad_h, Tensor z, Tensor u, {_THRESHOLD}, bool straight_through) -> (Tensor, Tensor)",
        lambda grad_h, z, u, *_: (_like(z), _like(u)),
    ),
    "interval_attention_fwd": Op(
        "interval_attention", f"({_INTERVAL_ATTENTION}) -> (Tensor, Tensor)", _interval_attention_fwd
    ),
    "interval_attention_bwd": Op(
        "interval_attention",
        f"(Tensor grad_out, Tensor grad_lse, Tensor out, Tensor lse, {_INTERVAL_ATTENTION}) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor)",
        _interval_attention_bwd,
        cuda=False,
    ),
    "gated_linear_attention_fwd": Op(
        "gated_linear_attention", f"({_GLA}) -> (Tensor, Tensor, Tensor, Tensor)", _gla_fwd
    ),
    "gated_linear_attention_bwd": Op(
        "gated_linear_attention",
        f"(Tensor grad_o, Tensor grad_s, Tensor? grad_z, Tensor den, {_GLA}) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        _gla_bwd,
        cuda=False,
    ),
    "gated_linear_attention_step_": Op(
        "gated_linear_attention",
        "(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor(a!) state, Tensor(b!)? z, Tensor? state_indices, float scale, "
        "float eps) -> Tensor",
        lambda q, k, v, *_: q.new_empty((*q.shape[:2], v.shape[2])),
    ),
    "feature_map_fwd": Op("feature_map", f"({_FEATURE_MAP}) -> Tensor", _feature_map_fwd),
    "feature_map_bwd": Op(
        "feature_map",
        f"(Tensor grad_out, {_FEATURE_MAP}) -> (Tensor, Tensor)",
        lambda grad_out, x, weight, *_: (_like(x), x.new_empty((0,)) if weight is None else _like(weight)),
    ),
    "causal_conv1d_fwd": Op(
        "causal_conv1d",
        f"({_CAUSAL_CONV1D.format('Tensor? residual, ')}, bool output_final_state) -> (Tensor, Tensor)",
        _causal_conv1d_fwd,
    ),
    "causal_conv1d_bwd": Op(
        "causal_conv1d",
        f"(Tensor grad_y, Tensor? grad_final, {_CAUSAL_CONV1D.format('')}) -> (Tensor, Tensor, Tensor, Tensor)",
        _causal_conv1d_bwd,
    ),
    "causal_conv1d_update_": Op(
        "causal_conv1d",
        "(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, Tensor? residual, Tensor? cache_seqlens, "
        "Tensor? conv_state_indices, int groups, int head_dim, bool silu) -> Tensor",
        lambda x, conv_state, weight, *_: x.new_empty((*x.shape[:2], weight.shape[0])),
    ),
    "lawcat_decode_step_": Op(
        "lawcat_decode_step",
        "(Tensor q0, Tensor k0, Tensor v, Tensor? u, Tensor cq, Tensor ck, Tensor? cq_bias, Tensor? ck_bias, Tensor wphi, "
        "Tensor wphi_k, Tensor(a!) conv_q, Tensor(b!) conv_k, Tensor(c!) state, Tensor(d!)? z, Tensor? state_indices, "
        "bool silu, float tau, float clamp_min, float scale, float eps, float fm_eps) -> Tensor",
        lambda q0, k0, v, *_: q0.new_empty((*q0.shape[:2], v.shape[2])),
    ),
    "conv_feature_map_fwd": Op(
        "conv_feature_map",
        f"({_CONV_FEATURE_MAP}, bool output_final_state) -> (Tensor, Tensor)",
        _conv_feature_map_fwd,
    ),
    "conv_feature_map_bwd": Op(
        "conv_feature_map",
        f"(Tensor grad_phi, Tensor? grad_final, {_CONV_FEATURE_MAP}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _conv_feature_map_bwd,
    ),
}
STEMS = tuple(dict.fromkeys(op.stem for op in OPS.values()))
# Ops of one paper whose names have nothing in common.
FAMILIES = {
    "lawcat": (
        "causal_conv1d",
        "feature_map",
        "conv_feature_map",
        "gated_linear_attention",
        "lawcat_decode_step",
    )
}


def in_family(stem: str, family: str | None) -> bool:
    """Whether an op stem belongs to a family: listed, equal to its name, or beginning with that and an underscore."""
    return family is None or stem in FAMILIES.get(family, (family,)) or stem.startswith(family + "_")


def _triton_impl(name: str, stem: str) -> Callable[..., Any]:
    """The launcher of the same name, imported at its first call: importing subquad must not import triton."""
    launcher: Callable[..., Any] | None = None

    def call(*args: Any) -> Any:
        nonlocal launcher
        if launcher is None:
            launcher = getattr(import_module(f"subquad.kernels.{stem}"), name)
        return launcher(*args)

    return call


def _define() -> tuple[dict[str, dict[str, Any]], list[torch.library.Library]]:
    handles: dict[str, dict[str, Any]] = {backend: {} for backend in NAMESPACES}
    libraries = []
    for backend, namespace in NAMESPACES.items():
        library = torch.library.Library(namespace, "DEF")
        libraries.append(library)
        for name, op in OPS.items():
            library.define(name + op.args, tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"{namespace}::{name}", op.fake, lib=library)
            if backend == "triton":
                for key in ("CPU", "CUDA"):
                    library.impl(name, _triton_impl(name, op.stem), key)
            handles[backend][name] = getattr(getattr(torch.ops, namespace), name).default
    return handles, libraries


# HANDLES[backend][op] is the overload to call; the libraries are kept because definitions die with them.
HANDLES, _LIBRARIES = _define()
