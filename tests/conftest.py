"""Settings for every test: Triton's interpreter, poisoned memory, one thread, fixed random numbers, backend demands."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

DEVICES = ("cpu", "cuda")
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
    parser.addoption("--device", choices=DEVICES, default="cpu", help="where the generic tests put their tensors")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "backend(stem, name): needs this backend of this op; skipped with its reason otherwise"
    )
    settings.load_profile("subquad")
    torch.set_num_threads(1)  # the problems are tiny; what threads change has a check of its own
    if config.getoption("--device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which no test may do before


def pytest_runtest_setup(item: pytest.Item) -> None:
    from subquad._backends import unavailable
    from subquad.contract import CONTRACTS

    device = item.config.getoption("--device")
    required = item.config.getoption("--require-backends").split(",")
    for marker in item.iter_markers("backend"):
        stem, name = marker.args
        reason = unavailable(stem, name, device, build=True)
        if reason is not None:
            if name in required and name not in CONTRACTS[stem].missing:
                pytest.fail(f"backend {name} is required, but: {reason}", pytrace=False)
            pytest.skip(f"backend {name}: {reason}")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Device under test."""
    return request.config.getoption("--device")


@pytest.fixture(autouse=True)
def _poisoned_memory_and_fixed_seed() -> Iterator[None]:
    """New tensors are filled with NaN, also those that C++ allocates."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
