"""The widest Triton kernels on architectures with little shared memory, and on AMD: they fit, by smaller tiles if need be."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from subquad.gpu_report import triton_entries
from subquad.gpu_report.occupancy import ARCHS, Arch

pytest.importorskip("triton")

# What takes the most shared memory of all kernels, by `make gpu-report`, and the widest heads.
WIDEST = """
from functools import partial
import torch
from subquad.kernels import cats_mlp, interval_attention, sink_attention_step
from subquad.kernels._common.aot import AotCase

attention = partial(partial, interval_attention._aot_args)
step = partial(partial, sink_attention_step._aot_args)
AOT = [
    AotCase("bf16 D256", interval_attention.interval_attention_bwd, attention(torch.bfloat16, 256, "causal", True), SPILLS),
    AotCase("fp32 D256", interval_attention.interval_attention_fwd, attention(torch.float32, 256, "causal"), SPILLS),
    *(case for case in cats_mlp.AOT if case.name == "bf16 row-major"),
    AotCase("bf16 D256 step", sink_attention_step.sink_attention_step_, step(torch.bfloat16, 256, 1, None, "pre", 4092), SPILLS),
    AotCase("fp32 D256 chunk", sink_attention_step.sink_attention_step_, step(torch.float32, 256, 64, None, "pre", 4092), SPILLS),
]
"""
SPILLS = """
kernels = ("interval_attention_fwd_kernel", "interval_attention_dq_kernel", "interval_attention_dkdv_kernel")
kernels += ("sink_attention_step_attend_kernel",)
SPILLS = dict.fromkeys(kernels, "heads of 256")
"""


@pytest.mark.heavy
@pytest.mark.parametrize("arch", [86, 120, "gfx942"])
def test_widest_kernels_fit(arch: Arch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "widest.py").write_text(SPILLS + WIDEST)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    entries = triton_entries(["widest"], [arch], Console(quiet=True))
    assert {entry.kernel for entry in entries} >= {"interval_attention_fwd_kernel", "interval_attention_dkdv_kernel"}
    for entry in entries:
        assert not entry.failed, (entry.kernel, entry.cases, entry.shared, entry.code)
        assert entry.occupancy, (entry.kernel, entry.cases)


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if isinstance(arch, int)])
@pytest.mark.parametrize("wide_floats", [False, True], ids=["16-bit", "fp32"])
def test_tiles_of_attention_fit_for_every_head(arch: Arch, wide_floats: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from subquad.kernels.interval_attention import tiles

    monkeypatch.setattr(tiles, "shared_memory", lambda: ARCHS[arch].block_shared)
    for kernel, table in tiles.TILES.items():
        for small, large, widest, fp32 in table.values():
            for width in (16, 32, 64, 128, 256, 512):
                chosen = fp32 if wide_floats else small if width <= 64 else large if width <= 256 else widest
                row = width * (4 if wide_floats else 2)
                if tiles._room(kernel, 16, 16, 1) * row > ARCHS[arch].block_shared - 1024:
                    assert (width, wide_floats) == (512, True) and kernel != "fwd"
                    with pytest.raises(ValueError, match=r"^q: expected heads whose tiles fit \d+ bytes"):
                        tiles._fitting(chosen, kernel, row)
                    continue
                rows, keys, _, stages, *_ = tiles._fitting(chosen, kernel, row)
                assert tiles._room(kernel, rows, keys, stages) * row <= ARCHS[arch].block_shared, (kernel, width)
                if ARCHS[arch].block_shared >= 160 * 1024 and row <= 1024:  # nothing is made smaller without need
                    assert (rows, keys, stages) == (chosen[0], chosen[1], chosen[3]), (kernel, width)
                assert all(n >= 16 and n & (n - 1) == 0 for n in (rows, keys))
