"""Compiled models, in graphs that are counted."""

from __future__ import annotations

from typing import Any

import torch


class Graphs:
    """A backend of torch.compile that runs a graph as it is, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        self.count += 1
        return graph.forward

    def __deepcopy__(self, memo: Any) -> Graphs:
        return self  # `generate` copies its configuration
