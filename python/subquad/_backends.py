"""Which implementation runs: the backend table, capabilities, `use_backend`, and `resolve`.

Order of precedence: the call's `backend=`, then `with use_backend(...)`, then SUBQUAD_BACKEND, then the preference table. Only
the last may choose; an explicit request that cannot run raises with the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from . import _env, _native
from ._schemas import OPS, STEMS

BACKENDS = ("native", "triton", "simt", "reference")
DEVICES = ("cpu", "cuda")


class SubquadWarning(UserWarning):
    """Something works, but slower or differently than you would expect."""


@dataclass(frozen=True)
class Capability:
    """What one backend of one op can do on one device; `missing` is the reason when it does not exist at all."""

    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    missing: str | None = None


REFERENCE = Capability(dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16))
_TESTS_ONLY = "the emulator runs CUDA sources on CPU tensors; it exists for tests"

# Preference when nobody asks: first available wins. Decode-time sparse products are memory-bound: CUDA C++ leads there.
PREFERENCE: dict[str, dict[str, tuple[str, ...]]] = {
    "cats_mlp": {"cpu": ("native", "reference"), "cuda": ("native", "triton", "reference")},
    "cats_activation": {"cpu": ("native", "reference"), "cuda": ("triton", "native", "reference")},
    "causal_conv1d": {"cpu": ("native", "reference"), "cuda": ("native", "triton", "reference")},
    "interval_attention": {"cpu": ("native", "reference"), "cuda": ("triton", "native", "reference")},
    "gated_linear_attention": {"cpu": ("native", "reference"), "cuda": ("triton", "native", "reference")},
    "feature_map": {"cpu": ("native", "reference"), "cuda": ("triton", "native", "reference")},
    "conv_feature_map": {"cpu": ("native", "reference"), "cuda": ("triton", "native", "reference")},
    "lawcat_decode_step": {"cpu": ("native", "reference"), "cuda": ("native", "triton", "reference")},
}
CAPABILITIES: dict[tuple[str, str], Capability] = {
    (stem, backend): REFERENCE if backend == "reference" else Capability() for stem in STEMS for backend in BACKENDS
}

_F = TypeVar("_F", bound=Callable[..., Any])
_override: str | None = None
_from_env: str | None = _env.read().backend
_choices: dict[tuple[str, str], str] = {}
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
    missing = CAPABILITIES[stem, backend].missing
    if missing is not None:
        return missing
    if backend == "reference":
        return None
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device is available"
    if backend == "native" and device == "cuda" and not any(op.cuda for op in OPS.values() if op.stem == stem):
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
        _choices.pop((stem, device), None)
    return backend


@_constant
def _choose(stem: str, device: str) -> str:
    """First available backend of the preference table; warns once when the native one is passed over."""
    if device not in DEVICES:
        return "reference"
    for backend in PREFERENCE[stem][device]:
        reason = unavailable(stem, backend, device)
        if reason is None:
            _choices[stem, device] = backend
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


def is_automatic(requested: str | None) -> bool:
    """Whether nobody asked for a backend: neither the call, nor `use_backend`, nor the environment."""
    return requested is None and _override is None and _from_env is None


def resolve(stem: str, device: str, requested: str | None) -> str:
    """The backend to run `stem` on `device` with; see the module docstring for the order of precedence."""
    name = requested if requested is not None else (_override if _override is not None else _from_env)
    if torch.compiler.is_compiling():  # not through the caches: Dynamo would guard on what these very calls change
        return _choose(stem, device) if name is None else _require(stem, name, device)
    if name is None:
        choice = _choices.get((stem, device))
        return choice if choice is not None else _choose(stem, device)
    if (stem, name, device) in _ready:
        return name
    return _require(stem, name, device)


def backends() -> dict[str, dict[str, dict[str, str]]]:
    """What could run where: {op: {device: {backend: "available" or the reason why not}}}. Builds nothing."""
    return {
        stem: {
            device: {name: unavailable(stem, name, device) or "available" for name in BACKENDS} for device in DEVICES
        }
        for stem in STEMS
    }
