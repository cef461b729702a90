"""Argument checks shared by the ops. Every message names the argument, what was expected and what came."""

from __future__ import annotations

import math

import torch

from .. import _env
from ..reference.cats_activation import ACTIVATIONS

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LARGEST = torch.finfo(torch.float32).max
_DEBUG = _env.read().debug


def choice(name: str, value: str, allowed: tuple[str, ...]) -> int:
    """Position of `value` among `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
    return allowed.index(value)


def flag(name: str, value: bool) -> None:
    """`value` is a bool; a string would count as true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def activation_code(name: str) -> int:
    """The number the kernels know an activation by."""
    return choice("activation", name, ACTIVATIONS)


def tensor(name: str, value: object) -> None:
    """`value` is a tensor of a floating dtype the package knows."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {value.dtype}")


def like(name: str, value: torch.Tensor, shape: tuple[int, ...], of: torch.Tensor, of_name: str) -> None:
    """`value` has this shape and the dtype and device of `of`."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")
    if value.dtype is not of.dtype:
        raise TypeError(f"{name}: expected {of.dtype} as {of_name} has, got {value.dtype}")
    if value.device != of.device:
        raise ValueError(f"{name}: expected device {of.device} as {of_name} has, got {value.device}")


def threshold(value: float | torch.Tensor, channels: int, device: torch.device) -> torch.Tensor:
    """A float, 0-d, [1] or [channels] float32 tensor, as a 1-D float32 tensor on `device`.

    NaN is refused: it would silently make every neuron active. On a GPU that check would wait for the device, so it runs there
    only under SUBQUAD_DEBUG=1.
    """
    if isinstance(value, torch.Tensor):
        if value.dtype is not torch.float32:
            raise TypeError(f"threshold: expected float32, got {value.dtype}")
        if value.device != device:
            raise ValueError(f"threshold: expected device {device} as the input has, got {value.device}")
        if value.dim() > 1 or (value.dim() == 1 and value.shape[0] not in (1, channels)):
            raise ValueError(f"threshold: expected shape [], [1] or [{channels}], got {list(value.shape)}")
        if not torch.compiler.is_compiling() and (value.device.type == "cpu" or _DEBUG) and _has_nan(value):
            raise ValueError("threshold: expected numbers, got NaN")
        if value.requires_grad:
            value = value.detach()
        return value if value.dim() else value.reshape(1)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"threshold: expected a float or a float32 tensor, got {type(value).__name__}")
    if value != value:  # NaN; math.isnan cannot be traced when torch.compile makes the float dynamic
        raise ValueError("threshold: expected a number, got NaN")
    if not -_LARGEST <= value <= _LARGEST:
        value = math.inf if value > 0 else -math.inf
    return torch.full((1,), value, dtype=torch.float32, device=device)


def _has_nan(value: torch.Tensor) -> bool:
    if value.device.type == "meta" or torch._C._are_functorch_transforms_active():
        return False
    return math.isnan(value.item()) if value.numel() == 1 else bool(torch.isnan(value).any())


def not_double(name: str, value: torch.Tensor, backend: str) -> None:
    """float64 exists for the reference alone."""
    if value.dtype is torch.float64:
        raise TypeError(f"{name}: backend {backend!r} expected float32, bfloat16 or float16, got float64")


def number(name: str, value: object) -> float:
    """`value` is a finite float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
    if not -_LARGEST <= value <= _LARGEST:  # math.isfinite cannot be traced when torch.compile makes the float dynamic
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return value


def _integers(name: str, value: object, device: torch.device) -> torch.Tensor:
    """`value` as int64, one-dimensional."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 or int64, got {value.dtype}")
    if value.dim() != 1:
        raise ValueError(f"{name}: expected one dimension, got shape {list(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name}: expected device {device} as the input has, got {value.device}")
    return value.to(torch.int64).contiguous()


def _readable(value: torch.Tensor) -> bool:
    """Whether reading values here costs no wait for a device and breaks no graph."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    fake = value.device.type == "meta" or isinstance(value, torch._subclasses.FakeTensor)
    return not traced and not fake and (value.device.type == "cpu" or _DEBUG)


def cu_seqlens(value: object, batch: int, tokens: int, device: torch.device) -> torch.Tensor:
    """Bounds [N + 1] of packed sequences, as int64: from 0 to `tokens`, never decreasing, with a batch of 1."""
    bounds = _integers("cu_seqlens", value, device)
    if batch != 1:
        raise ValueError(f"cu_seqlens: expected a batch of 1 with packed sequences, got {batch}")
    if bounds.shape[0] < 1:
        raise ValueError("cu_seqlens: expected at least one element, got none")
    if _readable(bounds):
        if int(bounds[0]) != 0 or int(bounds[-1]) != tokens:
            raise ValueError(
                f"cu_seqlens: expected bounds from 0 to {tokens}, got {int(bounds[0])} to {int(bounds[-1])}"
            )
        if bool((bounds.diff() < 0).any()):
            raise ValueError("cu_seqlens: expected bounds that do not decrease")
    return bounds


def indices(name: str, value: object, count: int, pool: int, device: torch.device) -> torch.Tensor:
    """[count] places in a pool, as int64; -1 skips. No place is named twice."""
    places = _integers(name, value, device)
    if places.shape[0] != count:
        raise ValueError(f"{name}: expected shape [{count}], got {list(places.shape)}")
    if _readable(places):
        if bool(((places < -1) | (places >= pool)).any()):
            raise ValueError(f"{name}: expected indices in -1..{pool - 1}, got {places.tolist()}")
        used = places[places >= 0]
        if used.unique().numel() != used.numel():
            raise ValueError(f"{name}: expected every state at most once, got {places.tolist()}")
    return places
