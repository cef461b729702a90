"""`python -m subquad._dev.new_op NAME`: every file of a new op, in its place.

The skeleton is complete and compiles: the square of its input, forward and backward, on every backend. Its reference
raises until it is written, so its tests fail first and say what to do. What exists is left alone. Nothing lists the ops: a
contract is found by its place. What remains to be written by hand is printed.
"""

from __future__ import annotations

import argparse
import keyword
import re
from pathlib import Path

TEMPLATES = Path(__file__).parent / "templates"
PLACES = {
    "contract.py.in": "python/subquad/contract/{stem}.py",
    "reference.py.in": "python/subquad/reference/{stem}.py",
    "ops.py.in": "python/subquad/ops/{stem}.py",
    "nn.py.in": "python/subquad/nn/{stem}.py",
    "triton.py.in": "kernels/triton_ops/{stem}.py",
    "params.h.in": "csrc/ops/{stem}/params.h",
    "arguments.h.in": "csrc/ops/{stem}/arguments.h",
    "cpu.h.in": "csrc/ops/{stem}/cpu.h",
    "cpu.isa.cpp.in": "csrc/ops/{stem}/cpu.isa.cpp",
    "cpu.cpp.in": "csrc/ops/{stem}/cpu.cpp",
    "cuda.cuh.in": "csrc/ops/{stem}/cuda.cuh",
    "cuda.cu.in": "csrc/ops/{stem}/cuda.cu",
    "spec.py.in": "tests/specs/{stem}.py",
    "test.py.in": "tests/ops/{stem}/test_{stem}.py",
}


def fill(text: str, stem: str) -> str:
    """The template with the names put in: `@stem@` as given, `@Stem@` in capitals as classes are."""
    return text.replace("@stem@", stem).replace("@Stem@", "".join(word.capitalize() for word in stem.split("_")))


def check_name(stem: str) -> None:
    """Raise ValueError unless `stem` can name a module, a C++ file and an operator."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", stem) or keyword.iskeyword(stem):
        raise ValueError(f"name: expected lower-case words joined by '_', such as causal_conv1d, got {stem!r}")


def create(stem: str, root: Path) -> list[Path]:
    """Write every file below `root`; writes none when one of them exists.

    Raises:
        ValueError: the name is not one.
        FileExistsError: a file is there already.
    """
    check_name(stem)
    files = {root / place.format(stem=stem): (TEMPLATES / name).read_text() for name, place in PLACES.items()}
    existing = [str(path.relative_to(root)) for path in files if path.exists()]
    if existing:
        raise FileExistsError(f"already there: {', '.join(existing)}")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(fill(text, stem))
    return list(files)


def next_steps(stem: str) -> str:
    """What to do by hand, in order."""
    steps = (
        f"python/subquad/reference/{stem}.py: the maths. Then contract/{stem}.py: the schema, and with it every file above.",
        f"pytest tests/ops/{stem}: fails until the reference is written, then checks each backend.",
        'A place that is not needed is deleted and declared in the spec: missing={"nn": "reason"}; a backend in the contract.',
        f"python/subquad/__init__.py: `from .ops.{stem} import {stem}`, and its name in __all__.",
        "subquad report --ops: the support table, for README.md. A line in CHANGELOG.md, a page in docs/ and mkdocs.yml.",
    )
    return "\n".join(["Next:", *(f"{number}. {text}" for number, text in enumerate(steps, start=1))])


def main(argv: list[str] | None = None) -> int:
    """Write the files, print the rest of the work."""
    parser = argparse.ArgumentParser(prog="python -m subquad._dev.new_op", description="Write every file of a new op.")
    parser.add_argument("name", help="the field's name for the op, such as causal_conv1d")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[3], help="the checkout")
    args = parser.parse_args(argv)
    try:
        paths = create(args.name, args.root)
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))
    print("\n".join(f"wrote {path.relative_to(args.root)}" for path in paths))
    print(next_steps(args.name))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
