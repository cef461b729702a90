"""Options of the layers that conversions make, written once: each constructor takes the fields of its dataclass."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import _checks

GATES = ("vector", "scalar", "none")
ROPES = ("none", "linear")


@dataclass(frozen=True)
class CatsConfig:
    """Options of `CATSMLP`, which describes them."""

    threshold: float | torch.Tensor | None = None
    inclusive: bool = False
    mask_mode: str = "token"
    prefill: str = "masked"
    max_sparse_tokens: int | None = None
    grad: str = "masked"
    backend: str | None = None
    down_layout: str = "auto"


@dataclass(frozen=True)
class LawcatConfig:
    """Options of `LawcatAttention`, which describes them."""

    feature_dim: int | None = None
    conv_size: int = 4
    conv_bias: bool = False
    qk_activation: str | None = None
    share_qk_conv: bool = False
    conv_on_v: bool = False
    tie_qk_feature_map: bool = True
    gate: str = "vector"
    gate_rank: int | None = 16
    gate_logit_normalizer: float = 16.0
    clamp_min: float | None = None
    normalize: bool = True
    eps: float = 1e-10
    rope: str = "none"
    window_size: int = 0
    affine_window: bool = False
    linear_covers_window: bool = True
    linear_scale: float | None = None
    share_kv_features: bool = False
    use_output_gate: bool = False
    feature_init: str = "eye"
    backend: str | None = None
    keep: int = 0

    def check(self, multi_head: bool) -> None:
        """Refuse values that do not exist, or not together. `multi_head`: there are as many key heads as query heads."""
        window = self.window_size
        if isinstance(window, bool) or not isinstance(window, int) or window < 0:
            raise ValueError(f"window_size: expected an int >= 0, got {window!r}")
        if isinstance(self.keep, bool) or not isinstance(self.keep, int) or self.keep < 0:
            raise ValueError(f"keep: expected an int >= 0, got {self.keep!r}")
        _checks.choice("gate", self.gate, GATES)
        _checks.choice("rope", self.rope, ROPES)
        if window and not self.normalize:
            raise ValueError("window_size: expected 0 with normalize=False, for the branches share a denominator")
        if not window and not self.linear_covers_window:
            raise ValueError("linear_covers_window: expected True without a window, got False")
        if self.share_qk_conv and self.share_kv_features and not multi_head:
            expected = "expected False with share_kv_features, whose convolutions differ in channels"
            raise ValueError(f"share_qk_conv: {expected}")
