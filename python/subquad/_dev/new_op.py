"""`python -m subquad._dev.new_op NAME`: every file of a new op, in its place.

The skeleton is complete and compiles: the square of its input, forward and backward, on every backend. Its reference
raises until it is written, so its tests fail first and say what to do. What exists is left alone; the lines to add are
printed.
"""

from __future__ import annotations

import argparse
import keyword
import re
from pathlib import Path

TEMPLATES = Path(__file__).parent / "templates"
PLACES = {
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
    "bench.py.in": "benchmarks/{stem}.py",
}
WIRING = {
    "python/subquad/_schemas.py": (
        "OPS: dict[str, Op] = {",
        '    "@stem@_fwd": Op("@stem@", "(Tensor x) -> Tensor", lambda x: _like(x)),\n'
        '    "@stem@_bwd": Op("@stem@", "(Tensor grad_y, Tensor x) -> Tensor", lambda grad_y, x: _like(x)),',
    ),
    "python/subquad/_backends.py": (
        "PREFERENCE: dict[str, dict[str, tuple[str, ...]]] = {",
        '    "@stem@": {"cpu": ("native", "reference"), "cuda": ("triton", "native", "reference")},',
    ),
    "python/subquad/__init__.py": ("from .ops.cats_mlp import cats_mlp", "from .ops.@stem@ import @stem@"),
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
    lines = ["Next:"]
    for number, (path, (after, text)) in enumerate(WIRING.items(), start=1):
        lines += [f"{number}. {path}, below `{after}`:", fill(text, stem)]
    return "\n".join(
        [
            *lines,
            f'   and "{stem}" in __all__',
            f"4. python/subquad/reference/{stem}.py: the maths. Then the schema, and with it every file above.",
            f"5. pytest tests/ops/{stem}: fails until the reference is written, then checks each backend.",
            '   A place that is not needed is deleted and declared in the spec: missing={"nn": "reason"}.',
            "6. subquad report --ops: the support table, for README.md. A line in CHANGELOG.md.",
        ]
    )


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
