"""Documents tell the truth: their code runs, and the files, commands, options and variables they name exist."""

from __future__ import annotations

import pkgutil
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import subquad
from subquad import _env, cli

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "csrc" / "README.md"])
TOP_LEVEL = ("benchmarks/", "csrc/", "docs/", "kernels/", "python/", "tests/", ".ci/")


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=[path.relative_to(ROOT).as_posix() for path in paths])


per_document = each(DOCUMENTS)


def blocks(path: Path, language: str) -> list[str]:
    """Fenced code blocks of exactly this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def commands(path: Path) -> list[list[str]]:
    """Lines of shell blocks, split into words, without comments."""
    lines = "\n".join(blocks(path, "bash")).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def spoken(path: Path) -> list[list[str]]:
    """Commands in the text between backticks."""
    found = re.findall(r"`((?:subquad|make) [^`]+|python -m subquad[^`]*)`", path.read_text())
    return [shlex.split(text) for text in found]


@each([path for path in DOCUMENTS if blocks(path, "python")])
@pytest.mark.filterwarnings("ignore::subquad.SubquadWarning")
def test_python_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.use_deterministic_algorithms(False)  # as a reader's session is
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(blocks(path, "python"), start=1):
        exec(compile(block, f"{path.name}, block {number}", "exec"), namespace)


def test_the_readme_shows_code_and_commands() -> None:
    assert len(blocks(ROOT / "README.md", "python")) >= 2 and len(commands(ROOT / "README.md")) >= 4


@per_document
def test_named_files_exist(path: Path) -> None:
    for name in re.findall(r"`([\w./-]+)`", path.read_text()):
        if name.startswith(TOP_LEVEL):
            assert (ROOT / name).exists(), f"{path.name} names {name}"
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


@per_document
def test_places_of_an_op_exist_for_cats(path: Path) -> None:
    for name in re.findall(r"`([\w./-]*<stem>[\w./-]*)`", path.read_text()):
        if name.startswith(TOP_LEVEL):
            assert (ROOT / name.replace("<stem>", "cats_mlp")).exists(), f"{path.name} names {name}"


def _check_subquad(words: list[str], where: str) -> None:
    assert words and words[0] in cli.COMMANDS, f"{where}: no command {' '.join(words)}"
    for option in (word for word in words[1:] if word.startswith("--")):
        assert option in _help(words[0]), f"{where}: subquad {words[0]} has no option {option}"


def _help(command: str) -> str:
    import argparse
    from importlib import import_module

    parser = argparse.ArgumentParser()
    import_module(cli.COMMANDS[command][0]).add_arguments(parser)
    return parser.format_help()


@per_document
def test_named_commands_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(path) + spoken(path):
        where = f"{path.name}: {' '.join(words)}"
        program = words[0].removeprefix(".venv/bin/")
        if program == "make":
            assert words[1] in targets, where
        elif program == "subquad":
            _check_subquad(words[1:], where)
        elif program == "python" and words[1] == "-m" and words[2].startswith("subquad"):
            assert find_spec(words[2]) is not None, where
        elif program == "pytest":
            assert all((ROOT / word).exists() for word in words[1:] if word.startswith(("tests", "benchmarks"))), where
        elif program == "bash":
            assert (ROOT / words[1]).exists(), where
        else:
            assert program in ("pip", "cd", "git"), f"{where}: {program} is not checked by this test; extend it"


def test_every_variable_is_documented() -> None:
    text = (ROOT / "README.md").read_text()
    assert set(re.findall(r"^\| `(SUBQUAD_\w+)` \|", text, re.MULTILINE)) == set(_env.VARIABLES)
    for document in DOCUMENTS:
        assert set(re.findall(r"SUBQUAD_[A-Z_]+[A-Z]", document.read_text())) <= set(_env.VARIABLES) | {"SUBQUAD_SIMT"}


def test_the_reference_has_every_public_name() -> None:
    listed = set(re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))
    public = {f"subquad.{name}" for name in subquad.__all__ if not name.startswith("_")}
    public |= {f"subquad.nn.{name}" for name in subquad.nn.__all__ if isinstance(getattr(subquad.nn, name), type)}
    assert public - listed == {"subquad.SubquadWarning"}
    assert "subquad.compat.superlinear" in listed
    for path in listed:
        pkgutil.resolve_name(path)


def test_navigation_lists_every_page() -> None:
    listed = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}


def test_floor_of_the_performance_page() -> None:
    text = (ROOT / "docs" / "performance.md").read_text()
    for row, width in (("float32, MB", 4), ("bfloat16, MB", 2)):
        stated = re.search(rf"^\| {row} \| (.*) \|$", text, re.MULTILINE)
        assert stated is not None
        exact = [3 * 4096 * 11008 * width * (1 - 2 * s / 3) / 1e6 for s in (0, 0.5, 0.7, 0.9)]
        assert [float(cell) for cell in stated.group(1).split(" | ")] == pytest.approx(exact, abs=0.051)
