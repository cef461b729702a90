"""Every environment variable that subquad reads, in one place. Standard library only: setup.py loads this file too."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

VARIABLES = {
    "SUBQUAD_BACKEND": "backend for every op: native, triton, simt or reference (default: chosen per op and device)",
    "SUBQUAD_BUILD_EXT": "0: install the pure-Python package; 1: fail when the extension cannot be built",
    "SUBQUAD_JIT": "0: never compile the native extension at run time",
    "SUBQUAD_CACHE_DIR": "where what is built at run time is kept (default: the user's cache folder)",
    "SUBQUAD_CPU_ISA": "highest CPU instruction set to use: baseline, v3, v4 or v4_bf16 (default: what the CPU has)",
    "SUBQUAD_DEBUG": "1: check values of index and threshold tensors, which costs a device synchronisation",
}


@dataclass(frozen=True)
class Env:
    """The variables of `VARIABLES`, parsed."""

    backend: str | None
    build_ext: str | None
    jit: bool
    cache_dir: Path
    cpu_isa: str | None
    debug: bool


def _flag(name: str, default: bool) -> bool:
    value = os.environ.get(name, "").strip().lower()
    return default if not value else value not in ("0", "false", "no", "off")


def read() -> Env:
    """Read the environment now."""
    cache = os.environ.get("SUBQUAD_CACHE_DIR")
    if not cache:
        cache = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "subquad")
    return Env(
        backend=os.environ.get("SUBQUAD_BACKEND") or None,
        build_ext=os.environ.get("SUBQUAD_BUILD_EXT") or None,
        jit=_flag("SUBQUAD_JIT", True),
        cache_dir=Path(cache),
        cpu_isa=os.environ.get("SUBQUAD_CPU_ISA") or None,
        debug=_flag("SUBQUAD_DEBUG", False),
    )


def as_dict() -> dict[str, str]:
    """The variables that are set, for the report."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def cxx() -> str:
    """The host C++ compiler."""
    return os.environ.get("CXX", "g++")


def cuda_home() -> Path | None:
    """Root of the CUDA toolkit named by the environment, if any."""
    value = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return Path(value) if value else None


def triton_interpreted() -> bool:
    """Whether Triton kernels defined from now on would run in Triton's interpreter."""
    return _flag("TRITON_INTERPRET", False)


def interpret_triton() -> None:
    """Have Triton kernels run in its interpreter; before triton is imported."""
    os.environ["TRITON_INTERPRET"] = "1"


def without_triton_interpreter() -> dict[str, str]:
    """A copy of the environment for subprocesses that compile Triton kernels."""
    return {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}


__all__ = [
    "VARIABLES",
    "Env",
    "as_dict",
    "cuda_home",
    "cxx",
    "interpret_triton",
    "read",
    "triton_interpreted",
    "without_triton_interpreter",
]


if __name__ == "__main__":
    print(asdict(read()))
