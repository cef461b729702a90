"""Devices that watch an op at work: which operators it calls, and whether it stays inside its memory."""

from __future__ import annotations

import ctypes
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..contract import NAMESPACES

MARGIN = 512  # bytes on either side of a guarded tensor
ALIGNMENT = 64  # what torch's own CPU allocator gives
_PATTERN = 0xFF  # as a float of any width: NaN; as an integer: -1


class Traffic(NamedTuple):
    """What a call has done in the emulator: bytes that all lanes load and store; a shared value counts for each."""

    loaded: int
    stored: int
    launches: int
    barriers: int


def traffic(emulator: ctypes.CDLL, call: Callable[[], object]) -> Traffic:
    """Of all that `call` launches."""
    counters = (ctypes.c_uint64 * 4)()
    emulator.subquad_simt_reset_stats()
    call()
    emulator.subquad_simt_stats(counters)
    return Traffic(*counters)


@dataclass(frozen=True)
class OpCall:
    """One call of a raw operator with the very arguments it got, as they were before the call."""

    op: torch._ops.OpOverload
    args: tuple[Any, ...]
    result: Any

    @property
    def name(self) -> str:
        return self.op._schema.name.split("::")[1]

    def repeat(self) -> tuple[torch.Tensor, ...]:
        """The results of the same call again, followed by what it leaves in the arguments it writes to."""
        args = _fresh(self.op, self.args)
        result = self.op(*args)
        results = (result,) if isinstance(result, torch.Tensor) else tuple(result)
        return results + tuple(args[i] for i in _written(self.op) if args[i] is not None)


def _written(op: torch._ops.OpOverload) -> list[int]:
    return [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]


def _fresh(op: torch._ops.OpOverload, args: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments, with copies of those that the operator writes to."""
    written = _written(op)
    return tuple(a.clone() if i in written and a is not None else a for i, a in enumerate(args))


class _Recorder(TorchDispatchMode):
    def __init__(self, namespaces: Sequence[str]) -> None:
        super().__init__()
        self.namespaces = tuple(namespaces)
        self.calls: list[OpCall] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ours = func.namespace in self.namespaces
        before = _fresh(func, args) if ours else ()
        result = func(*args, **(kwargs or {}))
        if ours:
            self.calls.append(OpCall(func, before, result))
        return result


@contextmanager
def record_ops(backend: str | None = None) -> Iterator[list[OpCall]]:
    """Collect the calls of our raw operators (of one backend, or of all) made inside the block."""
    names = tuple(NAMESPACES.values()) if backend is None else (NAMESPACES[backend],)
    recorder = _Recorder(names)
    with recorder:
        yield recorder.calls


class Guards:
    """Tensors inside larger buffers: their margins must stay as they are, and inputs as a whole."""

    def __init__(self) -> None:
        self._allocated: list[tuple[str, torch.Tensor, int, int]] = []
        self._inputs: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, name: str = "an allocation") -> torch.Tensor:
        """A contiguous tensor of NaN between margins of NaN. Makes no call of aten::empty."""
        size = math.prod(shape) * dtype.itemsize
        raw = torch.frombuffer(bytearray([_PATTERN]) * (size + 2 * MARGIN + ALIGNMENT), dtype=torch.uint8)
        start = -raw.data_ptr() % ALIGNMENT + MARGIN
        self._allocated.append((name, raw, start, start + size))
        return raw[start : start + size].view(dtype).view(tuple(shape))

    def copy(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """A guarded input with the values and strides of `tensor`; NaN also between its rows if they are apart."""
        extent = (
            1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
        )
        inside = self.allocate((extent,), tensor.dtype, name).as_strided(tensor.shape, tensor.stride()).copy_(tensor)
        raw = self._allocated[-1][1]
        self._inputs.append((name, raw, raw.clone()))
        return inside

    def check(self) -> None:
        """Raise AssertionError if a margin or an input was written to."""
        for name, raw, start, end in self._allocated:
            touched = (raw != _PATTERN).nonzero().flatten()
            outside = touched[(touched < start) | (touched >= end)]
            if outside.numel():
                distance = int(torch.cat((start - outside[outside < start], outside[outside >= end] - end + 1)).max())
                raise AssertionError(
                    f"{name} of {end - start} bytes: {outside.numel()} bytes written outside, up to {distance} away"
                )
        for name, raw, before in self._inputs:
            if not torch.equal(raw, before):
                raise AssertionError(f"{name}: the input was written to")


@contextmanager
def guarded_allocations() -> Iterator[Guards]:
    """Put every tensor that anyone allocates on the CPU inside the block, in Python or in C++, between margins.

    Works by replacing aten::empty for a while, so that outputs and workspaces of compiled kernels are covered as well.
    """
    guards = Guards()

    def empty(size: Sequence[int], *, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
        if 0 in size:  # torch's own kernels resize these later; guarded memory cannot grow
            return torch.empty_strided(size, [0] * len(size), dtype=dtype)
        return guards.allocate(size, dtype or torch.get_default_dtype())

    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that an operator is overridden is the point
            library.impl("empty.memory_format", empty, "CPU")
        yield guards
    finally:
        library._destroy()
