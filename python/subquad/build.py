"""`subquad build`: compile the native libraries into the per-user cache now, instead of at a first explicit use."""

from __future__ import annotations

import argparse
import sys

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
            print(f"{name}: {_native.loaded()[LIBRARIES[name]]}")
        else:
            print(f"{name}: {reason}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    from .cli import module_main

    raise SystemExit(module_main("subquad.build"))
