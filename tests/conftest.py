"""Settings for every test: lanes, Triton's interpreter, poisoned memory, one thread, fixed random numbers, backend demands."""

from __future__ import annotations

import ctypes
import functools
import os
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
# Checks that the quick lane runs in every dtype and at every instruction set, for roundings show there alone, and on the other
# backends in one dtype.
NUMBERS = ("forward", "gradients", "levels")
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
        help="quick: native and reference, of others the numbers, one dtype, nothing that compiles; whole: everything, but what "
        "is slow or compiles at the CPU's best instruction set only; full: at all of them",
    )
    parser.addoption(
        "--matrix",
        choices=("sample", "whole"),
        default="sample",
        help="cells of tests/models/test_matrix.py that are run",
    )
    parser.addoption("--device", choices=DEVICES, default="cpu", help="where the generic tests put their tensors")


def pytest_configure(config: pytest.Config) -> None:
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
    _select(config, items, [_has_level(item, device, lane) for item in items])
    if device == "cuda":  # a test that asks for no device puts its tensors on the CPU
        _select(config, items, ["device" in getattr(item, "fixturenames", ()) for item in items])
    if lane == "quick":
        first: dict[tuple[object, ...], torch.dtype] = {}  # of every test, in the order of collection
        _select(config, items, [_is_quick(item, first) for item in items])
    # The longest first: at the end of a parallel run workers then wait for short ones.
    items.sort(key=lambda item: 0 if item.get_closest_marker("slow") else 1 if item.get_closest_marker("heavy") else 2)


def _select(config: pytest.Config, items: list[pytest.Item], chosen: list[bool]) -> None:
    config.hook.pytest_deselected(items=[item for item, taken in zip(items, chosen, strict=True) if not taken])
    items[:] = [item for item, taken in zip(items, chosen, strict=True) if taken]


def _has_level(item: pytest.Item, device: str, lane: str) -> bool:
    """Whether a test at an instruction set below the CPU's best is run: where it is cheap, or in the lane that has all."""
    if not item.get_closest_marker("level"):
        return True
    costly = item.get_closest_marker("slow") or item.get_closest_marker("heavy")
    return device == "cpu" and (lane == "full" or not costly)


def _is_quick(item: pytest.Item, first: dict[tuple[object, ...], torch.dtype]) -> bool:
    """Whether the quick lane has this test: its markers and parameters say so, a new op's as those of any other."""
    if item.get_closest_marker("slow") or item.get_closest_marker("heavy"):
        return False
    backends = QUICK_BACKENDS[item.config.getoption("--device")]
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    task = params.get("task")
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
    dtype = next((p for p in params.values() if isinstance(p, torch.dtype)), None)
    return dtype is None or first.setdefault((item.path, item.originalname), dtype) is dtype


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
