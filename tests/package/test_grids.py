"""Launches: grids of one axis, since the others end at 65,535 programs; on the device of the tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import subquad
import subquad.kernels
from subquad import contract
from subquad.contract import OPERATORS, STEM_OF, STEMS

KERNELS = Path(subquad.kernels.__path__[0])
CSRC = Path(subquad.__path__[0]) / "csrc"


def kernels_in(folder: Path) -> set[str]:
    return {name for path in folder.rglob("*.py") for name in re.findall(r"def (\w+_kernel)\(", path.read_text())}


def test_every_triton_launch_has_one_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every kernel, recorded at the launchers' own calls, for shapes of any size."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    grids: dict[str, set[int]] = {}

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        grids.setdefault(self.fn.__name__, set()).add(len(grid))

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", record)
    for stem in STEMS:
        for case in import_module(f"subquad.kernels.{stem}").AOT:
            case.launcher(*case.args())
    assert set(grids) == kernels_in(KERNELS)
    assert {name: axes for name, axes in grids.items() if axes != {1}} == {}


OTHER_AXES = {
    ".py": r"\b(program_id|num_programs)\((?!(axis=)?0\))",
    ".cuh": r"\b(blockIdx|gridDim)\.[yz]\b|\bdim3 grid\b",
}


@pytest.mark.parametrize(("folder", "suffix"), [(KERNELS, ".py"), (CSRC / "ops", ".cuh")], ids=["triton", "cuda"])
def test_no_kernel_reads_another_axis(folder: Path, suffix: str) -> None:
    """CUDA C++ launches take the number of blocks as 64 bits and refuse what one axis cannot hold."""
    paths = sorted(folder.rglob(f"*{suffix}"))
    assert len(paths) >= len(STEMS)
    assert [p.name for p in paths if re.search(OTHER_AXES[suffix], p.read_text())] == []


def test_grids_hold_a_large_batch_of_many_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """More sequences times states than an axis but the first holds."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    from subquad.kernels import gated_linear_attention, interval_attention

    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(interpreter.InterpretedFunction, "run", lambda *_, grid, **__: grids.append(grid))
    q = torch.empty((2**17, 3, 70_000, 16), device="meta")
    gated_linear_attention.gated_linear_attention_fwd(q, q, q, None, None, None, None, 1.0, 0.0, True)
    interval_attention.interval_attention_fwd(
        q.unsqueeze(3), q, q, None, None, None, None, 0, -1, True, None, None, None, 0.25, 0.0, []
    )
    assert len(grids) == 3 and all(len(grid) == 1 and grid[0] >= 2**17 * 70_000 for grid in grids)


@pytest.mark.parametrize("name", OPERATORS)
def test_triton_launches_on_the_device_of_the_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes the current device, whatever device its arguments are on."""
    current = ["cuda:0"]

    @contextmanager
    def device_of(tensor: Any) -> Iterator[None]:
        current.append(tensor.place)
        yield
        current.pop()

    first = SimpleNamespace(place="cuda:1")
    launcher = SimpleNamespace(**{name: lambda x: current[-1]})
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(contract, "import_module", {f"subquad.kernels.{STEM_OF[name]}": launcher}.__getitem__)
    assert contract._triton_impl(name)(first) == "cuda:1"
    assert current == ["cuda:0"]
