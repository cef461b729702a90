"""What an op must state about itself so that tests, benchmarks and the support table can be made from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .case import Case
    from .choices import Choices

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = ("small", "full", "large", "empty")


@dataclass(frozen=True)
class Sample:
    """One call: tensors by argument name, options by keyword.

    Attributes:
        id: short name, unique among the samples of one spec.
        args: tensor arguments by parameter name; None stands for an optional tensor that is left out.
        kwargs: everything else.
        rows_independent: whether a row of the result must not depend, to the bit, on the other rows of the call.
        true_gradient: whether the gradient is the derivative (a straight-through estimator is not).
        rounded_once: whether every element must be the oracle's, rounded once; else the norms of the errors decide alone.
    """

    id: str
    args: Mapping[str, torch.Tensor | None]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    rows_independent: bool = False
    true_gradient: bool = True
    rounded_once: bool = True

    def __getitem__(self, name: str) -> torch.Tensor:
        """A tensor that is not left out."""
        tensor = self.args[name]
        if tensor is None:
            raise KeyError(f"{name} is left out of {self.id}")
        return tensor

    def wide(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of the names, in the order of the arguments, whose tensors are floats that nobody has quantised."""
        among = set(names)
        present = ((n, a) for n, a in self.args.items() if a is not None and n in among)
        return tuple(n for n, a in present if a.is_floating_point() and a.element_size() > 1)

    def replace(self, **args: Any) -> Sample:
        """The same call with some tensors exchanged."""
        return dataclasses.replace(self, args={**self.args, **args})

    def with_options(self, **kwargs: Any) -> Sample:
        """The same call with some options set."""
        return dataclasses.replace(self, kwargs={**self.kwargs, **kwargs})

    def to(self, dtype: torch.dtype, names: Iterable[str]) -> Sample:
        """The same call with the named tensors in another dtype."""
        cast = {n: a.to(dtype) for n in names if (a := self.args[n]) is not None}
        return self.replace(**cast)


