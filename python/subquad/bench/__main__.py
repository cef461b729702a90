"""`python -m subquad.bench`."""

from __future__ import annotations

from ..cli import module_main

if __name__ == "__main__":
    raise SystemExit(module_main("subquad.bench"))
