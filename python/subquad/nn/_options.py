"""Options of the layers that conversions make, written once: each constructor takes the fields of its dataclass."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import _checks

GATES = ("vector", "scalar", "none")
ROPES = ("none", "linear")
POSITIONS = ("cache", "absolute")
KEY_ROPES = ("pre", "post")


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


@dataclass(frozen=True)
class SinkConfig:
    """Options of `SinkAttention.from_attention`, which describes them."""

    sink_tokens: int = 4
    window: int = 1020
    positions: str = "cache"
    kv_dtype: str | torch.dtype | None = None
    slack: int = 64
    key_rope: str = "pre"
    learned_sink: bool = False
    sinks_in_sliding: bool = False
    backend: str | None = None

    def check(self) -> None:
        """Refuse values that do not exist, or not together."""
        for name in ("sink_tokens", "window", "slack"):
            _checks.size(name, getattr(self, name))
        _checks.some_seen(self.sink_tokens, self.window)
        _checks.choice("positions", self.positions, POSITIONS)
        _checks.choice("key_rope", self.key_rope, KEY_ROPES)
        for name in ("learned_sink", "sinks_in_sliding"):
            _checks.flag(name, getattr(self, name))
        self.ring_dtype()

    def ring_dtype(self) -> torch.dtype | None:
        """`kv_dtype`, which may be a name, as torch has it."""
        known = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.int8, torch.float8_e4m3fn)}
        if self.kv_dtype is None:
            return None
        found = known.get(str(self.kv_dtype).removeprefix("torch."))
        if found is None:
            raise ValueError(f"kv_dtype: expected None, 'int8' or 'float8_e4m3fn', got {self.kv_dtype!r}")
        return found