class Sampler:
    """Seeded source of inputs for `OpSpec.samples`.

    Attributes:
        dtype, device: what the tensors under test must have.
        size: "small" for interpreters, "full", "large" (enough work for several threads) or "empty" (extents of zero).
        tokens: when set, the number of rows that every sample must have; else the spec chooses.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        size: str = "full",
        tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        if size not in SIZES:
            raise ValueError(f"size: expected one of {', '.join(SIZES)}, got {size!r}")
        self.dtype, self.device, self.size, self.tokens = dtype, device, size, tokens
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, std: float = 1.0) -> torch.Tensor:
        """Normal numbers, drawn in float64 so that every dtype sees the same ones, rounded."""
        wide = torch.randn(shape, generator=self._generator, dtype=torch.float64).mul_(std)
        return wide.to(self.dtype).to(self.device)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """int64 on the CPU, low <= value < high."""
        return torch.randint(low, high, shape, generator=self._generator)


def threshold_in_gap(scores: torch.Tensor, fraction: float, reach: float = 0.1, width: float = 1e-5) -> float:
    """A number in the widest gap between neighbouring values of `scores`, within `reach` of their quantile `fraction`.

    A kernel that computes the scores in another order then takes the same decisions.

    Raises:
        ValueError: if the gap is narrower than `width` times the largest score.
    """
    ordered = scores.double().flatten().sort().values
    n = ordered.numel()
    if n < 2:
        return float(ordered.sum()) / 2
    steps = max(2, int(reach * n))
    first = min(max(0, int(fraction * n) - steps), n - 2)
    window = ordered[first : min(n, first + 2 * steps + 1)]
    gaps = window.diff()
    k = int(gaps.argmax())
    if gaps[k] < width * ordered[-1]:
        raise ValueError(f"scores: no gap near quantile {fraction}; the widest is {float(gaps[k]):.2e}")
    return torch.tensor(float(window[k] + window[k + 1]) / 2, dtype=torch.float32).item()


@dataclass(frozen=True)
class Tolerance:
    """How near a kernel must come to the float64 oracle.

    Attributes:
        forward, grad: largest relative L2 error by dtype of the result.
        products: backend -> largest relative L2 error of the float32 results of a 16-bit call, where that backend rounds the
            operands of its products; the three-way rule does not hold for such calls, for the reference rounds none.
        factor, eps: three-way rule, err(kernel) <= factor * err(reference in the same dtype) + eps.
        ulps: units in the last place that one element may be off, besides `elementwise` times the largest element.
        cancels: gradients that are made as sums of what cancels, with the tensors whose products with their own gradients are
            these terms: the error is theirs, even where the sum is 0.
        loss: of a call in float64, how large numbers are before their exponential is taken of a difference: so many units in the
            last place of float32 the relative error may be.
        narrow: whether 16-bit calls round intermediate results to 16 bits: what is left where they cancel is of that size.
    """

    forward: Mapping[torch.dtype, float] = field(
        default_factory=lambda: {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}
    )
    grad: Mapping[torch.dtype, float] = field(
        default_factory=lambda: {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}
    )
    products: Mapping[str, float] = field(default_factory=dict)
    factor: float = 2.0
    eps: float = 1e-6
    ulps: float = 1.0
    elementwise: float = 1e-5
    cancels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    loss: Callable[[Sample], float] | None = None
    narrow: bool = False


@dataclass(frozen=True)
class Property:
    """A law of this op alone; `check` gets the case and raises AssertionError."""

    name: str
    check: Callable[[Case], None]


@dataclass(frozen=True)
class BenchCase:
    """One line of a benchmark: `params` are the numbers that `OpSpec.bench_sample`, `flops` and `bytes` understand."""

    id: str
    params: Mapping[str, Any]
    quick: bool = False


@dataclass(frozen=True)
class OpSpec:
    """An op as tests and benchmarks see it.

    Attributes:
        name: what it is called in test ids.
        stem: name of its files, and its row in the backend table.
        fn: public function; takes the tensors of a sample by name, its options, and `backend=`.
        reference: same arguments without `backend`; differentiable, float64-capable, independent of kernels.
        samples: yields calls; the first one should be the most typical.
        random: draws one random call for `subquad._dev.fuzz`: shapes and options from the `Choices`, tensors from its
            sampler, and at the end `Choices.vary`.
        grad_args: tensors that are differentiable.
        rows: tensors whose first dimension counts tokens; they are batched, made dynamic, permuted and poisoned.
        tol: tolerances.
        properties: laws of this op.
        refuses: layouts (see `layouts.LAYOUTS`) that the op documents as errors, by argument. All others must work.
        inference: the op has no gradients; `grad_args` then only names the tensors that have the dtype under test.
        mutates: tensors that `fn` changes in place. The checks call it on copies and count these, after the call, as results
            behind those of `fn`; the reference returns them there.
        indices: option of `fn` that says which place of the `mutates` tensors a row has, -1 for none.
        autocast: "cast" when the op runs in the autocast dtype, "keep" when autocast leaves it alone.
        tokens: row counts under which compiled code must not be specialised again.
        dtypes: what kernels support.
        bench, bench_sample, flops, bytes, peers: benchmark cases, the call of a case, its arithmetic, its least traffic,
            and other implementations of the same call by name (a peer may be None for a case it does not have). A case
            with the parameter `backward` is timed with its gradients, an op that mutates on the same tensors from call to call.
        bench_oracle: takes the sample in float64 and a result; returns a part of the result and the oracle of that part.
            For cases too large for the whole reference.
        lesser_levels: CPU level -> the one below it whose kernels some calls run instead.
        missing: what this op does not have, and why, by backend ("simt"), place ("nn"), check ("check:vmap") or check on one
            backend ("check:vmap:simt").
    """

    name: str
    stem: str
    fn: Callable[..., Any]
    reference: Callable[..., Any]
    samples: Callable[[Sampler], Iterable[Sample]]
    grad_args: tuple[str, ...]
    rows: tuple[str, ...]
    random: Callable[[Choices], Sample] | None = None
    tol: Tolerance = Tolerance()
    properties: tuple[Property, ...] = ()
    refuses: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    inference: bool = False
    mutates: tuple[str, ...] = ()
    indices: str | None = None
    autocast: str = "keep"
    tokens: tuple[int, ...] = (3, 5, 14)
    dtypes: tuple[torch.dtype, ...] = DTYPES
    bench: tuple[BenchCase, ...] = ()
    bench_sample: Callable[[BenchCase, str], Sample] | None = None
    flops: Callable[[BenchCase], float] | None = None
    bytes: Callable[[BenchCase], float] | None = None
    bench_oracle: Callable[[Sample, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None
    peers: Mapping[str, Callable[[Sample], Callable[[], Any] | None]] = field(default_factory=dict)
    lesser_levels: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
