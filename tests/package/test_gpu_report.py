"""`subquad gpu-report`: planted spills are found, declared ones pass, and the arithmetic of occupancy is right."""

from __future__ import annotations

import argparse
import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from subquad import _build, _native, gpu_report
from subquad.gpu_report import cubin, cuda_side, triton_side
from subquad.gpu_report.entry import Entry
from subquad.gpu_report.occupancy import ARCHS, Arch, occupancy, parse_archs

PLANTED = """
import torch, triton
import triton.language as tl
from subquad.kernels._common.aot import AotCase

@triton.jit
def _planted_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        sums += tl.load(x_ptr + start + lanes)
    tl.store(y_ptr + lanes, sums)

def planted(x, y):
    _planted_kernel[(3,)](x, y, x.numel(), BLOCK=4096, num_warps=1, {limit} enable_fp_fusion=False)

def args():
    return torch.empty(1 << 20, device="meta"), torch.empty(4096, device="meta")

AOT = [AotCase("planted", planted, args, {allow})]
"""


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What the report prints; kernels are looked for in the module `planted` only, CUDA sources nowhere."""
    monkeypatch.setattr(triton_side, "modules", lambda family: ["planted"])
    monkeypatch.setattr(cuda_side, "unavailable", lambda archs: "left out by this test")
    return io.StringIO()


def _run(output: io.StringIO, *, family: str | None = None, json_path: Path | None = None, arch: Arch = 90) -> int:
    return gpu_report.run(family, [arch], json_path, Console(file=output, width=200))


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("maxnreg", "allow", "code"),
    [(255, {}, 0), (64, {}, 1), (64, {"_planted_kernel": "a test"}, 0), (64, {"_other_kernel": "a test"}, 1)],
    ids=["no spill", "spill", "declared", "declared elsewhere"],
)
def test_planted_triton_spill(
    maxnreg: int, allow: dict[str, str], code: int, output: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    (tmp_path / "planted.py").write_text(PLANTED.format(limit=f"maxnreg={maxnreg},", allow=allow))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    path = tmp_path / "report.json"
    assert _run(output, json_path=path) == code
    assert "CUDA sources left out: left out by this test" in output.getvalue()
    report = json.loads(path.read_text())
    assert report["schema"] == gpu_report.SCHEMA and report["triton"]
    (entry,) = report["entries"]
    assert (entry["kernel"], entry["arch"], entry["grid"], entry["threads"]) == ("_planted_kernel", 90, [3], 32)
    assert entry["spills"] == (maxnreg < 255) and entry["failed"] == bool(code)
    assert bool(entry["code"]["spill_stores"] and entry["code"]["spill_loads"]) == entry["spills"]
    assert entry["code"]["widest_load"] == 128 and entry["code"]["matrix"] == {}
    assert ("may spill: a test" in output.getvalue()) == (entry["spills"] and not entry["failed"])
    assert ("_planted_kernel (planted) spills on sm_90" in output.getvalue()) == entry["failed"]


@pytest.mark.heavy
@pytest.mark.parametrize("warps", [1, 8])
def test_amd_is_compiled_without_rocm(
    warps: int, output: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32768 sums fit into the registers of eight warps, and not into those of one."""
    pytest.importorskip("triton")
    source = PLANTED.format(limit="", allow={}).replace("BLOCK=4096, num_warps=1", f"BLOCK=32768, num_warps={warps}")
    (tmp_path / "planted.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    path = tmp_path / "report.json"
    assert _run(output, json_path=path, arch="gfx942") == 0  # spills there are listed, not refused
    (entry,) = json.loads(path.read_text())["entries"]
    assert (entry["arch"], entry["threads"], entry["spills"]) == ("gfx942", 64 * warps, warps == 1)
    assert entry["code"]["widest_load"] == 128 and 64 <= entry["code"]["registers"] <= 512


@pytest.mark.parametrize(("arch", "most"), [(80, 163), (86, 99), (90, 227), (120, 99), ("gfx942", 64), ("gfx950", 160)])
def test_more_shared_memory_than_a_block_can_have(arch: Arch, most: int) -> None:
    code = cubin.Code("k", 32, 0, 0, 0, 0, 0, 128, {}, 128, 0, 0)
    there, over = (
        Entry("triton", "op", "k", ["case"], arch, 128, [1], shared, occupancy(arch, 128, 32, shared), code, None)
        for shared in (most * 1024, most * 1024 + 1)
    )
    assert not there.failed and there.occupancy
    assert over.failed and not over.occupancy
    output = io.StringIO()
    gpu_report.show([there, over], Console(file=output, width=200))
    assert f"needs {most * 1024 + 1} bytes of shared memory" in output.getvalue()
    assert "0 spill without a declared reason, 1 need too much shared memory" in output.getvalue()


def test_architectures_of_a_list() -> None:
    assert parse_archs("120,80,gfx950,80") == [80, 120, "gfx950"]
    assert parse_archs(",".join(map(str, ARCHS))) == list(ARCHS)


@pytest.mark.heavy
def test_case_that_does_not_compile(output: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    source = PLANTED.format(limit="", allow={}).replace("tl.zeros([BLOCK]", "tl.zeros([BLOCK + 1]")
    (tmp_path / "planted.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    assert _run(output) == 2
    assert "compiling the Triton kernels failed" in output.getvalue() and "BLOCK + 1" in output.getvalue()


CUDA = """
{comment}
template <int kSize>
__global__ void __launch_bounds__(96) planted_kernel(const int* index, float* y) {{
  float table[kSize] = {{}};
  for (int i = 0; i < 100; ++i) table[index[i] % kSize] += y[i];
  y[threadIdx.x] = table[index[threadIdx.x] % kSize];
}}
__global__ void planted_clean_kernel(const float4* x, float4* y) {{ y[threadIdx.x] = x[threadIdx.x]; }}
template __global__ void planted_kernel<64>(const int*, float*);
"""


@pytest.mark.heavy
@pytest.mark.skipif(_build.find_nvcc() is None, reason="nvcc is not installed")
def test_planted_cuda_spill(output: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_side, "compile_all", lambda *args: [])
    monkeypatch.setattr(cuda_side, "unavailable", lambda archs: None)
    monkeypatch.setattr(_native, "SOURCES", tmp_path)
    monkeypatch.setenv("SUBQUAD_CACHE_DIR", str(tmp_path / "cache"))
    source, unrelated = (tmp_path / "ops" / stem / "cuda.cu" for stem in ("planted", "unrelated"))
    for path in (source, unrelated):
        path.parent.mkdir(parents=True)
    unrelated.write_text("this is not C++")
    path = tmp_path / "report.json"

    source.write_text(CUDA.format(comment=""))
    assert _run(output, family="planted", json_path=path) == 1
    planted, clean = json.loads(path.read_text())["entries"]
    assert (clean["kernel"], clean["failed"], clean["threads"], clean["occupancy"]) == (
        "planted_clean_kernel", False, None, None,
    )  # fmt: skip
    assert (planted["kernel"], planted["failed"], planted["threads"]) == ("planted_kernel<64>", True, 96)
    assert clean["code"]["widest_load"] == 128 and planted["code"]["stack"] >= 256

    source.write_text(CUDA.format(comment="// allow-spill(planted_kernel): the table is indexed at run time"))
    assert _run(output, family="planted") == 0
    assert "planted_kernel may spill: the table is indexed at run time" in output.getvalue()

    unrelated.rename(source)
    assert _run(output, family="planted") == 2
    assert "nvcc failed on planted/cuda.cu" in output.getvalue()


def test_without_nvcc_the_report_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build, "find_nvcc", lambda home=None: None)
    assert "nvcc was not found" in str(cuda_side.unavailable([90]))
    assert cuda_side.nvcc_version() is None


def test_with_nothing_to_compile(output: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_side, "unavailable", lambda: "not here")
    assert _run(output) == 2
    assert "Triton kernels left out: not here" in output.getvalue()


def test_cuda_architectures_that_the_extension_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build, "find_nvcc", lambda home=None: "nvcc")
    assert "only" in str(cuda_side.unavailable(["gfx942"]))
    assert cuda_side.unavailable([86, 90]) is None


def test_families() -> None:
    assert [name.rsplit(".")[-1] for name in triton_side.modules("cats")] == ["cats_activation", "cats_mlp"]
    assert triton_side.modules("cat") == []
    assert triton_side.modules("cats_mlp") == ["subquad.kernels.cats_mlp"]
    assert gpu_report.run("cat", [90], None, Console(quiet=True)) == 2


@pytest.mark.parametrize("arch", ["", "90,abc", "90,77"])
def test_unknown_architecture(arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_report.run_from_args(argparse.Namespace(family=None, arch=arch, json=None)) == 2
    assert "--arch: expected" in capsys.readouterr().out


# Values of NVIDIA's occupancy calculator.
@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "expected"),
    [
        (90, 128, 32, 0, 1.0),
        (90, 128, 64, 0, 0.5),
        (90, 128, 65, 0, 28 / 64),  # 72 registers: 28 warps
        (80, 1024, 64, 0, 0.5),
        (80, 1024, 65, 0, 0.0),  # does not launch
        (90, 32, 16, 0, 0.5),  # 32 blocks at most
        (90, 128, 32, 100 * 1024, 8 / 64),  # two blocks by shared memory
        (80, 128, 32, 100 * 1024, 4 / 64),
        (86, 256, 32, 0, 1.0),  # 48 warps
        (120, 128, 32, 99 * 1024 + 1, 0.0),
        ("gfx942", 256, 128, 0, 0.5),  # four waves of 512 registers on each of four units
        ("gfx942", 256, 64, 40 * 1024, 0.125),
    ],
)
def test_occupancy(arch: Arch, threads: int, registers: int, shared: int, expected: float) -> None:
    assert occupancy(arch, threads, registers, shared) == pytest.approx(expected)


def test_occupancy_of_unknown_architecture() -> None:
    with pytest.raises(ValueError, match="arch: expected"):
        occupancy(70, 128, 32, 0)


def test_names_are_readable() -> None:
    mangled = "_ZN7subquad4cuda16cats_gate_kernelIfLi1ELb1EEEvNS_13CatsMlpParamsENS0_16CatsMlpWorkspaceE"
    expected = mangled if shutil.which("c++filt") is None else "cats_gate_kernel<float, 1, true>"
    assert cubin.demangle([mangled]) == {mangled: expected}
    assert cubin._shorten("void a::k<sq::bf16, (a::Mode)1>(a::P<int>)") == "k<bf16, 1>"
    assert cubin.demangle([]) == {}
