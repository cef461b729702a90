"""The short convolution with arguments of several dtypes, which the peers' kernels take: models keep its weights in float32."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch

from .. import _checks
from ..ops._autograd import without_autocast
from ..ops.causal_conv1d import causal_conv1d, causal_conv1d_update


def convolve(x: torch.Tensor, *parameters: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`causal_conv1d`; where dtypes differ, in the widest of them, with both results rounded once to that of x.

    No weight is rounded, under autocast neither, and every argument has a gradient in its own dtype.
    """
    wide = _widest(x, *parameters, *options.values())
    if wide is None:
        return causal_conv1d(x, *parameters, **options)
    with without_autocast(x.device.type):
        y, final = causal_conv1d(
            x.to(wide), *(_to(wide, p) for p in parameters), **{n: _to(wide, o) for n, o in options.items()}
        )
    return y.to(x.dtype), None if final is None else final.to(x.dtype)


def update(x: torch.Tensor, conv_state: torch.Tensor, *parameters: Any, **options: Any) -> torch.Tensor:
    """`causal_conv1d_update`, likewise; the states are widened, and narrowed again, all of them."""
    wide = _widest(x, conv_state, *parameters, *options.values())
    if wide is None:
        return causal_conv1d_update(x, conv_state, *parameters, **options)
    given = {"conv_state": conv_state, "x": x} | {n: o for n, o in options.items() if isinstance(o, torch.Tensor)}
    if isinstance(conv_state, torch.Tensor):
        _checks.unshared(tuple(given), tuple(given.values()), tuple(range(len(given))), written=(0,))
    with without_autocast(x.device.type):
        state = conv_state.to(wide, copy=True)
        y = causal_conv1d_update(
            x.to(wide), state, *(_to(wide, p) for p in parameters), **{n: _to(wide, o) for n, o in options.items()}
        )
        conv_state.copy_(state)
    return y.to(x.dtype)


def _is_float(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _to(dtype: torch.dtype, x: Any) -> Any:
    return x.to(dtype) if _is_float(x) else x


def _widest(*arguments: Any) -> torch.dtype | None:
    """What holds the values of all float tensors, or None where they have one dtype, or x is none: an error to come."""
    dtypes = {x.dtype for x in arguments if _is_float(x)}
    return reduce(torch.promote_types, dtypes) if len(dtypes) > 1 and _is_float(arguments[0]) else None
