"""`python -m subquad.gpu_report`."""

from __future__ import annotations

from ..cli import module_main

raise SystemExit(module_main("subquad.gpu_report"))
