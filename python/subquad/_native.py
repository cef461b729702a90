"""Finding, building and loading the native libraries, and saying why one is absent."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from . import _build, _env

PACKAGE = Path(__file__).parent
SOURCES = PACKAGE / "csrc"

_loaded: dict[str, Path] = {}
_failed: dict[str, str] = {}


def _library(name: str, sanitize: bool = False) -> _build.Library:
    torch_dir, cxx = _build.torch_dir(), _env.cxx()
    root = SOURCES.resolve()
    if name == "_C":
        return _build.native_library(root, torch_dir, cxx)
    if name == "_C_simt":
        return _build.simt_library(root, torch_dir, cxx, sanitize)
    nvcc = _build.find_nvcc(_env.cuda_home())
    if nvcc is None:
        raise _build.BuildError("nvcc was not found: install the CUDA toolkit or set CUDA_HOME")
    return _build.cuda_library(root, torch_dir, cxx, nvcc, _cuda_arches())


def _cuda_arches() -> tuple[int, ...]:
    """Those of the cards here, or all where there is none, or one of a kind that only PTX serves."""
    cards = {10 * major + minor for major, minor in map(torch.cuda.get_device_capability, range(_cards()))}
    return tuple(sorted(cards)) if cards and cards <= set(_build.CUDA_ARCHES) else tuple(_build.CUDA_ARCHES)


def _cards() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _prebuilt(name: str) -> Path | None:
    return next(iter(sorted(PACKAGE.glob(f"{name}.*so"))), None)


def load(name: str, build: bool) -> str | None:
    """Load library `name` if it is not loaded yet. Returns None on success, else the reason why it is not there.

    With `build` the library is compiled into the per-user cache when neither a prebuilt nor a cached one exists.
    """
    if name in _loaded:
        return None
    if name in _failed:
        return _failed[name]
    try:
        path = _prebuilt(name) or _from_cache(name, build)
        if path is None:
            return f"the native library {name} is not built"
        torch.ops.load_library(str(path))
    except (OSError, _build.BuildError) as error:
        _failed[name] = str(error)
        return _failed[name]
    _loaded[name] = path
    if name == "_C":
        _apply_isa(path)
    return None


def _from_cache(name: str, build: bool) -> Path | None:
    environment = _env.read()
    if not SOURCES.exists():
        return None
    library = _library(name)
    path = _build.cached_path(library, environment.cache_dir)
    if path.exists():
        return _build.cached_library(library, environment.cache_dir)
    if not build:
        return None
    if not environment.jit:
        raise _build.BuildError(f"the native library {name} is not built and SUBQUAD_JIT=0 forbids building it now")
    return _build.cached_library(library, environment.cache_dir)


def _apply_isa(path: Path) -> None:
    requested = _env.read().cpu_isa
    if requested is not None and not set_cpu_isa(requested):
        raise ValueError(f"SUBQUAD_CPU_ISA: got {requested!r}, which this CPU or build lacks; available: {cpu_isas()}")


def _symbol(name: str) -> ctypes._FuncPointer | None:  # type: ignore[name-defined]
    path = _loaded.get("_C")
    return None if path is None else getattr(ctypes.CDLL(str(path)), name)


def set_cpu_isa(level: str) -> bool:
    """Use the kernels of this instruction set from now on; False when the CPU or the build lacks it."""
    function = _symbol("subquad_set_cpu_isa")
    return function is not None and bool(function(level.encode()))


def cpu_isa() -> str | None:
    """The instruction set in use, or None while the native library is not loaded."""
    function = _symbol("subquad_cpu_isa")
    if function is None:
        return None
    function.restype = ctypes.c_char_p
    return function().decode()


def cpu_isas() -> list[str]:
    """The instruction sets that both this CPU and the build have, weakest first."""
    function = _symbol("subquad_cpu_isas")
    if function is None:
        return []
    function.restype = ctypes.c_char_p
    return function().decode().split(",")


def cpu_isas_ran() -> set[str]:
    """The instruction sets whose kernels were called since this was last asked."""
    function = _symbol("subquad_cpu_isas_ran")
    noted = 0 if function is None else function()
    return {level for bit, level in enumerate(_build.X86_LEVELS) if noted >> bit & 1}


def loaded() -> dict[str, Path]:
    """The libraries in use and where they came from."""
    return dict(_loaded)
