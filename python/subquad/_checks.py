"""Checks of arguments for ops, masks and modules. A message names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from . import _env

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER_DTYPES = (torch.int32, torch.int64)
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


def tensor(name: str, value: object) -> None:
    """`value` is a tensor of a floating dtype the package knows."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {value.dtype}")
    if value.layout is not torch.strided:
        dense(name, value)


def dense(name: str, value: torch.Tensor) -> None:
    """`value` has strides: it is not sparse, nested or of a library's own layout."""
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {value.layout}")


def module(name: str, value: object) -> None:
    """`value` is a module."""
    if not isinstance(value, torch.nn.Module):
        raise TypeError(f"{name}: expected a torch.nn.Module, got {type(value).__name__}")


def memory(name: str, value: torch.Tensor) -> None:
    """`value` still has its memory, which sharded parameters give up between their uses: PyTorch itself would read it.

    Kernels check it themselves; this is for what is done to arguments before.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or value.is_meta:
        return
    if value.numel() and not value.untyped_storage().nbytes():
        raise ValueError(f"{name}: expected a tensor with memory, got one whose storage was freed")


def like(name: str, value: object, shape: tuple[int, ...] | None, of: torch.Tensor, of_name: str) -> None:
    """`value` is a tensor of this shape, if one is given, and of the dtype and device of `of`."""
    if (
        isinstance(value, torch.Tensor)
        and value.dtype is of.dtype
        and value.layout is torch.strided
        and value.device == of.device
        and (shape is None or value.shape == shape)
    ):
        return
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if shape is not None and value.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")
    if value.dtype is not of.dtype:
        raise TypeError(f"{name}: expected {of.dtype} as {of_name} has, got {value.dtype}")
    dense(name, value)
    same_device(name, value, of.device, of_name)


def threshold(value: float | torch.Tensor, channels: int, device: torch.device) -> torch.Tensor:
    """A float, 0-d, [1] or [channels] float32 tensor, as a 1-D float32 tensor on `device`.

    NaN is refused: it would silently make every neuron active. On a GPU that check would wait for the device, so it runs there
    only under SUBQUAD_DEBUG=1.
    """
    if isinstance(value, torch.Tensor):
        if value.dtype is not torch.float32:
            raise TypeError(f"threshold: expected float32, got {value.dtype}")
        dense("threshold", value)
        same_device("threshold", value, device)
        if value.dim() > 1 or (value.dim() == 1 and value.shape[0] not in (1, channels)):
            raise ValueError(f"threshold: expected shape [], [1] or [{channels}], got {list(value.shape)}")
        memory("threshold", value)
        if readable(value) and _has_nan(value):
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


_thresholds: dict[float, torch.Tensor] = {}  # of floats, on the CPU, never written to


def unread_threshold(value: Any, device: torch.device) -> Any:
    """`threshold` for operators that look at tensors of a CPU themselves; the tensor of a float is made once."""
    if isinstance(value, torch.Tensor) and (value.is_cpu or not _DEBUG):
        return value
    if type(value) is not float or device.type != "cpu":
        return threshold(value, value.numel() if isinstance(value, torch.Tensor) else 1, device)
    made = _thresholds.get(value)
    if made is None:
        with torch.inference_mode(False):
            made = threshold(value, 1, device)
        if type(made) is torch.Tensor and len(_thresholds) < 256:  # not what a mode made of it
            _thresholds[value] = made
    return made


def _has_nan(value: torch.Tensor) -> bool:
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


def size(name: str, value: object, least: int = 0) -> None:
    """`value` is an int (or a symbolic one) of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def hidden(value: object, width: int) -> None:
    """`hidden_states` of a layer: [B, T, width]."""
    tensor("hidden_states", value)
    assert isinstance(value, torch.Tensor)
    if value.dim() != 3 or value.shape[2] != width:
        raise ValueError(f"hidden_states: expected shape [B, T, {width}], got {list(value.shape)}")


def some_seen(sink_tokens: int, window: int) -> None:
    """A token sees something: there are sinks or a window."""
    if not sink_tokens and not window:
        raise ValueError("window: expected at least 1 without sinks, for a token to see itself, got 0")


