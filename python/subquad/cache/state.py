"""The one protocol of everything that a layer remembers between calls, and what its implementations share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

import torch

from .. import _checks

# Modules with an `Adapter` named `state_in` for the caches of a library, imported when one is met.
ADAPTERS = {"transformers": "subquad.integrations.transformers.cache"}
_IMPORTED: dict[str, Adapter] = {}  # compiled code cannot import


@runtime_checkable
class State(Protocol):
    """The memory of one layer. The first dimension of every tensor counts sequences; shapes do not grow with the tokens seen.

    Attributes:
        seen: columns that went by, padding included; an int, or an int64 tensor where compiled code advances it. Of a state that
            stores no padding: the tokens of every sequence, int64 [N].
        kept: tokens that `rollback` can take back now.
        nbytes: memory of all tensors, of their whole storages.
        advice: which option says how much `rollback` can take back, for messages.
    """

    advice: str

    @property
    def seen(self) -> int | torch.Tensor: ...

    @property
    def kept(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors there are, by name."""
        ...

    def select(self, rows: torch.Tensor) -> None:
        """Go on with these sequences [M], int32 or int64, which may repeat: beams, or a batch that shrinks.

        Raises:
            TypeError, ValueError: rows of another kind or, where they can be read without waiting, that are not there.
        """
        ...

    def reorder(self, rows: torch.Tensor) -> None:
        """`select` of as many sequences as there are, in place: addresses stay."""
        ...

    def reset(self, mask: torch.Tensor | None = None) -> None:
        """Forget everything, or the sequences where the bool mask [N] is True; then nothing is kept for `rollback`."""
        ...

    def keep(self, tokens: int) -> None:
        """From now on keep what a rollback of so many tokens needs, 0 for nothing; what was kept before is dropped.

        A state that needs nothing for that, or that cannot be rolled back, ignores it.
        """
        ...

    def rollback(self, tokens: int) -> None:
        """Be as before the last `tokens` columns.

        Raises:
            ValueError: more than `kept`, or less than 0; nothing has changed then.
        """
        ...

    def to(self, device: torch.device | str, non_blocking: bool = False) -> None:
        """Move all tensors."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything, by name: tensors as they are, not copies, and plain numbers."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over copies of what `state_dict` gave, dtypes unchanged.

        Raises:
            TypeError: no mapping.
            ValueError: a name that this state does not have.
        """
        ...


class TensorState(ABC):
    """`State` of named tensors: what follows from `tensors` and `put`. Subclasses add `seen`, `keep`, `rollback`, `reset`.

    Attributes:
        conv_states, recurrent_states: what a cache of transformers shows of a linear attention layer, by number.
    """

    counters: tuple[str, ...] = ("seen",)  # attributes beside the tensors
    advice = ""
    conv_states: Mapping[int, torch.Tensor | None] = {}
    recurrent_states: Mapping[int, torch.Tensor | None] = {}

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]: ...

    @abstractmethod
    def put(self, name: str, value: torch.Tensor) -> None:
        """Exchange one of `tensors`, or add it; ValueError for a name that cannot be there."""

    def select(self, rows: torch.Tensor) -> None:
        self._check_rows(rows)
        for name, value in self.tensors().items():
            self.put(name, value.index_select(0, rows.to(value.device)))

    def _check_rows(self, rows: torch.Tensor) -> None:
        _checks.integers("rows", rows, 1)
        count = next((value.shape[0] for value in self.tensors().values()), None)
        if count is not None and _checks.readable(rows) and any(not 0 <= row < count for row in rows.tolist()):
            raise ValueError(f"rows: expected numbers in 0..{count - 1}, got {_checks.shown(rows.tolist())}")

    def reorder(self, rows: torch.Tensor) -> None:
        self._check_rows(rows)
        for name, value in self.tensors().items():
            if rows.shape[0] != value.shape[0]:
                raise ValueError(f"rows: expected the {value.shape[0]} sequences of {name}, got {rows.shape[0]}")
            value.copy_(value.index_select(0, rows.to(value.device)))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> None:
        for name, value in self.tensors().items():
            self.put(name, value.to(device, non_blocking=non_blocking))

    @property
    def nbytes(self) -> int:
        storages = (value.untyped_storage() for value in self.tensors().values())
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.counters} | self.tensors()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        _checks.mapping("state", state)
        fresh = type(self)()
        for name, value in state.items():
            if name in self.counters:
                setattr(fresh, name, value.clone() if isinstance(value, torch.Tensor) else value)
            else:
                fresh.put(name, value.clone())
        vars(self).update(vars(fresh))


def preallocated(x: torch.Tensor) -> torch.Tensor:
    """x, whose address will not change: graphs of torch.compile then write to it where it is, on a GPU too.

    As `torch._dynamo.mark_static_address` has it, which takes a second to import.
    """
    if not torch.compiler.is_compiling():
        x._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]
    return x


def check_rollback(tokens: int, kept: int) -> None:
    """ValueError unless 0 <= tokens <= kept."""
    if isinstance(tokens, bool) or not isinstance(tokens, int):
        raise TypeError(f"tokens: expected an int, got {type(tokens).__name__}")
    if not 0 <= tokens <= kept:
        raise ValueError(f"tokens: expected at most the {kept} that are kept for a rollback, got {tokens}")


class Adapter(Protocol):
    """Finds the state of a layer in another library's cache for one more call, or makes it."""

    def __call__(self, cache: Any, layer_idx: int, make: Callable[[], State], keep: int = 0) -> State:
        """`keep`: tokens that a new state can take back from the start; ValueError for an entry in use."""
        ...


def adapter_for(cache: Any) -> Adapter | None:
    """The adapter for the library that a cache's class, or one it derives from, comes from; None for no known library."""
    for kind in type(cache).__mro__:
        library = kind.__module__.partition(".")[0]
        if library in ADAPTERS:
            if library not in _IMPORTED:
                _IMPORTED[library] = import_module(ADAPTERS[library]).state_in
            return _IMPORTED[library]
    return None
