"""`subquad demo`: a real language model with its MLPs converted, measured and shown."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

MODELS = {"smollm2-135m": "model", "gemma3-270m": "gemma"}  # modules with a `load(device, dtype)`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--quick", action="store_true", help="fewer tokens: under two minutes on two cores")
    parser.add_argument("--model", choices=tuple(MODELS), default="smollm2-135m", help="default: smollm2-135m")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
    parser.add_argument(
        "--output", type=Path, default=Path("demo"), metavar="FOLDER", help="for report.json and plot.png"
    )


def run_from_args(args: argparse.Namespace) -> int:
    """Run the demo; 0 when the converted model passed its check against the dense one."""
    from .model import DemoError

    try:
        from .run import FULL, QUICK, run

        load = import_module(f".{MODELS[args.model]}", __package__).load
        return run(
            lambda: load(args.device, args.dtype), QUICK if args.quick else FULL, args.output, args.device, args.dtype
        )
    except DemoError as error:
        print(f"subquad demo: {error}", file=sys.stderr)
        return 2


__all__ = ["add_arguments", "run_from_args"]