def elements(**sizes: int) -> None:
    """A tensor of these sizes can be asked for: their product, in elements, has bytes that 64 bits count. Names the largest."""
    if math.prod(max(1, n) for n in sizes.values()) >= 2**60:
        name = max(sizes, key=lambda size: sizes[size])
        raise ValueError(f"{name}: expected sizes of a tensor below 2^60 elements, got {sizes[name]}")


def device(name: str, value: torch.device | str | int | None) -> torch.device | None:
    """The device that is meant, or None."""
    if value is None or isinstance(value, torch.device):
        return value
    try:
        return torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{name}: expected a torch.device or the name of one, got {value!r}") from error


def mapping(name: str, value: object) -> None:
    """`value` has names, as a state dict has."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected a mapping of names, got {type(value).__name__}")


def integers(
    name: str, value: object, dims: int | None = None, dtypes: tuple[torch.dtype, ...] = INTEGER_DTYPES
) -> torch.Tensor:
    """`value` is a tensor of one of these integer dtypes, of `dims` dimensions if that is given."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(
            f"{name}: expected {' or '.join(str(t).removeprefix('torch.') for t in dtypes)}, got {value.dtype}"
        )
    dense(name, value)
    if dims is not None and value.dim() != dims:
        raise ValueError(f"{name}: expected {dims} dimensions, got shape {list(value.shape)}")
    return value


def booleans(name: str, value: object) -> None:
    """`value` is a bool tensor."""
    if not isinstance(value, torch.Tensor) or value.dtype is not torch.bool:
        raise TypeError(f"{name}: expected a bool tensor, got {getattr(value, 'dtype', type(value).__name__)}")
    dense(name, value)


def same_device(name: str, value: torch.Tensor, device: torch.device, of: str = "the input") -> None:
    """`value` lies on this device, which is that of `of`."""
    if value.device != device:
        raise ValueError(f"{name}: expected device {device} as {of} has, got {value.device}")


def traced(value: torch.Tensor) -> bool:
    """Whether `value` has no values to read: under torch.compile, export, a transform, capture, or on the meta device."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    if value.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return True
    return value.device.type == "meta" or isinstance(value, torch._subclasses.FakeTensor)


def readable(value: torch.Tensor) -> bool:
    """Whether reading values here costs no wait for a device and breaks no graph."""
    return not traced(value) and (value.device.type == "cpu" or _DEBUG)


def hold(fact: torch.Tensor, message: str) -> None:
    """ValueError if a bool [] is False; in compiled code, which has no values yet, a RuntimeError when it runs."""
    if torch.compiler.is_compiling():
        torch._assert_async(fact, message)
    elif not bool(fact):
        raise ValueError(message)


def no_gradient(name: str, value: torch.Tensor | None, hint: str = "") -> None:
    """`value` needs no gradient, for the op has none: a gradient is never dropped silently."""
    if value is not None and value.requires_grad:
        more = f"; {hint}" if hint else ""
        raise ValueError(f"{name}: expected a tensor without requires_grad, for there is no gradient here{more}")


def indices(name: str, value: object, count: int, pool: int, device: torch.device) -> torch.Tensor:
    """[count] places in a pool, int32 or int64; -1 skips. No place is named twice."""
    places = integers(name, value)
    same_device(name, places, device)
    if places.shape != (count,):
        raise ValueError(f"{name}: expected shape [{count}], got {list(places.shape)}")
    if readable(places):
        numbers = places.tolist()
        if any(not -1 <= n < pool for n in numbers):
            raise ValueError(f"{name}: expected numbers in -1..{pool - 1}, got {shown(numbers)}")
        used = [n for n in numbers if n >= 0]
        if len(set(used)) != len(used):
            raise ValueError(f"{name}: expected every place at most once, got {shown(numbers)}")
    return places


def shown(numbers: list[int]) -> str:
    """A list for a message, its middle left out when it is long."""
    if len(numbers) <= 8:
        return str(numbers)
    return f"[{', '.join(map(str, numbers[:4]))}, ..., {', '.join(map(str, numbers[-3:]))}]"


def unshared(names: tuple[str, ...], values: Sequence[Any], tensors: tuple[int, ...], written: tuple[int, ...]) -> None:
    """No element of a tensor that is written to, `values[i]` with i in `written`, is another one's or lies there twice.

    Slices of one buffer that interleave are told apart from those that overlap. Under torch.compile, where memory has no
    addresses, only the same tensor given twice is found.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or values[tensors[0]].is_meta:
        return _not_twice(names, values, tensors, written)
    ranges = []
    for i in tensors:
        x = values[i]
        if x is None:
            continue
        if type(x) not in _PLAIN and isinstance(x, torch._subclasses.FakeTensor):
            return _not_twice(names, values, tensors, written)
        begin, whole = x.data_ptr(), x.is_contiguous()
        ranges.append((begin, begin + (x.nbytes if whole else _extent(x)), i))
        if not whole and i in written and _overlaps_itself(x):
            raise ValueError(
                f"{names[i]}: expected elements of their own, for they are written to, got strides {list(x.stride())}"
            )
    if not _may_meet(ranges, written):
        return
    for begin, end, i in ranges:
        if i not in written:
            continue
        for other_begin, other_end, j in ranges:
            if begin < other_end and other_begin < end and j != i and _overlap(values[i], values[j]):
                raise ValueError(f"{names[i]}: {_SHARED} {names[j]} has")


