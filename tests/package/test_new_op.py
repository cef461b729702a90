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
    """A copy of the checkout with a new op, its reference still missing."""
    target = tmp_path_factory.mktemp("new_op") / "tree"
    ignore = shutil.ignore_patterns(".*", "build", "dist", "site", "docs", "__pycache__", "*.so", "*.egg-info")
    shutil.copytree(ROOT, target, symlinks=True, ignore=ignore)
    new_op.create(STEM, target)
    return target


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


def test_next_steps_are_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert new_op.main(["other_op", "--root", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "`from .ops.other_op import other_op`" in shown
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


@pytest.mark.heavy
@pytest.mark.parametrize("plan", [_build.native_library, _build.simt_library])
def test_native_skeleton_compiles(tree: Path, plan) -> None:
    library = plan(tree / "csrc", _build.torch_dir(), _env.cxx())
    units = [unit for unit in library.units if unit.source.parent.name == STEM]
    assert units
    for unit in units:
        command = [*unit.command, "-Wall", "-Werror", "-fsyntax-only", str(unit.source)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.heavy
def test_an_op_passes_with_its_mathematics_alone(tree: Path) -> None:
    """The reference is all that is missing: with it the generic tests of every backend pass, and nothing had to be listed."""
    chosen = ("-k", "reference or triton", "-x")
    done = run_tests(tree, *chosen)
    assert done.returncode == 1 and REFUSAL in done.stdout, done.stdout + done.stderr
    path = tree / new_op.PLACES["reference.py.in"].format(stem=STEM)
    refusal = f'raise NotImplementedError("{REFUSAL}: every test compares with it")'
    assert refusal in path.read_text()
    path.write_text(path.read_text().replace(refusal, "return x * x"))
    done = run_tests(tree, *chosen)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
