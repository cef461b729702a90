"""The `subquad` command. Each subcommand is a module with `add_arguments(parser)` and `run_from_args(args) -> int`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

COMMANDS = {
    "report": ("subquad.report", "what is installed here, which backends can run, and which would be chosen"),
    "demo": ("subquad.demo", "run the main job on a real language model and measure it"),
    "bench": ("subquad.bench", "time the ops against named peers, after checking them"),
    "gpu-report": ("subquad.gpu_report", "compile every GPU kernel ahead of time and list what it needs"),
    "build": ("subquad.build", "compile the native libraries into the per-user cache now"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    from . import __version__

    arguments = list(sys.argv[1:] if argv is None else argv)
    wanted = next((word for word in arguments if not word.startswith("-")), None)
    parser = argparse.ArgumentParser(prog="subquad", description="Kernels for efficient attention variants.")
    parser.add_argument("--version", action="version", version=f"subquad {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == wanted:  # only the module that is asked for is imported
            _attach(command, module)
    return run(parser, arguments)


def module_main(module: str, argv: Sequence[str] | None = None) -> int:
    """`python -m subquad.<module>`: the same subcommand without the umbrella."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}")
    _attach(parser, module)
    return run(parser, argv)


def _attach(parser: argparse.ArgumentParser, module: str) -> None:
    implementation = import_module(module)
    implementation.add_arguments(parser)
    parser.set_defaults(run=implementation.run_from_args)


def run(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Parse and run; an interrupted command ends quietly."""
    args = parser.parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.run
    try:
        return command(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


__all__ = ["COMMANDS", "main", "module_main"]
