"""`context_parallel`: whole transformers models on shards of a sequence.

Only the mask function looks for the layout; the mask that it returns carries it to softmax and LAWCAT layers, so that a forward
that is computed again in the backward needs no active block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .._derived import Derived
from ..masks import IntervalMask
from ..masks.model_mask import ModelMask
from .exchange import check_layout
from .interval_attention import interval_attention
from .layout import SequenceLayout


class ShardedMask(ModelMask):
    """The mask of a whole sequence that lies on several ranks, and what layers do with it."""

    layout: SequenceLayout
    whole: IntervalMask
    real: torch.Tensor | None

    @classmethod
    def over(cls, layout: SequenceLayout, window: int, padding: torch.Tensor | None) -> ShardedMask:
        """Causal, within `window` keys if it is not negative and within packed sequences.

        Args:
            padding: bool [B, tokens], False at padding; None: there is none.
        """
        if layout.packed:
            whole = IntervalMask.packed(torch.tensor(layout.cu_seqlens), window=window)
        else:
            whole = IntervalMask.causal() if window < 0 else IntervalMask.sliding(window)
        own = layout.lengths[layout.rank]
        result = cls.__new__(cls)
        result.__dict__.update(IntervalMask.causal(own, own).__dict__)
        result.layout, result.sliding_window, result.real = layout, window, None
        if padding is not None:
            whole = (whole if layout.packed else whole.bound(layout.tokens, layout.tokens)).with_keys(padding)
            result.real = layout.shard(padding)
        result.whole = whole
        return result

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        sinks: torch.Tensor | None,
        softcap: float,
    ) -> torch.Tensor:
        """Softmax attention [B, T, Hq, D] of this rank's tokens."""
        options = {"scale": scale, "sink_logits": sinks, "softcap": softcap}
        out = interval_attention(query, key, value, self.whole, layout=self.layout, **options)  # type: ignore[arg-type]
        assert isinstance(out, torch.Tensor)
        return out

    def mix(self, layer: Any, hidden_states: torch.Tensor, positions: Any) -> torch.Tensor:
        """What `LawcatAttention.mix` returns for this rank's tokens."""
        from .lawcat import lawcat

        return lawcat(layer, hidden_states, positions, self.layout, self.real)


@contextmanager
def context_parallel(layout: SequenceLayout) -> Iterator[None]:
    """Within the block, transformers models with attn_implementation="subquad" and their LAWCAT layers see a whole sequence of
    which they are given this rank's tokens.

    Causal and sliding attention, sink logits, packed sequences (by the layout's `cu_seqlens`), padding before or behind a row's
    tokens (`attention_mask` of the whole sequence, [B, tokens], on all ranks). Call the model with `layout.shard(ids)`,
    `position_ids=layout.positions(restart=True)[None]`, `use_cache=False`; give it `shift_labels=layout.labels(ids)` and
    `num_items_in_batch` of all ranks. The loss is a sum over ranks; backward may run after the block.

    Args:
        layout: where the tokens are.

    Raises:
        TypeError: no layout.
        RuntimeError: at the end of a block in which no model asked for a mask: it would have attended to its own tokens alone.
        ValueError: in the model, for masks of another form, caches, layers that have no context parallelism.

    Example:
        >>> with context_parallel(layout):  # doctest: +SKIP
        ...     out = model(layout.shard(ids), position_ids=layout.positions(restart=True)[None], use_cache=False)
    """
    check_layout(layout)
    from ..integrations.transformers import masks

    derived = Derived()  # masks of a padding, while it is what it was
    made: dict[int, ShardedMask] = {}  # without padding, by window

    def mask(pattern: Any, batch: int, queries: int, keys: int, padding: torch.Tensor | None) -> ShardedMask:
        own = layout.lengths[layout.rank]
        if queries != own or keys != (own if padding is None else padding.shape[-1]):  # transformers' own number
            raise ValueError(
                f"use_cache: expected False and {own} tokens under context_parallel, got {queries} queries of {keys} keys"
            )
        if pattern is None or not pattern.linear:
            raise ValueError("mask_function: expected causal or sliding attention under context_parallel, got another")
        window = pattern.window
        if window not in made:
            made[window] = ShardedMask.over(layout, window, None)
        if padding is None:
            return made[window]

        def padded() -> ShardedMask:
            _check_padding(padding, batch, layout)
            return made[window] if bool(padding.all()) else ShardedMask.over(layout, window, padding != 0)

        return derived.get(padding, (window,), padded)

    masks.SHARDED.append(mask)
    try:
        yield
    finally:
        masks.SHARDED.remove(mask)
    if not made:
        raise RuntimeError(
            "context_parallel: no model asked for its mask in this block; expected one with attn_implementation='subquad'"
        )


def _check_padding(padding: torch.Tensor, batch: int, layout: SequenceLayout) -> None:
    if padding.dim() != 2 or padding.shape != (batch, layout.tokens):
        raise ValueError(
            f"attention_mask: expected shape [{batch}, {layout.tokens}], of the whole sequence, under context_parallel, got "
            f"{list(padding.shape)}"
        )
    real = padding.bool()
    if bool(((real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0] > 1).any()):
        raise ValueError("attention_mask: expected padding before or behind all tokens of a row, got some between them")
