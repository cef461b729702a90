"""`subquad build`: compile the native libraries into the per-user cache now, instead of at a first explicit use."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import _native

LIBRARIES = {"native": "_C", "cuda": "_C_cuda", "simt": "_C_simt"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument(
        "what",
        nargs="*",
        metavar="LIBRARY",
        help=f"any of {', '.join(LIBRARIES)} (default: native, the CPU kernels; simt: the CUDA emulator, for tests)",
    )


def run_from_args(args: argparse.Namespace) -> int:
    """Build and load each library; 0 when all of them work."""
    failed = False
    for name in args.what or ["native"]:
        if name not in LIBRARIES:
            print(f"subquad build: LIBRARY: expected one of {', '.join(LIBRARIES)}, got {name!r}", file=sys.stderr)
            return 2
        reason = _native.load(LIBRARIES[name], build=True)
        if reason is None:
            path = _native.loaded()[LIBRARIES[name]]
            print(f"{name}: {path}{_as_it_is(path)}")
        else:
            print(f"{name}: {reason}", file=sys.stderr)
            failed = True
    return int(failed)


def _as_it_is(path: Path) -> str:
    """What to know of a library in the package itself, which no build replaces."""
    if path.parent != _native.PACKAGE:
        return ""
    sources = [source for source in _native.SOURCES.resolve().rglob("*") if source.is_file()]
    newest = max(sources, key=lambda source: source.stat().st_mtime, default=path)
    # An installation writes sources and libraries within seconds, in any order.
    older = newest.stat().st_mtime > path.stat().st_mtime + 60
    return (
        f" (in the package, not built now{f': older than {newest}' if older else ''}; remove it to build the sources)"
    )


if __name__ == "__main__":
    from .cli import module_main

    raise SystemExit(module_main("subquad.build"))
