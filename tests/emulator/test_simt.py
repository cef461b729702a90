"""Builds the tests of the SIMT emulator (csrc/simt/tests) and runs every case: plain, sanitized, and on ucontext."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SIMT = Path(__file__).resolve().parents[2] / "csrc" / "simt"
RUNTIME = sorted(SIMT.glob("*.cpp"))
TESTS = [*sorted((SIMT / "tests").glob("test_*.cpp")), SIMT / "tests" / "main.cpp"]
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-DSUBQUAD_SIMT", "-pthread"]
SANITIZE = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
BUILDS = ("plain", "sanitized", "ucontext")

_CASE = re.compile(r'^(?:CASE\((\w+)\)|FATAL\((\w+), "([^"]+)"\))', re.MULTILINE)
_FOUND = [m.groups() for path in TESTS for m in _CASE.finditer(path.read_text())]
CASES = sorted(name for name, _, _ in _FOUND if name)
FATAL = sorted((name, report) for _, name, report in _FOUND if name)

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
]


def _gxx(output: Path, sources: list[Path], flags: list[str]) -> Path:
    command = ["g++", *FLAGS, *flags, "-o", str(output), *map(str, sources)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return output


@pytest.fixture(scope="session")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The test program of every build in BUILDS, and `library`, a shared library with hidden symbols."""
    folder = tmp_path_factory.mktemp("simt")
    fiber, library = SIMT / "fiber.cpp", SIMT / "tests" / "library.cpp"
    variants = {
        "sanitized": (SANITIZE, [*TESTS, *RUNTIME]),
        "plain": ([], [*TESTS, *RUNTIME, library]),
        "ucontext": (["-DSUBQUAD_SIMT_UCONTEXT"], [fiber]),
    }
    with ThreadPoolExecutor(2) as pool:
        jobs = {
            (variant, source): pool.submit(_gxx, folder / f"{variant}_{source.stem}.o", [source], ["-c", *flags])
            for variant, (flags, sources) in variants.items()
            for source in sources
        }
        objects = {key: job.result() for key, job in jobs.items()}

    def link(name: str, variant: str, sources: list[Path], *flags: str) -> Path:
        chosen = [objects.get((name, source)) or objects[variant, source] for source in sources]
        return _gxx(folder / name, chosen, list(flags))

    return {
        "plain": link("plain", "plain", [*TESTS, *RUNTIME]),
        "sanitized": link("sanitized", "sanitized", [*TESTS, *RUNTIME], *SANITIZE),
        "ucontext": link("ucontext", "plain", [*TESTS, *RUNTIME]),
        "library": link("library", "plain", [library, *RUNTIME], "-shared"),
    }


def _run(binary: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([binary, *arguments], capture_output=True, text=True, timeout=60)


def test_every_case_is_listed(binaries: dict[str, Path]) -> None:
    listed = [line.split("\t") for line in _run(binaries["plain"], "--list").stdout.splitlines()]
    assert sorted(name for name, report in listed if not report) == CASES
    assert sorted((name, report) for name, report in listed if report) == FATAL


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("case", CASES)
def test_case(binaries: dict[str, Path], case: str, build: str) -> None:
    result = _run(binaries[build], case)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(("case", "report"), FATAL)
def test_sanitizer_stops(binaries: dict[str, Path], case: str, report: str) -> None:
    result = _run(binaries["sanitized"], case)
    assert result.returncode != 0
    assert report in result.stderr
    assert "test_faults.cpp" in result.stderr


def test_shared_library_on_any_thread(binaries: dict[str, Path]) -> None:
    simt = ctypes.CDLL(str(binaries["library"]))
    simt.simt_test_scale.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float, ctypes.c_int]
    simt.subquad_simt_set_seed.argtypes = [ctypes.c_uint64]
    simt.subquad_simt_stats.argtypes = [ctypes.POINTER(ctypes.c_uint64)]
    n = 200
    results: list[list[float]] = []

    def call() -> None:
        x = (ctypes.c_float * n)(*range(n))
        y = (ctypes.c_float * n)()
        assert simt.simt_test_scale(x, y, 0.5, n) == 0
        results.append(list(y))

    simt.subquad_simt_reset_stats()
    simt.subquad_simt_set_seed(7)
    call()
    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[0.5 * i for i in range(n)]] * 4

    stats = (ctypes.c_uint64 * 4)()
    simt.subquad_simt_stats(stats)
    assert list(stats) == [4 * n * 4, 4 * n * 4, 4, 4 * 4]  # bytes loaded, bytes stored, launches, block barriers
