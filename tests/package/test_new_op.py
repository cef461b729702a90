"""The generator of op skeletons: what it writes compiles, fails until it is filled in, and then passes."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from subquad import _build, _env
from subquad._dev import new_op

ROOT = Path(__file__).resolve().parents[2]
STEM = "toy_square"
REFUSAL = "write the reference of toy_square first"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout with a new op, wired in as the generator says, its reference still missing."""
    target = tmp_path_factory.mktemp("new_op") / "tree"
    ignore = shutil.ignore_patterns(".*", "build", "dist", "site", "docs", "__pycache__", "*.so", "*.egg-info")
    shutil.copytree(ROOT, target, symlinks=True, ignore=ignore)
    new_op.create(STEM, target)
    return target


@pytest.fixture(scope="module")
def wired(tree: Path) -> Path:
    for name, (after, text) in new_op.WIRING.items():
        path = tree / name
        before = path.read_text()
        assert before.count(f"{after}\n") == 1, f"{name} has no line {after!r}"
        path.write_text(before.replace(f"{after}\n", f"{after}\n{new_op.fill(text, STEM)}\n"))
    return tree


def run_tests(tree: Path, *words: str) -> subprocess.CompletedProcess[str]:
    settings = [f"PYTHONPATH={tree / 'python'}", "SUBQUAD_JIT=0"]
    command = ["env", "-u", "SUBQUAD_BACKEND", *settings, sys.executable, "-m", "pytest", f"tests/ops/{STEM}"]
    return subprocess.run([*command, *words], cwd=tree, capture_output=True, text=True, timeout=600)


def test_every_place_is_written(tree: Path) -> None:
    for place in new_op.PLACES.values():
        text = (tree / place.format(stem=STEM)).read_text()
        assert "@stem@" not in text and "@Stem@" not in text
        if place.endswith(".py"):
            ast.parse(text)


def test_places_are_those_of_an_existing_op() -> None:
    for place in new_op.PLACES.values():
        assert (ROOT / place.format(stem="cats_mlp")).exists(), place


def test_templates_and_places_match() -> None:
    assert {path.name for path in new_op.TEMPLATES.iterdir()} == set(new_op.PLACES)


def test_next_steps_name_the_lines_to_add(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert new_op.main(["other_op", "--root", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert '"other_op_fwd": Op("other_op", "(Tensor x) -> Tensor"' in shown
    assert '"other_op": {"cpu": ("native", "reference")' in shown
    assert "wrote tests/specs/other_op.py" in shown


def test_nothing_is_overwritten(tree: Path, tmp_path: Path) -> None:
    there = tmp_path / "csrc/ops/other_op/cpu.h"
    there.parent.mkdir(parents=True)
    there.write_text("mine")
    with pytest.raises(FileExistsError, match=r"csrc/ops/other_op/cpu\.h"):
        new_op.create("other_op", tmp_path)
    assert there.read_text() == "mine" and list(tmp_path.rglob("*.py")) == []


@pytest.mark.parametrize("name", ["CamelCase", "with-dash", "9lives", "two__bars", "", "class", "../escape"])
def test_names_that_are_none(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name: expected"):
        new_op.create(name, tmp_path)


def test_tests_say_what_is_not_wired_in(tree: Path, request: pytest.FixtureRequest) -> None:
    if "wired" in request.fixturenames or (tree / "python/subquad/_schemas.py").read_text().count(STEM):
        pytest.skip("wired in by an earlier test")
    done = run_tests(tree)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "add the ops to OPS in python/subquad/_schemas.py" in done.stdout
    assert "1 failed" in done.stdout and "1 skipped" in done.stdout


@pytest.mark.parametrize("plan", [_build.native_library, _build.simt_library])
def test_native_skeleton_compiles(wired: Path, plan) -> None:
    library = plan(wired / "csrc", _build.torch_dir(), _env.cxx())
    units = [unit for unit in library.units if unit.source.parent.name == STEM]
    assert units
    for unit in units:
        command = [*unit.command, "-Wall", "-Werror", "-fsyntax-only", str(unit.source)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_tests_fail_until_the_reference_is_written_and_then_pass(wired: Path) -> None:
    done = run_tests(wired, "-k", "reference or triton or wired", "-x")
    assert done.returncode == 1 and REFUSAL in done.stdout, done.stdout + done.stderr
    path = wired / new_op.PLACES["reference.py.in"].format(stem=STEM)
    refusal = f'raise NotImplementedError("{REFUSAL}: every test compares with it")'
    assert refusal in path.read_text()
    path.write_text(path.read_text().replace(refusal, "return x * x"))
    done = run_tests(wired, "-k", "reference or triton or wired")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
