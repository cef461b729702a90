"""Rules by which operators take DTensors: whole batches and whole heads, forward and backward.

A rule lists what is acceptable on one dimension of a mesh; torch combines several. None splits a sequence whose tokens meet: that
needs messages inside an operator. `register_sharding` is an experiment of torch, and is used in this file alone. The CATS MLP,
whose training is no operator, is called with this process's parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from ..contract import HANDLES
from ..ops import _call
from ..ops.cats_mlp import cats_mlp, sparse_limit
from ..ops.quantised_cats_mlp import quantised_cats_mlp
from ..reference.quantised_linear import GROUP

Named = Mapping[
    str, Any
]  # by the names of an operator's schema: its arguments, tensors as torch describes them, or placements
Choice = tuple[list[Any], Named]  # placements of the results, and of arguments; those that are not named are whole
WHOLE = Replicate()


def _register(operator: str, rule: Callable[[Named], list[Choice]]) -> None:
    handles = [HANDLES[backend][operator] for backend in ("native", "triton")]
    schema = handles[0]._schema
    names = [argument.name for argument in schema.arguments]

    def acceptable(*arguments: Any) -> list[tuple[list[Any], list[Any]]]:
        given = dict(zip(names, arguments, strict=False))
        tensors = [name for name in names if hasattr(given.get(name), "mesh")]
        nothing: Choice = ([WHOLE] * len(schema.returns), {})
        found = []
        for results, placed in [nothing, *rule(given)]:
            found.append((results, [placed.get(name, WHOLE) if name in tensors else None for name in names]))
        return found

    register_sharding(handles)(acceptable)


def _ranks(x: Any) -> int:
    """Of the mesh; a rule holds for one dimension of it, and so for any."""
    return prod(x.mesh.shape)


def _shared(x: Any, dim: int, n: int) -> Any:
    """How a tensor with heads that others share goes with theirs: divided evenly, or whole where it has one; None: not at all."""
    if x is None:
        return WHOLE
    count = x.shape[dim]
    return Shard(dim) if count % n == 0 else WHOLE if count == 1 else None


def _broadcast(x: Any, dim: int) -> Any:
    """How a tensor goes with others in a dimension along which it may be broadcast."""
    return WHOLE if x is None or x.shape[dim] == 1 else Shard(dim)


def _gradient(x: Any, placement: Any) -> Any:
    """Of an argument that is placed so: a part of a sum where it is whole and its users are not."""
    return WHOLE if x is None else Partial() if placement == WHOLE else placement


# --- gated linear attention ----------------------------------------


def _linear(x: Named) -> list[tuple[Any, dict[str, Any]]]:
    """(placement of queries, of arguments): by rows, by heads."""
    q, n = x["q"], _ranks(x["q"])
    found: list[tuple[Any, dict[str, Any]]] = []
    if x["cu_seqlens"] is None and q.shape[0] % n == 0:
        found.append((Shard(0), dict.fromkeys(("q", "k", "v", "g", "s0", "z0"), Shard(0))))
    shared = {name: _shared(x[name], 2, n) for name in ("k", "v", "g")}
    states = max(x[name].shape[2] for name in shared if x[name] is not None)
    if states % n == 0 and None not in shared.values():
        found.append((Shard(2), {"q": Shard(2), "s0": Shard(1), "z0": Shard(1), **shared}))
    return found


def _linear_forward(x: Named) -> list[Choice]:
    def results(heads: Any, state: Any) -> list[Any]:
        normal = x["normalize"]
        return [heads, heads if normal else WHOLE, state, state if normal else WHOLE]

    return [(results(heads, placed["s0"]), placed) for heads, placed in _linear(x)]


def _linear_backward(x: Named) -> list[Choice]:
    found: list[Choice] = []
    for heads, placed in _linear(x):
        results = [_gradient(x[name], placed[name]) for name in ("q", "k", "v", "g", "s0", "z0")]
        state, den = placed["s0"], heads if x["normalize"] else WHOLE
        found.append((results, placed | {"grad_o": heads, "grad_s": state, "grad_z": state, "den": den}))
    return found


# --- interval attention ----------------------------------------

_MASK = ("starts", "ends", "key_start", "key_stop", "key_bias")


def _attention(x: Named) -> list[tuple[Any, dict[str, Any]]]:
    q, k, n = x["q"], x["k"], _ranks(x["q"])
    found: list[tuple[Any, dict[str, Any]]] = []

    def masks(dim: int) -> dict[str, Any]:
        return {name: _broadcast(x[name], dim) for name in (*_MASK, "alibi_slopes")}

    if q.shape[0] % n == 0:
        found.append((Shard(0), {"q": Shard(0), "k": Shard(0), "v": Shard(0), **masks(0)}))
    keys = _shared(k, 2, n)
    if keys is not None and q.shape[2] % n == 0:
        found.append((Shard(2), {"q": Shard(2), "k": keys, "v": keys, "sink_logits": Shard(0), **masks(1)}))
    return found


def _attention_forward(x: Named) -> list[Choice]:
    return [([heads] * 3, placed) for heads, placed in _attention(x)]


def _attention_backward(x: Named) -> list[Choice]:
    found: list[Choice] = []
    for heads, placed in _attention(x):
        bias = WHOLE if x["key_bias"] is None else Shard(0) if heads == Shard(0) else Shard(1)
        keys = _gradient(x["k"], placed["k"])
        upstream = dict.fromkeys(("grad_out", "grad_lse", "out", "stats"), heads)
        found.append(([heads, keys, keys, bias, heads], placed | upstream))
    return found


# --- feature maps ----------------------------------------


def _map(x: Named) -> list[tuple[Any, dict[str, Any]]]:
    of, weight, n = x["x"], x["weight"], _ranks(x["x"])
    found: list[tuple[Any, dict[str, Any]]] = [
        (Shard(dim), {"x": Shard(dim)}) for dim in (0, 1) if of.shape[dim] % n == 0
    ]
    if of.shape[2] % n == 0:
        found.append((Shard(2), {"x": Shard(2)} | ({} if weight is None else {"weight": Shard(0)})))
    return found


def _map_forward(x: Named) -> list[Choice]:
    return [([heads], placed) for heads, placed in _map(x)]


def _map_backward(x: Named) -> list[Choice]:
    return [
        ([heads, _gradient(x["weight"], placed.get("weight", WHOLE))], placed | {"grad_out": heads})
        for heads, placed in _map(x)
    ]


# --- convolutions ----------------------------------------


def _convolution(x: Named) -> list[tuple[Any, Any, dict[str, Any]]]:
    """(placement of results, of states, of arguments): by rows, by heads of the input."""
    of, n = x["x"], _ranks(x["x"])
    found: list[tuple[Any, Any, dict[str, Any]]] = []
    if x["cu_seqlens"] is None and of.shape[0] % n == 0:
        found.append((Shard(0), Shard(0), dict.fromkeys(("x", "residual", "initial_state"), Shard(0))))
    # The width of a head is a number, and the same on all ranks. It is all channels where these are in no groups.
    width = x["fm_weight"].shape[1] if "fm_weight" in x else x["head_dim"]
    if of.shape[2] % (width * n) == 0:
        weights = dict.fromkeys(("weight", "bias", "conv_weight", "conv_bias", "fm_weight"), Shard(0))
        found.append((Shard(2), Shard(1), {"x": Shard(2), "residual": Shard(2), "initial_state": Shard(1), **weights}))
    return found


def _convolution_forward(x: Named) -> list[Choice]:
    last = x["output_final_state"]
    return [([heads, state if last else WHOLE], placed) for heads, state, placed in _convolution(x)]


def _convolution_backward(x: Named) -> list[Choice]:
    weights = ("conv_weight", "fm_weight", "conv_bias") if "fm_weight" in x else ("weight", "bias")
    found: list[Choice] = []
    for heads, state, placed in _convolution(x):
        shared = [_gradient(x[name], placed.get(name, WHOLE)) for name in weights]
        results = [heads, *shared, _gradient(x["initial_state"], state)]
        found.append((results, placed | {"grad_y": heads, "grad_phi": heads, "grad_final": state}))
    return found


# --- products with weights in few bits ----------------------------------------


def _product(x: Named, rows: str) -> list[tuple[Any, dict[str, Any]]]:
    """By rows of the tensor of this name, by outputs."""
    n = _ranks(x[rows])
    found: list[tuple[Any, dict[str, Any]]] = []
    if x[rows].shape[0] % n == 0:
        found.append((Shard(0), {rows: Shard(0)}))
    if x["weight"].shape[0] % n == 0:
        found.append((Shard(1), {"weight": Shard(0), "bias": Shard(0)}))
    return found


def _product_forward(x: Named) -> list[Choice]:
    return [([outputs], placed) for outputs, placed in _product(x, "x")]


def _product_backward(x: Named) -> list[Choice]:
    return [
        ([outputs if outputs == Shard(0) else Partial()], placed | {"grad_y": outputs})
        for outputs, placed in _product(x, "grad_y")
    ]


for _operator, _rule in (
    ("gated_linear_attention_fwd", _linear_forward),
    ("gated_linear_attention_bwd", _linear_backward),
    ("interval_attention_fwd", _attention_forward),
    ("interval_attention_bwd", _attention_backward),
    ("feature_map_fwd", _map_forward),
    ("feature_map_bwd", _map_backward),
    ("causal_conv1d_fwd", _convolution_forward),
    ("causal_conv1d_bwd", _convolution_backward),
    ("conv_feature_map_fwd", _convolution_forward),
    ("conv_feature_map_bwd", _convolution_backward),
    ("quantised_linear_fwd", _product_forward),
    ("quantised_linear_bwd", _product_backward),
):
    _register(_operator, _rule)


# --- the CATS MLP ----------------------------------------

_NEURONS = {"w_gate": Shard(0), "w_up": Shard(0), "w_down": Shard(1), "b_gate": Shard(0), "b_up": Shard(0)}
_CODES = _NEURONS | {"w_down": Shard(0), "down_scales": Shard(0)}  # whose rows are neurons, scales those of 32


def _cats(
    given: Mapping[str, DTensor], neurons: Mapping[str, Any], alone: bool, dim: int
) -> tuple[Any, Mapping[str, Any]]:
    """(placement of the result, of arguments) on a dimension of the mesh: by neurons, by tokens that are `alone`, or whole."""
    count, size = given["w_gate"].shape[0], given["x"].device_mesh.size()
    fits = "down_scales" not in given or count % (GROUP * size) == 0
    if fits and any(name in given and not given[name].placements[dim].is_replicate() for name in neurons):
        each = "threshold" in given and given["threshold"].shape == (count,)
        return Partial(), {**neurons, "threshold": Shard(0) if each else WHOLE}
    own: Any = given["x"].placements[dim]
    if alone and any(own == Shard(d) for d in range(given["x"].dim() - 1)):
        return own, {"x": own}
    return WHOLE, {}


def _on_parts(function: Callable[..., Any], neurons: Mapping[str, Any]) -> Callable[..., Any]:
    """A function of tensors by name that fit each other; among them a threshold, which may be a number."""

    def call(
        tensors: Mapping[str, Any], *, mask_mode: str, prefill: str, max_sparse_tokens: int | None, **options: Any
    ) -> Any:
        given: dict[str, Any] = {name: x for name, x in tensors.items() if isinstance(x, torch.Tensor)}
        for name, x in given.items():
            if not isinstance(x, DTensor):
                raise TypeError(f"{name}: expected a DTensor as x is, got a {type(x).__name__}")
            if x.device_mesh != given["x"].device_mesh:
                raise ValueError(f"{name}: expected the mesh of x, {given['x'].device_mesh}, got {x.device_mesh}")
        x, mesh, local = given["x"], given["x"].device_mesh, dict(tensors)
        if prefill == "dense" and x.numel() > sparse_limit(max_sparse_tokens) * x.shape[-1]:  # of all processes' tokens
            given.pop("threshold", None)
            local["threshold"], prefill = -1.0, "masked"
        chosen = [_cats(given, neurons, mask_mode == "token", dim) for dim in range(mesh.ndim)]
        results = [result for result, _ in chosen]
        for name, tensor in given.items():
            placed = [placements.get(name, WHOLE) for _, placements in chosen]
            parts = [p if result == WHOLE else _gradient(tensor, p) for result, p in zip(results, placed, strict=True)]
            local[name] = tensor.redistribute(placements=placed).to_local(grad_placements=parts)
        if local["b_down"] is not None:  # is added once
            where = zip(mesh.get_coordinate() or (), results, strict=False)
            first = all(rank == 0 for rank, result in where if result == Partial())
            local["b_down"] = torch.where(torch.tensor(first, device=x.device), local["b_down"], 0.0)
        more = {"mask_mode": mask_mode, "prefill": prefill, "max_sparse_tokens": max_sparse_tokens}
        y = function(**local, **more, **options)
        if isinstance(y, torch.Tensor):
            return _joined(y, mesh, results, x.shape)
        last = Shard(x.dim() - 1)  # neurons, of the mask
        of_mask = [last if result == Partial() else result for result in results]
        shape = (*x.shape[:-1], given["w_gate"].shape[0])
        return _joined(y[0], mesh, results, x.shape), _joined(y[1], mesh, of_mask, shape)

    return call


def _joined(part: torch.Tensor, mesh: Any, placements: list[Any], shape: tuple[int, ...]) -> DTensor:
    whole = torch.empty(shape, device="meta")
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


_call.DTENSORS["cats_mlp"] = _on_parts(cats_mlp, _NEURONS)
_call.DTENSORS["quantised_cats_mlp"] = _on_parts(quantised_cats_mlp, _CODES)
