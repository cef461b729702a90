"""The Triton kernels as a GPU would run them, compiled for sm_90: coverage, spills, matrix instructions, load width."""

from __future__ import annotations

import ast
import fcntl
import os
import pickle
from pathlib import Path

import pytest
from rich.console import Console

import subquad.kernels
from subquad.gpu_report import Entry, triton_entries, triton_side

pytest.importorskip("triton")
pytestmark = [pytest.mark.heavy, pytest.mark.slow]  # minutes of compilation, which begin early
ARCH = 90
KERNELS = Path(subquad.kernels.__path__[0])


def _jitted_kernels() -> set[str]:
    """Names of the kernels in the sources: functions named *_kernel."""
    trees = [ast.parse(path.read_text()) for path in KERNELS.rglob("*.py")]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {function.name for function in functions if function.name.endswith("_kernel")}


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> list[Entry]:
    """Compiled by the first worker that needs them, for all."""
    folder = tmp_path_factory.getbasetemp()
    kept = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / f"triton-{ARCH}.pickle"
    with kept.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            kept.write_bytes(pickle.dumps(triton_entries(triton_side.modules(None), [ARCH], Console(quiet=True))))
    found: list[Entry] = pickle.loads(kept.read_bytes())
    return found


def test_cases_reach_every_kernel(entries: list[Entry]) -> None:
    assert {entry.kernel for entry in entries} == _jitted_kernels()


def test_no_kernel_spills(entries: list[Entry]) -> None:
    assert not [(entry.kernel, entry.cases, entry.code) for entry in entries if entry.failed]


def test_kernels_fit_on_a_multiprocessor(entries: list[Entry]) -> None:
    assert all(entry.occupancy for entry in entries)


def test_loads_are_128_bits_wide(entries: list[Entry]) -> None:
    for entry in entries:
        if entry.stem in ("gated_linear_attention", "quantised_linear", "quantised_cats_mlp"):
            continue  # steep gates are read row by row; gates per head, scales of a group are single numbers
        assert entry.code.widest_load == 128, (entry.kernel, entry.cases)
        # Biases and thresholds per channel are read once per block, in whatever width; a tile takes dozens of narrow loads.
        assert entry.code.narrow_loads <= 2 or "options" in " ".join(entry.cases), (entry.kernel, entry.cases)


def test_16_bit_products_use_matrix_units_and_fp32_products_do_not(entries: list[Entry]) -> None:
    products = [entry for entry in entries if entry.stem == "cats_mlp" and "reduce" not in entry.kernel]
    assert len(products) >= 9
    for entry in products:
        assert bool(entry.code.matrix) == (not entry.cases[0].startswith("fp32")), (entry.kernel, entry.cases)


@pytest.mark.parametrize(("arch", "instruction"), [(90, "HGMMA"), (100, "UTCHMMA")])
def test_linear_attention_uses_the_newest_matrix_units(arch: int, instruction: str, entries: list[Entry]) -> None:
    """Normalised, one gate per channel, K = V = 128 in bf16: every product in wgmma or tcgen05, no spills."""
    if arch != ARCH:
        entries = triton_entries(triton_side.modules("gated_linear_attention"), [arch], Console(quiet=True))
    entries = [e for e in entries if e.stem == "gated_linear_attention" and "bf16 D128 channel" in e.cases]
    forward, walk = ["chunk_fwd_state_kernel", "chunk_fwd_out_kernel"], ["chunk_fwd_state_kernel"]
    names = [*forward, *walk, "chunk_bwd_den_kernel", "chunk_bwd_state_kernel", "chunk_bwd_dqkv_kernel"]
    assert sorted(entry.kernel for entry in entries) == sorted(names)
    for entry in entries:
        assert set(entry.code.matrix) == {instruction}, (entry.kernel, entry.code.matrix)
        assert not entry.code.spills, entry.kernel


MANY_TOKENS = """
from functools import partial
import torch
from subquad.kernels.cats_mlp import AotCase, _aot_args, cats_mlp_fwd

def args(dtype, n):
    x, *rest = _aot_args(dtype, True)
    return torch.empty((n, x.shape[1]), dtype=dtype, device="meta"), *rest

AOT = [
    AotCase(f"{dtype} {n}", cats_mlp_fwd, partial(args, dtype, n))
    for dtype in (torch.bfloat16, torch.float32)
    for n in (1, 2, 4, 5, 16)
]
"""


def test_one_compiled_kernel_serves_every_number_of_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes a token's result independent, bit for bit, of how many tokens the call has."""
    (tmp_path / "many_tokens.py").write_text(MANY_TOKENS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    compiled = triton_side.compile_all(["many_tokens"], [ARCH], tmp_path, lambda steps: None)
    assert len(compiled) == 2 * 4
    assert all(len(kernel.cases) == 5 for kernel in compiled)
