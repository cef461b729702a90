"""Choosing CATS thresholds from data, and watching the sparsity they give."""

from __future__ import annotations

from .calibrator import CatsCalibrator
from .sketch import MagnitudeSketch
from .tracking import LayerSparsity, SparsityTracker, sparsity_report, track_sparsity

__all__ = [
    "CatsCalibrator",
    "LayerSparsity",
    "MagnitudeSketch",
    "SparsityTracker",
    "sparsity_report",
    "track_sparsity",
]
