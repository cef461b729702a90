r"""A mergeable quantile sketch for magnitudes, in 58 KB.

A magnitude's bin is the upper half of its float32 bit pattern: 8 exponent and 7 mantissa bits, kept for
$[2^{-40}, 2^{17})$, which makes $57 \cdot 128 = 7296$ bins of relative width at most $2^{-7}$ at every scale. One bin
holds exactly one bfloat16 value, so order statistics of bfloat16 data are exact; for finer data the position inside a
bin is interpolated. Smaller magnitudes, of which only the number matters, are counted by octave; zeros, magnitudes from
$2^{17}$ on and NaN apart.
"""

from __future__ import annotations

import math
import warnings

import torch

from .._backends import SubquadWarning

MIN_EXPONENT, MAX_EXPONENT = -40, 17
BINS = (MAX_EXPONENT - MIN_EXPONENT) << 7
OCTAVES = 127 + MIN_EXPONENT  # float32 exponent fields below 2^MIN_EXPONENT; the first holds the subnormals
ABOVE = OCTAVES + BINS
ZERO, NAN, INEXACT, SLOTS = range(ABOVE + 1, ABOVE + 5)


class MagnitudeSketch:
    """Counts of |v|, from which thresholds for any share of the values can be read.

    Attributes:
        counts: int64 `[SLOTS]`: `OCTAVES` octaves, `BINS` bins, then magnitudes from 2^17 on, zeros, NaN, and how many
            of all these were no bfloat16 numbers.
        maximum: fp32 `[]`, the largest magnitude so far (0 at first).
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.counts = torch.zeros(SLOTS, dtype=torch.int64, device=device)
        self.maximum = torch.zeros((), dtype=torch.float32, device=device)

    @torch.no_grad()
    def update(self, values: torch.Tensor) -> None:
        """Count |values|: any shape, any floating dtype (float64 is rounded to float32), on any device."""
        if values.numel() == 0:
            return
        magnitude = values.detach().to(self.counts.device, torch.float32).abs().flatten().contiguous()
        nan = magnitude.isnan()
        bits = magnitude.view(torch.int32)
        slot = ((bits >> 16) - (OCTAVES * 127)).clamp_(max=ABOVE)
        slot = torch.where(slot < OCTAVES, bits >> 23, slot)
        slot.masked_fill_(bits == 0, ZERO).masked_fill_(nan, NAN)
        self.counts += torch.bincount(slot, minlength=SLOTS)
        self.counts[INEXACT] += ((bits & 0xFFFF) != 0).sum()
        self.maximum = torch.maximum(self.maximum, magnitude.masked_fill_(nan, 0.0).amax())

    def merge(self, other: MagnitudeSketch) -> None:
        """Add the counts of another sketch; the result is that of one sketch over both data sets."""
        self.counts += other.counts.to(self.counts.device)
        self.maximum = torch.maximum(self.maximum, other.maximum.to(self.maximum.device))

    @property
    def total(self) -> int:
        """Number of values counted, NaN aside."""
        return int(self.counts[:NAN].sum())

    @property
    def nan_count(self) -> int:
        """Number of NaN seen."""
        return int(self.counts[NAN])

    def threshold(self, share: float) -> float:
        """The smallest t for which at least `share` of the values satisfy |v| <= t.

        Exact for bfloat16 values; interpolated inside a bin otherwise. 0 gives -1 (nothing satisfies it), 1 gives the
        maximum. A threshold that falls among the values from 2^17 on is 2^17, with a warning.

        Raises:
            ValueError: if `share` is outside [0, 1], or nothing but NaN was counted.
        """
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"sparsity: expected a number from 0 to 1, got {share}")
        counts = self.counts.cpu()
        total = int(counts[:NAN].sum())
        if total == 0:
            raise ValueError("nothing was counted: run the model on data first")
        if share == 0.0:
            return -1.0
        if share == 1.0:
            return self.maximum.item()
        rank = max(1, math.ceil(share * total * (1 - 1e-12)))  # 0.57 * 100 exceeds 57 by rounding alone
        if rank <= counts[ZERO]:
            return 0.0
        rank -= int(counts[ZERO])
        cumulative = counts[: ABOVE + 1].cumsum(0)
        slot = int(torch.searchsorted(cumulative, rank))
        if slot == ABOVE:
            message = f"threshold clamped to 2^{MAX_EXPONENT}: larger magnitudes are not resolved"
            warnings.warn(message, SubquadWarning, stacklevel=2)
            return 2.0**MAX_EXPONENT
        low, high = _edges(slot)
        if counts[INEXACT] == 0 and slot >= OCTAVES:
            return low
        inside = 1.0 - (int(cumulative[slot]) - rank) / int(counts[slot])
        # Below the bins only the logarithm is spread evenly; the upper edge itself belongs to the next bin.
        value = low * (high / low) ** inside if slot < OCTAVES else low + (high - low) * inside
        last = torch.nextafter(torch.tensor(high), torch.tensor(0.0)).item()
        return min(value, last, self.maximum.item())


def _edges(slot: int) -> tuple[float, float]:
    if slot < OCTAVES:
        return 2.0 ** (slot - 127 if slot else -149), 2.0 ** (slot - 126)
    keys = torch.tensor([slot, slot + 1], dtype=torch.int32) + OCTAVES * 127
    low, high = (keys << 16).view(torch.float32).tolist()
    return low, high
