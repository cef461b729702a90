"""Every header of csrc compiles alone, and with all the others of its kind: none counts on what another one included."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from subquad import _build, _env

CSRC = Path(__file__).resolve().parents[2] / "csrc"
# Kernels of the CPU and of CUDA know no torch; the rest, which does, takes a second each.
KINDS = {
    "cpu": ("common/*.h", "cpu/*.h", "cpu/simd/*.h", "ops/*/params.h", "ops/*/cpu*.h"),
    "cuda": ("cuda/*.cuh", "ops/*/cuda*.cuh", "simt/*.h"),
    "cpu binding": ("torch/*.h", "ops/*/arguments.h"),
    "cuda binding": ("cuda/*.h",),
}
FLAGS = {
    "cpu": ("-DSUBQUAD_ISA=baseline",),
    "cuda": ("-DSUBQUAD_SIMT",),
    "cpu binding": (),
    "cuda binding": ("-DSUBQUAD_SIMT",),
}
HEADERS = {
    path.relative_to(CSRC).as_posix(): kind
    for kind, globs in KINDS.items()
    for glob in globs
    for path in CSRC.glob(glob)
}
pytestmark = [
    pytest.mark.heavy,  # a compiler for every header
    pytest.mark.skipif(shutil.which(_env.cxx()) is None, reason="no C++ compiler"),
]


def compile_headers(kind: str, *headers: str) -> str:
    """What the compiler says about a file that includes these headers and nothing else."""
    command = [_env.cxx(), "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"]
    command += [*FLAGS[kind], f"-I{CSRC}", "-x", "c++", "-"]
    if "binding" in kind:
        torch = _build.torch_dir() / "include"
        command += [f"-DTORCH_TARGET_VERSION={_build.TORCH_TARGET}", "-isystem", str(torch)]
    source = "".join(f'#include "{header}"\n' for header in headers)
    return subprocess.run(command, input=source, capture_output=True, text=True).stderr


def test_every_header_is_of_one_kind() -> None:
    found = {p.relative_to(CSRC).as_posix() for suffix in ("*.h", "*.cuh") for p in CSRC.rglob(suffix)}
    assert {header for header in found if not header.startswith("simt/tests/")} == set(HEADERS)


@pytest.mark.parametrize("header", sorted(HEADERS))
def test_compiles_alone(header: str) -> None:
    assert compile_headers(HEADERS[header], header) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_compile_together(kind: str) -> None:
    """Names of one op do not collide with those of another."""
    assert compile_headers(kind, *sorted(header for header, of in HEADERS.items() if of == kind)) == ""


def test_what_is_missing_is_found(tmp_path: Path) -> None:
    (tmp_path / "toy.h").write_text("#pragma once\ninline int64_t twice(int64_t x) { return 2 * x; }\n")
    assert "int64_t" in compile_headers("cpu", str(tmp_path / "toy.h"))
