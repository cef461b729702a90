"""Building and shipping: compile plans, the per-user cache, what the wheel and the source archive contain."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import subquad
from subquad import _build, _env, _native

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
x86 = pytest.mark.skipif(not _build._isa_flags().get("v4"), reason="instruction sets of x86-64")


@pytest.fixture
def torch_dir() -> Path:
    return _build.torch_dir()


# --- plans ------------------------------------------------------------------------------------------------------------


@x86
def test_cpu_kernels_are_compiled_once_per_instruction_set(torch_dir: Path) -> None:
    units = _build.native_library(CSRC, torch_dir, "g++").units
    kernels = [unit for unit in units if unit.source.name.endswith(".isa.cpp")]
    sources = {unit.source for unit in kernels}
    assert sources and len(kernels) == len(_build.X86_LEVELS) * len(sources)
    for level, flags in _build.X86_LEVELS.items():
        chosen = [unit for unit in kernels if f"-DSUBQUAD_ISA={level}" in unit.command]
        assert len(chosen) == len(sources) and all(set(flags) <= set(unit.command) for unit in chosen)
    assert {"-march=x86-64", "-march=x86-64-v3", "-march=x86-64-v4"} <= {w for unit in kernels for w in unit.command}
    assert len({unit.obj for unit in units}) == len(units)
    for unit in units:
        if unit not in kernels:  # bindings must run on every machine
            assert not any(word.startswith("-march=") for word in unit.command)


def test_every_plan_uses_the_stable_interfaces_only(torch_dir: Path) -> None:
    plans = (
        _build.native_library(CSRC, torch_dir, "g++"),
        _build.simt_library(CSRC, torch_dir, "g++"),
        _build.cuda_library(CSRC, torch_dir, "g++", "nvcc"),
    )
    for plan in plans:
        assert plan.units
        for unit in plan.units:
            assert f"-DTORCH_TARGET_VERSION={_build.TORCH_TARGET}" in unit.command
            assert f"-DPy_LIMITED_API={_build.PYTHON_TARGET}" in unit.command
            assert "-march=native" not in unit.command
        assert not any("python" in word.lower() for word in plan.link if word.startswith("-l"))


def test_cuda_plan_has_every_architecture_and_the_newest_as_ptx(torch_dir: Path) -> None:
    command = _build.cuda_library(CSRC, torch_dir, "g++", "nvcc").units[0].command
    codes = [word.split("code=")[1] for word in command if "code=" in word]
    assert codes == ["sm_80", "sm_90a", "sm_100", "compute_100"]


def test_emulator_compiles_the_cuda_sources_themselves(torch_dir: Path) -> None:
    units = _build.simt_library(CSRC, torch_dir, "g++").units
    assert {unit.source for unit in units if unit.source.suffix == ".cu"} == set(CSRC.rglob("*.cu"))


@pytest.mark.parametrize("plan", [_build.native_library, _build.simt_library])
def test_sanitized_plan_differs_in_key_and_flags(plan, torch_dir: Path) -> None:
    plain, sanitized = plan(CSRC, torch_dir, "g++"), plan(CSRC, torch_dir, "g++", sanitize=True)
    assert plain.key() != sanitized.key()
    assert all(set(_build.SANITIZE) <= set(unit.command) for unit in sanitized.units)
    assert set(_build.SANITIZE) <= set(sanitized.link)


def test_key_follows_sources_headers_and_flags(toy) -> None:
    library = toy()
    key = library.key()
    assert toy().key() == key
    assert toy(flags=("-O1",)).key() != key
    (library.root / "toy.h").write_text("#define ANSWER 43\n")
    assert library.key() != key


def test_cuda_version_of_torch_is_read_without_importing_it(tmp_path: Path) -> None:
    (tmp_path / "version.py").write_text("__version__ = '2.13.0'\ncuda: Optional[str] = '13.0'\n")
    assert _build.torch_cuda_version(tmp_path) == "13.0"
    (tmp_path / "version.py").write_text("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip = None\n")
    assert _build.torch_cuda_version(tmp_path) is None


# --- compiling into the cache -----------------------------------------------------------------------------------------


@pytest.fixture
def toy(tmp_path: Path):
    """Maker of a library of one file whose compiler writes down every call. The folder has a space in its name."""
    root = tmp_path / "tool kit"
    root.mkdir()
    compiler = root / "cxx"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> "{root}/calls"\nsleep 0.2\nexec {_env.cxx()} "$@"\n')
    compiler.chmod(0o755)
    (root / "toy.h").write_text("#define ANSWER 42\n")
    (root / "toy.cpp").write_text('#include "toy.h"\nextern "C" int answer() { return ANSWER; }\n')

    def make(flags: tuple[str, ...] = ()) -> _build.Library:
        unit = _build.Unit(root / "toy.cpp", "toy.o", (str(compiler), "-fPIC", f"-I{root}", *flags))
        return _build.Library("toy", (unit,), (str(compiler), "-shared"), root)

    return make


def _calls(library: _build.Library) -> list[str]:
    return (library.root / "calls").read_text().splitlines()


def _answer(path: Path) -> int:
    code = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).answer())"
    return int(subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, check=True).stdout)


@pytest.mark.heavy
def test_cached_library_is_compiled_once_and_again_after_a_change(toy, tmp_path: Path) -> None:
    library, cache = toy(), tmp_path / "cache"
    path = _build.cached_library(library, cache, announce=False)
    assert _answer(path) == 42
    assert _build.cached_library(library, cache) == path == _build.cached_path(library, cache)
    assert len(_calls(library)) == 2  # one compilation, one link
    (library.root / "toy.h").write_text("#define ANSWER 43\n")
    changed = _build.cached_library(library, cache, announce=False)
    assert changed != path and _answer(changed) == 43 and _answer(path) == 42


@pytest.mark.heavy
def test_cached_library_announces_itself_once(toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _build.cached_library(toy(), tmp_path / "cache")
    assert capsys.readouterr().err.count("compiling toy") == 1
    _build.cached_library(toy(), tmp_path / "cache")
    assert capsys.readouterr().err == ""


@pytest.mark.heavy
def test_concurrent_processes_compile_once(toy, tmp_path: Path) -> None:
    library, cache = toy(), tmp_path / "cache"
    script = tmp_path / "build.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom subquad import _build\nroot, cache = map(Path, sys.argv[1:])\n"
        "unit = _build.Unit(root / 'toy.cpp', 'toy.o', (str(root / 'cxx'), '-fPIC', f'-I{root}'))\n"
        "library = _build.Library('toy', (unit,), (str(root / 'cxx'), '-shared'), root)\n"
        "print(_build.cached_library(library, cache))\n"
    )
    command = [sys.executable, str(script), str(library.root), str(cache)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], outputs
    assert {out.strip() for out, _ in outputs} == {str(_build.cached_path(library, cache))}
    assert len(_calls(library)) == 2
    assert sum("compiling toy" in err for _, err in outputs) == 1


@pytest.mark.heavy
def test_failed_compilation_says_why_and_leaves_nothing(toy, tmp_path: Path) -> None:
    library, cache = toy(), tmp_path / "cache"
    (library.root / "toy.cpp").write_text("this is not C++\n")
    with pytest.raises(_build.BuildError, match="error:"):
        _build.cached_library(library, cache, announce=False)
    assert not _build.cached_path(library, cache).exists()
    (library.root / "toy.cpp").write_text('extern "C" int answer() { return 1; }\n')
    assert _answer(_build.cached_library(library, cache, announce=False)) == 1


def test_missing_compiler_is_named(toy, tmp_path: Path) -> None:
    library = toy()
    (library.root / "cxx").unlink()
    with pytest.raises(_build.BuildError, match=r"no C\+\+ compiler.*set CXX"):
        _build.cached_library(library, tmp_path / "cache", announce=False)


def test_cache_folder_is_private(tmp_path: Path) -> None:
    folder = _build.private_folder(tmp_path / "a" / "b")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    assert stat.S_IMODE(_build.private_folder(folder).stat().st_mode) == 0o700


def test_cache_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(_build.BuildError, match=r"belongs to another user.*SUBQUAD_CACHE_DIR"):
        _build.private_folder(tmp_path)


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A process that has loaded nothing, with no prebuilt library and an empty cache."""
    monkeypatch.setattr(_native, "_loaded", {})
    monkeypatch.setattr(_native, "_failed", {})
    monkeypatch.setattr(_native, "_prebuilt", lambda name: None)
    monkeypatch.setenv("SUBQUAD_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_automatic_choice_compiles_nothing(nothing_built: Path) -> None:
    assert _native.load("_C", build=False) == "the native library _C is not built"
    assert not nothing_built.exists()


def test_jit_can_be_forbidden(nothing_built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBQUAD_JIT", "0")
    reason = _native.load("_C", build=True)
    assert reason is not None and "SUBQUAD_JIT=0" in reason
    assert not nothing_built.exists()


def test_explicit_request_without_a_compiler_says_so(nothing_built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    reason = _native.load("_C", build=True)
    assert reason is not None and "'no-such-compiler' was not found" in reason


_PURE = """
import warnings, torch, subquad
from subquad import _native
_native._prebuilt = lambda name: None
x, w, d = torch.randn(2, 8), torch.randn(16, 8), torch.randn(8, 16)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    y = [subquad.cats_mlp(x, w, w, d, 0.1) for _ in range(3)]
assert torch.equal(y[0], subquad.cats_mlp(x, w, w, d, 0.1, backend="reference"))
assert [issubclass(c.category, subquad.SubquadWarning) for c in caught] == [True], caught
try:
    subquad.cats_mlp(x, w, w, d, 0.1, backend="native")
except ValueError as error:
    assert "backend: got 'native'" in str(error) and "SUBQUAD_JIT=0" in str(error), error
else:
    raise SystemExit("an explicit request was not refused")
"""


@pytest.mark.heavy
def test_without_native_code_everything_computes_after_one_warning(tmp_path: Path) -> None:
    settings = ["SUBQUAD_JIT=0", f"SUBQUAD_CACHE_DIR={tmp_path}", "TRITON_INTERPRET=0"]
    unset = ["-u", "SUBQUAD_BACKEND"]
    subprocess.run(["env", *unset, *settings, sys.executable, "-c", _PURE], check=True, timeout=120)


# --- what is shipped --------------------------------------------------------------------------------------------------


def test_version_is_the_same_everywhere() -> None:
    stated = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert stated is not None and stated.group(1) == subquad.__version__
    assert f"## [{subquad.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, symlinks included, without anything built."""
    target = tmp_path_factory.mktemp("checkout") / "subquad"
    ignore = shutil.ignore_patterns(".*", "build", "dist", "site", "demo.json", "__pycache__", "*.so", "*.egg-info")
    shutil.copytree(ROOT, target, symlinks=True, ignore=ignore)
    return target


def _setup(folder: Path, *words: str) -> None:
    command = ["env", "SUBQUAD_BUILD_EXT=0", sys.executable, "setup.py", "-q", *words]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def _tracked(folder: Path, *suffixes: str) -> set[str]:
    found = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix in suffixes)
    return {name for name in found if "__pycache__" not in name}


@pytest.mark.heavy
def test_pure_wheel_has_sources_but_no_binaries_and_no_tools(checkout: Path, tmp_path: Path) -> None:
    _setup(checkout, "bdist_wheel", "-d", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"subquad-{subquad.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    assert not any(name.endswith(".so") or "/_dev/" in name or name.startswith("tests/") for name in names)
    assert {"subquad/py.typed", "subquad/csrc/module.cpp", "subquad/kernels/__init__.py"} <= names
    assert {f"subquad/csrc/{name}" for name in _tracked(CSRC, ".h", ".cuh", ".cpp", ".cu")} <= names
    assert {f"subquad/kernels/{name}" for name in _tracked(ROOT / "kernels/triton_ops", ".py")} <= names
    assert {f"subquad/testing/specs/{name}" for name in _tracked(ROOT / "tests/specs", ".py")} <= names
    python = {name for name in _tracked(ROOT / "python/subquad", ".py") if not name.startswith("_dev/")}
    assert {f"subquad/{name}" for name in python} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.heavy
def test_source_archive_has_everything_once(checkout: Path, tmp_path: Path) -> None:
    _setup(checkout, "sdist", "-d", str(tmp_path))
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {member.name.split("/", 1)[1] for member in opened.getmembers() if member.isfile()}
    for folder in ("csrc", "kernels", "tests", "python/subquad/_dev"):
        expected = {f"{folder}/{name}" for name in _tracked(ROOT / folder, ".py", ".h", ".cuh", ".cpp", ".cu")}
        assert expected <= names, sorted(expected - names)
    assert {"setup.py", "pyproject.toml", "Makefile", "LICENSE", "README.md"} <= names
    assert not any(name.startswith(("python/subquad/csrc", "python/subquad/kernels")) for name in names)
