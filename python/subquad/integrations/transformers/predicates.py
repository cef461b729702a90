"""What a mask function of transformers means.

The library describes a mask by a predicate (batch, head, query, key) -> bool, and builds the usual ones by closing functions
over a window: `and_masks(sliding_window_overlay(w), causal_mask_function)`. Nothing else says which of them it is, and asking
the predicate about every pair of positions costs T^2. So the closures are read: by the objects that the library exports, and
by the qualified names of the two that are made anew for each model. What is not exactly one of these is not recognised, and a
caller then asks the predicate; a library that changes its closures makes masks slower, never wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def recognised(function: Callable[..., Any] | None) -> tuple[bool, int] | None:
    """(both ways, window or -1) of full, causal and sliding causal masks; None of any other predicate."""
    from transformers import masking_utils

    if function is None or function is masking_utils.causal_mask_function:
        return False, -1
    if function is getattr(masking_utils, "bidirectional_mask_function", None):
        return True, -1
    parts = _closed_over(function).get("mask_functions", ())
    sliding = (
        function.__qualname__.startswith("and_masks.")
        and len(parts) == 2
        and parts[1] is masking_utils.causal_mask_function
        and parts[0].__qualname__.startswith("sliding_window_overlay.")
    )
    return (False, _closed_over(parts[0])["sliding_window"]) if sliding else None


def _closed_over(function: Callable[..., Any]) -> dict[str, Any]:
    """The variables that a function was closed over, by name."""
    code = getattr(function, "__code__", None)
    cells = getattr(function, "__closure__", None) or ()
    return {} if code is None else {n: c.cell_contents for n, c in zip(code.co_freevars, cells, strict=True)}
