"""More than one machine: operators on shards of one long sequence, on process groups that exist.

Nothing of it is imported by `import subquad`. A `SequenceLayout` says which rank owns which tokens; operators of the names they
have in `subquad` take and give this rank's tokens, and send what their mathematics needs and no more.

The loss is the sum over ranks of what each calls backward on. Gradients of shards are then final; those of what every rank holds
whole (taps, feature maps, sink logits, parameters) are a rank's part of a sum, which DDP, FSDP2 or an all-reduce adds up.
"""

from __future__ import annotations

from . import dtensor as _dtensor  # noqa: F401  its import registers the rules
from .agreement import agree
from .causal_conv1d import causal_conv1d, conv_feature_map
from .context import context_parallel
from .exchange import halo
from .gated_linear_attention import gated_linear_attention
from .hand_over import final_state, hand_over
from .heads import by_heads
from .interval_attention import interval_attention
from .layout import Run, SequenceLayout
from .linear_step import gated_linear_attention_step
from .sink_cache import ShardedSinkKVCache, shard_caches
from .tensor_parallel import CATSParallel, LawcatParallel, parallelize

__all__ = [
    "CATSParallel",
    "LawcatParallel",
    "Run",
    "SequenceLayout",
    "ShardedSinkKVCache",
    "agree",
    "by_heads",
    "causal_conv1d",
    "context_parallel",
    "conv_feature_map",
    "final_state",
    "gated_linear_attention",
    "gated_linear_attention_step",
    "halo",
    "hand_over",
    "interval_attention",
    "parallelize",
    "shard_caches",
]
