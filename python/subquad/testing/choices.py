"""Random calls of an op, choice by choice: what `OpSpec.random` draws from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from .layouts import LAYOUTS, changes_strides, lay_out
from .spec import OpSpec, Sample, Sampler

T = TypeVar("T")
Source = Callable[[str, Sequence[Any]], int]  # takes the name of a choice and its values, and returns the index of one

# Blocks of kernels have such sizes; one less and one more is where masks go wrong.
EDGES = tuple(n + d for n in (8, 16, 32, 64, 128, 256, 512) for d in (-1, 0, 1))
POISONS = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


def _sparse(x: torch.Tensor) -> torch.Tensor:
    """Every third element alone."""
    keep = torch.arange(x.numel(), device=x.device).view(x.shape) % 3 == 0
    return torch.where(keep, x, torch.zeros_like(x))


CONTENTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "zeros": torch.zeros_like,
    "signs": torch.sign,
    "large": lambda x: x * 2.0**9,
    "small": lambda x: x * 2.0**-12,
    "sparse": _sparse,
}


def text(value: Any) -> str:
    """How a value of a choice is written on a command line."""
    return str(value).removeprefix("torch.").replace(" ", "")


class Choices:
    """The choices of one random call. A value that comes earlier is a simpler one: shrinking goes there.

    Attributes:
        spec: the op.
        device: where tensors are to be.
        taken: what was chosen, by name, as text; the simplest value of a choice is left out.
        dtype: of the tensors under test.
        sampler: source of random tensors.
        finite: tensors that are to get no NaN or infinity, for `OpSpec.random` to fill: where the op documents that.

    Args:
        source: makes the choices; 0 is always possible.
    """

    def __init__(self, spec: OpSpec, source: Source, device: str = "cpu") -> None:
        self.spec, self.device, self._source = spec, device, source
        self.taken: dict[str, str] = {}
        self._asked: set[str] = set()
        self.finite: set[str] = set()
        self.dtype: torch.dtype = self.pick("dtype", spec.dtypes)
        self.sampler = Sampler(self.dtype, device, seed=self.pick("seed", range(1 << 16)))

    def pick(self, name: str, values: Sequence[T]) -> T:
        """One of the values, the first being the simplest; a value that stands there several times is more likely.

        Raises:
            ValueError: if the name was used before.
        """
        if name in self._asked:
            raise ValueError(f"name: expected one that is new, got {name!r}")
        self._asked.add(name)
        value = values[self._source(name, values)]
        if value != values[0]:
            self.taken[name] = text(value)
        return value

    def flag(self, name: str) -> bool:
        """Whether or not; not is simpler."""
        return self.pick(name, (False, True))

    def integer(self, name: str, low: int, high: int) -> int:
        """A small number, low <= value <= high."""
        return self.pick(name, range(low, high + 1))

    def extent(self, name: str, low: int, high: int) -> int:
        """The size of a dimension, half the time next to a power of two."""
        edges = [n for n in EDGES if low <= n <= high]
        anywhere = range(low, high + 1)
        return self.pick(name, [*anywhere, *edges * (1 + len(anywhere) // max(1, len(edges)))])

    def divisor(self, name: str, of: int) -> int:
        """A divisor, the number itself being the simplest."""
        return self.pick(name, [n for n in range(of, 0, -1) if of % n == 0])

    def bounds(self, name: str, tokens: int) -> list[int] | None:
        """Bounds of packed sequences, some perhaps empty; or None, for a batch."""
        cuts = self.pick(name, (None, None, None, 0, 1, 2, 3, 5))
        if cuts is None:
            return None
        return [0, *sorted(self.pick(f"{name}.{i}", range(tokens + 1)) for i in range(cuts)), tokens]

    def places(self, name: str, rows: int) -> list[int] | None:
        """Places of the rows in a pool, all different, -1 for some; or None, for a pool of the rows themselves."""
        if not rows or not self.flag(name):
            return None
        free = list(range(rows + self.integer(f"{name}.spare", 0, 3)))
        found = [free.pop(self.pick(f"{name}.{i}", range(len(free)))) for i in range(rows)]
        return [-1 if self.pick(f"{name}.skip{i}", (False, False, False, True)) else x for i, x in enumerate(found)]

    def vary(self, sample: Sample, layouts: bool = True) -> Sample:
        """The sample with now and then special numbers in one tensor and, if `layouts`, some laid out in another way."""
        args: dict[str, torch.Tensor | None] = dict(sample.args)
        present = {n: sample[n] for n in sample.wide(self.spec.grad_args) if sample[n].numel()}
        what = self.pick("contents", (None, None, None, *CONTENTS)) if present else None
        if what is not None:
            name = self.pick("contents.of", tuple(present))
            present[name] = CONTENTS[what](present[name])
        args |= present
        for name, tensor in present.items() if layouts else ():
            allowed = [x for x in LAYOUTS if x not in self.spec.refuses.get(name, ()) and changes_strides(tensor, x)]
            layout = self.pick(f"{name}.layout", (*(None,) * 5, *allowed))
            args[name] = tensor if layout is None else lay_out(tensor, layout)
        return sample.replace(**args)

    def poison(self, sample: Sample) -> Sample | None:
        """The sample with one NaN or infinity in one tensor, or None for leaving it as it is."""
        names = sample.wide(n for n in self.spec.grad_args if n not in self.finite)
        present = {n: sample[n] for n in names if sample[n].numel()}
        what = self.pick("poison", (*(None,) * 6, *POISONS)) if present else None
        if what is None:
            return None
        name = self.pick("poison.of", tuple(present))
        tensor = present[name].clone()
        if 0 in tensor.stride():
            tensor = tensor.contiguous()
        place = self.pick("poison.at", range(min(tensor.numel(), 1 << 16)))
        tensor[tuple(int(i) for i in torch.unravel_index(torch.tensor(place), tensor.shape))] = POISONS[what]
        return sample.replace(**{name: tensor})


def replayed(taken: Mapping[str, str]) -> Source:
    """Choices made before, as `Choices.taken` has them; the simplest value where there is none."""

    def source(name: str, values: Sequence[Any]) -> int:
        if name not in taken:
            return 0
        found = next((i for i, value in enumerate(values) if text(value) == taken[name]), None)
        if found is None:
            shown = ", ".join(dict.fromkeys(text(value) for value in values[:20]))
            raise ValueError(f"{name}: expected one of {shown}{', ...' if len(values) > 20 else ''}, got {taken[name]}")
        return found

    return source
