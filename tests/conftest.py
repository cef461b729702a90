"""Settings for every test: lanes, Triton's interpreter, poisoned memory, one thread, fixed random numbers, backend demands."""

from __future__ import annotations

import ctypes
import functools
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from subquad.testing import Task
from subquad.testing.levels import at_level

DEVICES = ("cpu", "cuda")
LANES = ("quick", "whole", "full")
QUICK_BACKENDS = {"cpu": ("native", "reference"), "cuda": ("native", "triton", "reference")}
EMULATED = ("triton", "simt")  # on a CPU: in Triton's interpreter and in the emulator of CUDA, a hundred times slower
# Checks that the quick lane runs in every dtype and at every instruction set, for roundings show there alone, and on the other
# backends in one dtype.
NUMBERS = ("forward", "gradients", "levels")
BEGUN, TOO_LATE = time.monotonic(), "not begun: the time of --minutes is over"
settings.register_profile(
    "subquad", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-backends",
        default="",
        metavar="NAMES",
        help="comma-separated backends whose absence is a failure instead of a skip, for example native,triton,simt",
    )
    parser.addoption(
        "--lane",
        choices=LANES,
        default="whole",
        help="quick: native and reference, of others the numbers, one dtype, nothing that compiles; whole: more than the numbers "
        "in the interpreter and the emulator in one dtype, what is slow or compiles at the CPU's best instruction set, nothing "
        "marked full; full: everything",
    )
    parser.addoption(
        "--matrix",
        choices=("sample", "whole"),
        default="sample",
        help="cells of tests/models/test_matrix.py that are run",
    )
    parser.addoption(
        "--minutes",
        type=float,
        default=float("inf"),
        help="begin no test after so long: what is left is skipped, and how many these are is told at the end",
    )
    parser.addoption("--device", choices=DEVICES, default="cpu", help="where the generic tests put their tensors")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "full: in the full lane alone, for the whole one has a test of the same that costs less"
    )
    config.addinivalue_line(
        "markers", "backend(stem, name): needs this backend of this op; skipped with its reason otherwise"
    )
    config.addinivalue_line("markers", "level(name): runs native kernels at an instruction set below the CPU's best")
    settings.load_profile("subquad")
    torch.set_num_threads(1)  # the problems are tiny; what threads change has a check of its own
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else every worker starts as many processes again
    if config.getoption("--device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which no test may do before


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    device, lane = config.getoption("--device"), config.getoption("--lane")
    if lane != "full":
        dtypes: dict[tuple[object, ...], torch.dtype] = {}
        _select(config, items, [_is_whole(item, device, dtypes) for item in items])
    if device == "cuda":  # a test that asks for no device puts its tensors on the CPU, whose levels these are
        names = [getattr(item, "fixturenames", ()) for item in items]
        _select(
            config,
            items,
            ["device" in x and not i.get_closest_marker("level") for i, x in zip(items, names, strict=True)],
        )
    first: dict[tuple[object, ...], torch.dtype] = {}  # of every test, in the order of collection
    quick = {item for item in items if _is_quick(item, first)}
    if lane == "quick":
        _select(config, items, [item in quick for item in items])
    items.sort(key=lambda item: (item not in quick, _length(item)))  # what --minutes leaves out comes last


def _length(item: pytest.Item) -> int:
    """The longest first: at the end of a parallel run workers then wait for short ones."""
    return 0 if item.get_closest_marker("slow") else 1 if item.get_closest_marker("heavy") else 2


def _select(config: pytest.Config, items: list[pytest.Item], chosen: list[bool]) -> None:
    config.hook.pytest_deselected(items=[item for item, taken in zip(items, chosen, strict=True) if not taken])
    items[:] = [item for item, taken in zip(items, chosen, strict=True) if taken]


def _is_whole(item: pytest.Item, device: str, first: dict[tuple[object, ...], torch.dtype]) -> bool:
    """Whether the whole lane has this test: what costs much is run once, the numbers in every dtype and on every backend."""
    if item.get_closest_marker("full"):
        return False
    if item.get_closest_marker("level"):
        return not (item.get_closest_marker("slow") or item.get_closest_marker("heavy"))
    if device != "cpu":
        return True
    task = _params(item).get("task")
    if not isinstance(task, Task):
        emulated = any(marker.args[1] in EMULATED for marker in item.iter_markers("backend"))
        return not emulated or _has_first_dtype(item, first)
    if task.backend == "reference":  # its loops over tokens make graphs that take a minute to compile
        return not task.check.name.startswith("compile_")
    return task.backend not in EMULATED or task.dtype is task.spec.dtypes[0] or task.check.name in NUMBERS


def _params(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}


def _has_first_dtype(item: pytest.Item, first: dict[tuple[object, ...], torch.dtype]) -> bool:
    """Whether a test of many dtypes has the one that was collected first, or a test has none."""
    dtype = next((p for p in _params(item).values() if isinstance(p, torch.dtype)), None)
    return dtype is None or first.setdefault((item.path, item.originalname), dtype) is dtype


def _is_quick(item: pytest.Item, first: dict[tuple[object, ...], torch.dtype]) -> bool:
    """Whether the quick lane has this test: its markers and parameters say so, a new op's as those of any other."""
    if item.get_closest_marker("slow") or item.get_closest_marker("heavy"):
        return False
    backends = QUICK_BACKENDS[item.config.getoption("--device")]
    task = _params(item).get("task")
    if isinstance(task, Task):
        leading, numbers = task.dtype is task.spec.dtypes[0], task.check.name in NUMBERS
        if task.backend not in backends:
            return leading and numbers
        at_best = item.get_closest_marker("level") is None
        return not task.check.heavy and ((leading or at_best) if numbers else (leading and at_best))
    if item.get_closest_marker("level"):
        return False
    needed = {marker.args[1] for marker in item.iter_markers("backend")}
    cheap = needed <= set(backends) or item.get_closest_marker("quick") is not None
    if "emulator" in getattr(item, "fixturenames", ()) or not cheap:
        return False
    return _has_first_dtype(item, first)


@functools.cache
def _quicken_interpreter() -> None:
    """Let Triton's interpreter exchange the functions of the language once a launch instead of at every call of a function
    within a kernel, which finds them exchanged already and takes two fifths of the time."""
    from triton import language
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_patch_lang"):  # another version: slower, and as right
        return
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[int] = set()

    @functools.cache
    def seen(function: Any) -> frozenset[int]:
        return frozenset(id(x) for x in function.__globals__.values() if x is language or x is language.core)

    def patch_once(function: Any) -> Any:
        if seen(function) <= done:
            return None
        done.update(seen(function))
        return patch(function)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        done.clear()
        launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() - BEGUN > 60 * item.config.getoption("--minutes"):
        pytest.skip(TOO_LATE)
    from subquad._backends import unavailable
    from subquad.contract import CONTRACTS

    device = item.config.getoption("--device")
    required = item.config.getoption("--require-backends").split(",")
    quick = item.config.getoption("--lane") == "quick"
    for marker in item.iter_markers("backend"):
        stem, name = marker.args
        # The emulator takes a minute to compile: the quick lane has it where `subquad build simt` was called before.
        reason = unavailable(stem, name, device, build=not (quick and name == "simt"))
        if reason is not None:
            if name in required and name not in CONTRACTS[stem].missing:
                pytest.fail(f"backend {name} is required, but: {reason}", pytrace=False)
            pytest.skip(f"backend {name}: {reason}")
        if name == "triton" and device == "cpu":
            _quicken_interpreter()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    late = [r for r in terminalreporter.stats.get("skipped", []) if TOO_LATE in str(r.longrepr)]
    if late:
        minutes = config.getoption("--minutes")
        terminalreporter.write_line(f"{len(late)} tests of this lane were NOT RUN: the {minutes:g} minutes were over")


@pytest.fixture(scope="session")
def emulator() -> ctypes.CDLL:
    """The CUDA kernels in the emulator; the seed sets the order of blocks, warps and lanes."""
    from subquad import _native

    reason = _native.load("_C_simt", build=True)
    assert reason is None, reason
    library = ctypes.CDLL(str(_native.loaded()["_C_simt"]))
    library.subquad_simt_set_seed.argtypes = [ctypes.c_uint64]
    return library


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Device under test."""
    return request.config.getoption("--device")


@pytest.fixture(autouse=True)
def _level(request: pytest.FixtureRequest) -> Iterator[None]:
    """The instruction set of native kernels, and that no other ran."""
    marker = request.node.get_closest_marker("level")
    with at_level(marker.args[0] if marker else None):
        yield


@pytest.fixture(autouse=True)
def _poisoned_memory_and_fixed_seed() -> Iterator[None]:
    """New tensors are filled with NaN, also those that C++ allocates."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