def _may_meet(ranges: list[tuple[int, int, int]], written: tuple[int, ...]) -> bool:
    """Whether the bytes from the first to the last of one that is written to, (begin, end, i), meet those of another."""
    read_to = written_to = 0  # where those that begin before end
    for begin, end, i in sorted(ranges):
        if begin < written_to or (begin < read_to and i in written):
            return True
        if i in written:
            written_to = end if end > written_to else written_to
        elif end > read_to:
            read_to = end
    return False


_SHARED = "expected memory of its own, for it is written to, got some that"
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _not_twice(
    names: tuple[str, ...], values: Sequence[Any], tensors: tuple[int, ...], written: tuple[int, ...]
) -> None:
    """`unshared` where tensors have no addresses: under a compiler or transform, or of shapes alone."""
    for i in written:
        for j in tensors:
            if j != i and values[i] is not None and values[j] is values[i]:
                raise ValueError(f"{names[i]}: {_SHARED} {names[j]} has")


def _extent(x: torch.Tensor) -> int:
    """Bytes from the first element to behind the last."""
    if x.is_contiguous() or x.numel() == 0:
        return x.nbytes
    return (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))) * x.element_size()


def _overlaps_itself(x: torch.Tensor) -> bool:
    """Whether some stride is too short for the dimensions within it."""
    reach = 0
    for stride, n in sorted(zip(x.stride(), x.shape, strict=True)):
        if n > 1:
            if stride <= reach:
                return True
            reach += stride * (n - 1)
    return False


_Steps = list[tuple[int, int]]  # (stride, size) of every dimension, in bytes, the longest first


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors share a byte; True where that is too hard to say."""

    def steps(x: torch.Tensor) -> _Steps:
        dims = ((s * x.element_size(), n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1)
        return [*sorted(dims, reverse=True), (1, x.element_size())]

    return a.numel() > 0 and b.numel() > 0 and _meet(b.data_ptr() - a.data_ptr(), steps(a), steps(b))


def _meet(distance: int, a: _Steps, b: _Steps) -> bool:
    """Whether the bytes of b, which begins `distance` behind a, are some of a's."""
    end_a, end_b = (1 + sum(stride * (n - 1) for stride, n in x) for x in (a, b))
    if distance >= end_a or -distance >= end_b:
        return False
    stride = a[0][0]
    inner_a, inner_b = (1 + sum(s * (n - 1) for s, n in x[1:]) for x in (a, b))
    if len(a) > 1 and len(b) > 1 and stride == b[0][0] and inner_a <= stride and inner_b <= stride:
        # Rows of the same length: b's begin somewhere in a row of a, and may reach into the next.
        into = distance % stride
        return _meet(into, a[1:], b[1:]) or _meet(into - stride, a[1:], b[1:])
    return True
