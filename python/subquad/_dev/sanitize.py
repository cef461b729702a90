"""`python -m subquad._dev.sanitize`: the tests of the compiled kernels under AddressSanitizer and UBSan.

Builds the CPU kernels, and the CUDA kernels for the host emulator, with both sanitizers, and runs pytest on them: an
access out of bounds, a signed overflow or a misaligned load ends the run. Arguments after `--` go to pytest.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from .. import _build, _env, _native

LIBRARIES = {"native": "_C", "simt": "_C_simt"}
_DESCRIPTION = "Run the tests of the compiled kernels under AddressSanitizer and UBSan."
_CHILD = "--in-sanitized-process"


def build(backend: str) -> Path:
    """The sanitized library of a backend, from the cache or compiled now."""
    plan = _build.native_library if backend == "native" else _build.simt_library
    library = plan(_native.SOURCES.resolve(), _build.torch_dir(), _env.cxx(), sanitize=True)
    return _build.cached_library(library, _env.read().cache_dir)


def runtime(cxx: str) -> list[str]:
    """The libraries that must be loaded before anything else: Python itself is not sanitized.

    Raises:
        BuildError: if the compiler has no AddressSanitizer runtime.
    """
    paths = []
    for name in ("libasan.so", "libstdc++.so.6"):
        command = [cxx, f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(path).is_absolute():
            raise _build.BuildError(f"{name} was not found by {cxx}: install the sanitizer runtime of your compiler")
        paths.append(path)
    return paths


def run(backends: list[str], arguments: list[str]) -> int:
    """Build, then run the tests in a process with the sanitizers loaded first."""
    for backend in backends:
        print(f"{backend}: {build(backend)}", flush=True)
    settings = [f"LD_PRELOAD={' '.join(runtime(_env.cxx()))}", "ASAN_OPTIONS=detect_leaks=0"]
    settings += ["UBSAN_OPTIONS=print_stacktrace=1", "TRITON_INTERPRET=1"]
    module = [sys.executable, "-m", "subquad._dev.sanitize", _CHILD, *backends]
    return subprocess.run(["env", *settings, *module, "--", *arguments]).returncode


def _run_tests(backends: list[str], arguments: list[str]) -> int:
    """In the sanitized process: load the libraries before anything can load others of the same name, and run pytest."""
    import pytest
    import torch

    for backend in backends:
        path = build(backend)
        torch.ops.load_library(str(path))
        _native._loaded[LIBRARIES[backend]] = path
    # The sanitizers write to the file descriptor and abort: pytest must not hold that back.
    return int(pytest.main(["--capture=sys", *arguments]))


def main(argv: list[str] | None = None) -> int:
    """Returns pytest's exit code, or the sanitizer's."""
    words = sys.argv[1:] if argv is None else argv
    own, rest = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(prog="python -m subquad._dev.sanitize", description=_DESCRIPTION)
    parser.add_argument("backends", nargs="*", metavar="BACKEND", help=f"of {', '.join(LIBRARIES)} (default: both)")
    parser.add_argument(_CHILD, action="store_true", dest="child", help=argparse.SUPPRESS)
    args = parser.parse_args(own)
    backends = args.backends or list(LIBRARIES)
    unknown = set(backends) - set(LIBRARIES)
    if unknown:
        parser.error(f"BACKEND: expected any of {', '.join(LIBRARIES)}, got {', '.join(sorted(unknown))}")
    arguments = rest or ["tests/ops", "-m", "not slow", "-k", " or ".join(backends)]
    return _run_tests(backends, arguments) if args.child else run(backends, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
