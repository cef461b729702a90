"""Which implementation runs: `use_backend`, `resolve`, and what could run where.

Order of precedence: the call's `backend=`, then `with use_backend(...)`, then SUBQUAD_BACKEND, then the preference in the op's
contract. Only the last may choose; an explicit request that cannot run raises with the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from . import _env, _native
from .contract import CONTRACTS, OPERATORS, STEM_OF, STEMS

BACKENDS = ("native", "triton", "simt", "reference")
DEVICES = ("cpu", "cuda")


class SubquadWarning(UserWarning):
    """Something works, but slower or differently than you would expect."""


_TESTS_ONLY = "the emulator runs CUDA sources on CPU tensors; it exists for tests"

_F = TypeVar("_F", bound=Callable[..., Any])
_override: str | None = None
_from_env: str | None = _env.read().backend
_choices: dict[tuple[str, str, bool], str] = {}
_ready: set[tuple[str, str, str]] = set()  # (stem, backend, device) known to run


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every subquad op through one backend inside the block. Process-wide, not per thread; nests.

    Args:
        name: "native", "triton", "simt", "reference", or None to return to automatic choice.

    Raises:
        ValueError: if the name is unknown. A backend that cannot run raises at the call that needs it.
    """
    global _override
    if name is not None:
        _check_name(name, "use_backend: name")
    previous, _override = _override, name
    try:
        yield
    finally:
        _override = previous


def _check_name(name: str, what: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{what}: expected one of {', '.join(BACKENDS)}, got {name!r}")


def unavailable(stem: str, backend: str, device: str, build: bool = False) -> str | None:
    """Why `backend` cannot run `stem` on `device`, or None when it can. `build` permits compiling what is missing."""
    missing = CONTRACTS[stem].missing.get(backend)
    if missing is not None:
        return missing
    if backend == "reference":
        return None
    if device not in DEVICES:
        return f"there are kernels for {' and '.join(DEVICES)} only"
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device is available"
    if backend == "native" and device == "cuda" and not any(op.cuda for op in CONTRACTS[stem].operators.values()):
        return "there is no CUDA C++ kernel yet"
    if backend == "native":
        return _native.load("_C" if device == "cpu" else "_C_cuda", build)
    if backend == "simt":
        return _TESTS_ONLY if device != "cpu" else _native.load("_C_simt", build)
    return _triton_unavailable(device)


def _triton_unavailable(device: str) -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if device == "cpu" and not triton.knobs.runtime.interpret:
        return (
            "Triton on CPU tensors needs its interpreter: set TRITON_INTERPRET=1 before importing subquad (tests only)"
        )
    return None


def _constant(function: _F) -> _F:
    """What torch.compiler.assume_constant_result does; calling that would import Dynamo, and with it triton, at import."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def _require(stem: str, backend: str, device: str) -> str:
    """Make an explicitly requested backend ready, compiling it if need be; raises when it cannot run."""
    _check_name(backend, "backend")
    reason = unavailable(stem, backend, device, build=True)
    if reason is not None:
        raise ValueError(f"backend: got {backend!r} for {stem} on {device}, expected one that can run there: {reason}")
    _ready.add((stem, backend, device))
    if backend == "native":
        for few in (False, True):
            _choices.pop((stem, device, few), None)
    return backend


@_constant
def _choose(stem: str, device: str, few: bool = False) -> str:
    """First available backend of the contract's preference; warns once when the native one is passed over."""
    if device not in DEVICES:
        return "reference"
    for backend in CONTRACTS[stem].preference(device, few):
        reason = unavailable(stem, backend, device)
        if reason is None:
            _choices[stem, device, few] = backend
            return backend
        if backend == "native":
            _warn_once(
                f"{stem} on {device}: the native kernels are not in use ({reason}). Install a build that has them, or call"
                f' once with backend="native" to compile them now.'
            )
    raise AssertionError("reference is always available")


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(f"subquad: {message}", SubquadWarning, stacklevel=4)


def _asked(requested: str | None) -> str | None:
    """The backend that somebody asked for."""
    return requested if requested is not None else (_override if _override is not None else _from_env)


def resolve(stem: str, device: str, requested: str | None, few: bool = False, dtype: torch.dtype | None = None) -> str:
    """The backend to run `stem` on `device` with; see the module docstring for the order of precedence.

    `few`: the call has no more tokens than the contract calls few, and needs no gradients. `dtype` of the call: one that no
    kernel takes leaves the reference to choose.
    """
    name = _asked(requested)
    if name is None and dtype is not None and dtype not in CONTRACTS[stem].dtypes:
        return "reference"
    if torch.compiler.is_compiling():  # not through the caches: Dynamo would guard on what these very calls change
        return _choose(stem, device, few) if name is None else _require(stem, name, device)
    if name is None:
        choice = _choices.get((stem, device, few))
        return choice if choice is not None else _choose(stem, device, few)
    if (stem, name, device) in _ready:
        return name
    return _require(stem, name, device)


def settled(stem: str, device: str, requested: str | None, few: bool) -> str | None:
    """What `resolve` is known to give for a dtype that kernels take; None where it has to be asked."""
    name = _asked(requested)
    if name is None:
        return _choices.get((stem, device, few))
    return name if (stem, name, device) in _ready else None


def has(operator: str, backend: str, device: str) -> bool:
    """Whether a backend was written for this operator and device, whether or not it can run here."""
    if backend == "native":
        return device == "cpu" or OPERATORS[operator].cuda
    if backend == "triton":
        return OPERATORS[operator].triton
    return OPERATORS[operator].cuda if backend == "simt" else True


def backward_backend(operator: str, backend: str, device: str) -> str:
    """The backend for the gradients of what `backend` computed with the forward `operator`.

    The same one where it has them. CUDA C++ without a backward (kernels for few tokens) leaves them to the first of the
    contract's preference that has one; its emulation on the CPU leaves them to the C++ there.
    """
    backward = OPERATORS[operator].backward
    assert backward is not None
    if has(backward, backend, device):
        return backend
    order = CONTRACTS[STEM_OF[operator]].preference(device)
    return resolve(STEM_OF[operator], device, next(name for name in order if has(backward, name, device)))


def backends() -> dict[str, dict[str, dict[str, str]]]:
    """What could run where: {op: {device: {backend: "available" or the reason why not}}}. Builds nothing."""
    return {
        stem: {
            device: {name: unavailable(stem, name, device) or "available" for name in BACKENDS} for device in DEVICES
        }
        for stem in STEMS
    }
