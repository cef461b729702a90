"""One call of a model for one token per row, as it is or compiled once and kept with the model."""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .._backends import SubquadWarning
from ..cache.sink_state import SinkState
from .graph import Closed, Record, Recorder, closed

OPTIONS: dict[str, Any] = {"fullgraph": True, "dynamic": False}  # of torch.compile
LEAST_ROOM = 256


@dataclass
class Compiled:
    """The compiled step of a model for one batch size, cache and kind of mask; `failed` says why there is none."""

    call: Callable[..., torch.Tensor] | None = None
    recorder: Recorder = field(default_factory=Recorder)
    failed: str | None = None

    def __post_init__(self) -> None:
        # A code object of its own, for that is what graphs are kept with, and the number of them limited.
        own = types.FunctionType(step.__code__.replace(co_name=f"step_{id(self)}"), step.__globals__)
        try:
            self.call = torch.compile(own, backend=self.recorder, **OPTIONS)
        except RuntimeError as error:  # a Python that torch.compile does not know
            self.failed = reason(error)


# A model's steps go with it: what is kept here holds no reference to it.
_KEPT: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], Compiled]] = WeakKeyDictionary()


@dataclass
class Calls:
    """How a model is called.

    Attributes:
        model: a causal language model of transformers.
        cache_name: what it calls its cache: "cache" from transformers 5.24 on.
        accepted: names of its arguments.
    """

    model: nn.Module
    cache_name: str = field(init=False)
    accepted: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        base = getattr(self.model, "get_base_model", lambda: self.model)()  # of peft, whose own signature is open
        self.accepted = frozenset(inspect.signature(base.forward).parameters)
        self.cache_name = "cache" if "cache" in self.accepted else "past_key_values"

    def arguments(self, cache: Any, positions: torch.Tensor, column: torch.Tensor, mask: Any) -> dict[str, Any]:
        """Beside the ids: positions [B, T] of the tokens, which column each stands in [T], the mask."""
        given: dict[str, Any] = {self.cache_name: cache, "use_cache": True, "attention_mask": mask}
        known = {"position_ids": positions, "cache_position": column, "logits_to_keep": 1}
        return given | {name: value for name, value in known.items() if name in self.accepted}


def step(model: nn.Module, ids: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """Logits [B, V] behind the last of ids [B, T]."""
    logits: torch.Tensor = model(input_ids=ids, **arguments).logits[:, -1]
    return logits


def compiled_for(model: nn.Module, *key: Any) -> Compiled:
    """The compiled step of a model for calls of this kind: made once, compiled by its first call."""
    steps = _KEPT.setdefault(model, {})
    if key not in steps:
        steps[key] = Compiled()
    return steps[key]


def of_compiler(error: BaseException) -> bool:
    """Whether an error says that something cannot be compiled, and not that a call went wrong."""
    return any(kind.__module__.startswith(("torch._dynamo", "torch._inductor")) for kind in type(error).__mro__)


def reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"


class Text:
    """The compiled steps of one text: the first calls look at the guards, see `graph`."""

    def __init__(self, kept: Compiled) -> None:
        self.kept = kept
        self.closed: Closed | None = None
        self.before: tuple[Record | None, tuple[torch.Tensor, ...]] = (None, ())

    def __call__(self, model: nn.Module, given: tuple[torch.Tensor, ...], arguments: dict[str, Any]) -> torch.Tensor:
        """given: (ids, positions, columns), of which the latter two are also in `arguments`."""
        if self.closed is not None:
            return self.closed(*given)
        assert self.kept.call is not None
        logits = self.kept.call(model, given[0], arguments)
        record, self.kept.recorder.last = self.kept.recorder.last, None
        self.closed = closed(self.before[0], record, (self.before[1], given), logits)
        self.before = (record, given)
        return logits


# --- caches ----------------------------------------


def room(columns: int) -> int:
    """Columns of a preallocated cache for so many: few sizes, for a step is compiled for each."""
    return max(LEAST_ROOM, 1 << (columns - 1).bit_length())


def static_cache(model: Any, columns: int) -> Any:
    """A preallocated cache. Layers that slide get all columns, too: where a ring stands is no tensor in transformers, and a graph
    would be compiled for every token."""
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=columns)
    cache.layers = [
        StaticLayer(columns) if isinstance(layer, StaticSlidingWindowLayer) else layer for layer in cache.layers
    ]
    return cache


def check_room(cache: Any, columns: int) -> None:
    """ValueError for a cache of a user's that has fewer columns than will be written."""
    for layer in getattr(cache, "layers", ()):
        most = getattr(layer, "max_cache_len", None)
        if most is not None and most >= 0 and not layer.is_sliding and _keeps_keys(layer) and most < columns:
            raise ValueError(f"cache: expected room for {columns} tokens, got one of {most}")


def grows(cache: Any) -> str | None:
    """Why every token after the prompt would need a graph of its own; None: a single one does."""
    for layer in cache.layers:
        if not _keeps_keys(layer):
            continue
        where = f"a {type(cache).__name__} with a {type(layer).__name__}"
        if hasattr(layer, "cumulative_length_int"):
            return f"{where}, whose ring stands at a number, no tensor; without cache= such layers get all columns"
        if getattr(layer, "max_cache_len", None) is None:
            hint = (
                "; convert(model, attention='sink') has one"
                if isinstance(getattr(layer, "state", None), SinkState)
                else ""
            )
            return f"{where} is no cache of constant size{hint}"
    return None


@contextmanager
def counted_in_tensors(cache: Any, columns: int | None) -> Iterator[None]:
    """The states of converted layers that count tokens in Python, which a graph would be compiled for, do it in tensors.

    columns: of the mask, if there is one, which then does not grow.
    """
    layers = [layer for layer in cache.layers if not _keeps_keys(layer)]
    layers = [layer for layer in layers if not isinstance(layer.state.seen, torch.Tensor)]
    for layer in layers:
        layer.state.seen, layer.columns = torch.tensor(layer.state.seen), columns
    try:
        yield
    finally:
        for layer in layers:
            layer.state.seen, layer.columns = int(layer.state.seen), None


def _keeps_keys(layer: Any) -> bool:
    return bool(getattr(layer, "holds_keys", True))


def warn_uncompiled(why: str) -> None:
    warnings.warn(f"subquad: generate: steps run without torch.compile: {why}", SubquadWarning, stacklevel=4)
