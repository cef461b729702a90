"""A `SinkKVCache` in a cache of another library, which counts columns, padding included, and takes back columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch

from .. import _checks
from .sink import SinkKVCache
from .state import TensorState, adapter_for, check_rollback


class SinkState(TensorState):
    """The memory of one layer: a `SinkKVCache`, made when the first tokens show its batch, dtype and device.

    Args:
        slack: tokens that can be taken back at any time.
        slides: whether the window is one that the model has had before.
        kind: the class of the cache, or what makes one as it does.
        options: of the `SinkKVCache`, but for batch, dtype and device.

    Attributes:
        cache: None before the first tokens.
        seen: columns that went by, padding included; an int, or an int64 tensor where compiled code advances it.
        late: bool [N, M], which of the last columns were tokens, for M <= slack + 1 that are known; None as long as all were.
    """

    counters = ("seen",)
    advice = "SinkConfig(slack=...) says how many"

    def __init__(
        self,
        slack: int = 64,
        slides: bool = False,
        kind: Callable[..., SinkKVCache] = SinkKVCache,
        **options: Any,
    ) -> None:
        self.slack, self.slides, self.kind, self.options = slack, slides, kind, options
        self.cache: SinkKVCache | None = None
        self.seen: int | torch.Tensor = 0
        self.late: torch.Tensor | None = None

    def of(self, k: torch.Tensor) -> SinkKVCache:
        """The cache for keys [B, T, Hkv, D].

        Raises:
            ValueError: another batch than before.
        """
        held = self.cache
        fresh = held is None or (not isinstance(self.seen, torch.Tensor) and self.seen == 0 and not _fits(held, k))
        if fresh:
            self.cache = held = self.made(k.shape[0], k.dtype, k.device)
        assert held is not None
        if held.seen.shape[0] != k.shape[0]:
            raise ValueError(f"past_key_values: expected {held.seen.shape[0]} sequences as before, got {k.shape[0]}")
        return held

    def made(self, batch: int, dtype: torch.dtype, device: torch.device) -> SinkKVCache:
        """A new cache of these options."""
        with ExitStack() as stack:
            if not torch.compiler.is_compiling():  # tensors of inference mode could not be written to outside of it
                stack.enter_context(torch.inference_mode(False))
            return self.kind(batch, slack=self.slack, dtype=dtype, device=device, **self.options)

    def advance(self, columns: int, real: torch.Tensor | None) -> None:
        """Count new columns, of which bool [N, columns] says which are tokens; None: all."""
        seen = self.seen  # not in place: whoever was told it goes on to hold the old number
        if real is not None and self.late is None:
            assert self.cache is not None
            self.late = real.new_ones(real.shape[0], self.slack + 1)
        if self.late is not None:
            rows = self.late.shape[0]
            fresh = self.late.new_ones(rows, columns) if real is None else real
            self.late = torch.cat([self.late, fresh], 1)[:, -self.slack - 1 :].clone()
        self.seen = seen + columns

    # --- taking columns back ----------------------------------------

    def _tokens_in(self, columns: int) -> int | torch.Tensor:
        """How many tokens the last columns are, of every sequence."""
        return columns if self.late is None else self.late[:, self.late.shape[1] - columns :].sum(1)

    @property
    def kept(self) -> int:
        """Columns that `rollback` can take back now. Waits for a GPU."""
        if self.cache is None:
            return 0
        if self.late is None:
            return min(self.cache.kept, int(self.seen))
        most = self.cache.seen - self.cache._floor()  # of every sequence
        fits = self.late.flip(1).cumsum(1) <= most[:, None]  # its tokens in the last 1, 2, ... columns
        return min(int(fits.all(0).sum()), int(self.seen))

    def keep(self, tokens: int) -> None:
        self.slack = max(self.slack, tokens)
        if self.cache is not None:
            self.cache.keep(self.slack)

    def rollback(self, tokens: int) -> None:
        check_rollback(tokens, self.kept)
        if not tokens:
            return
        assert self.cache is not None
        self.cache.rollback(self._tokens_in(tokens))
        if self.late is not None:
            self.late = self.late[:, :-tokens].clone()
        self.seen = self.seen - tokens

    # --- as a state ----------------------------------------

    def tensors(self) -> dict[str, torch.Tensor]:
        held = {} if self.cache is None else {f"cache.{name}": x for name, x in self.cache.tensors().items()}
        return held if self.late is None else held | {"late": self.late}

    def put(self, name: str, value: torch.Tensor) -> None:
        if name == "late":
            self.late = value
        elif self.cache is not None and name.startswith("cache."):
            self.cache.put(name.removeprefix("cache."), value)
        else:
            raise ValueError(f"state: expected names of a SinkState, got {name!r}")

    def reset(self, mask: torch.Tensor | None = None) -> None:
        if self.cache is not None:
            self.cache.reset(mask)
        if mask is None:
            self.late = None
            self.seen = torch.zeros_like(self.seen) if isinstance(self.seen, torch.Tensor) else 0
        elif self.cache is not None:
            if self.late is None:
                self.late = mask.new_ones(mask.shape[0], self.slack + 1)
            self.late = self.late & ~mask.to(self.late.device)[:, None]  # of these nothing can be taken back

    def to(self, device: torch.device | str, non_blocking: bool = False) -> None:
        if self.cache is not None:
            self.cache.to(device, non_blocking)
        if self.late is not None:
            self.late = self.late.to(device, non_blocking=non_blocking)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        _checks.mapping("state", state)
        held = {n.removeprefix("cache."): x for n, x in state.items() if n.startswith("cache.")}
        others = set(state) - {f"cache.{name}" for name in held} - {"late", *self.counters}
        if others:
            raise ValueError(f"state: expected names of a SinkState, got {sorted(others)[0]!r}")
        for name in ("seen", *(("cache.sink_k",) if held else ())):
            if name not in state:
                raise ValueError(f"state: expected {name!r}, got {sorted(state)}")
        cache = None
        if held:
            k = held["sink_k"]
            cache = self.made(k.shape[0], k.dtype, k.device)
            cache.load_state_dict(cache.state_dict() | held)
        late, seen = state.get("late"), state["seen"]
        self.cache, self.late = cache, None if late is None else late.clone()
        self.seen = seen.clone() if isinstance(seen, torch.Tensor) else seen


def _fits(cache: SinkKVCache, k: torch.Tensor) -> bool:
    return cache.seen.shape[0] == k.shape[0] and cache.sink_k.dtype is k.dtype and cache.sink_k.device == k.device


def state_of(
    cache: Any, layer_idx: int | None, make: Callable[[], SinkState], keep: int
) -> SinkState | SinkKVCache | None:
    """The state of a layer in a cache for one more call, made at its first use; None without a cache.

    Args:
        cache: a `SinkKVCache`, of this layer alone, or a `Cache` of transformers.
        layer_idx: number of the layer.
        make: a new state of the layer.
        keep: tokens that it can take back.

    Raises:
        ValueError: no `layer_idx`, an entry that holds other things already, or a cache of another kind.
    """
    if cache is None or isinstance(cache, SinkKVCache):
        return cache
    adapter = adapter_for(cache)
    if adapter is None:
        raise ValueError(
            f"past_key_values: expected a SinkKVCache or a Cache of transformers, got {type(cache).__name__}"
        )
    if layer_idx is None:
        raise ValueError("layer_idx: expected the layer's number, since past_key_values is given, got None")
    state = adapter(cache, layer_idx, make, keep)
    if not isinstance(state, SinkState):
        raise ValueError(f"past_key_values: expected layer {layer_idx} to hold a SinkState, got {type(state).__name__}")
    return state
