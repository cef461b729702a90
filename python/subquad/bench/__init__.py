"""`subquad bench`: time the ops against named peers, interleaved in one process, once they have passed their check."""

from __future__ import annotations

from .command import add_arguments, run_from_args

__all__ = ["add_arguments", "run_from_args"]
