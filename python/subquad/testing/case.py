"""One spec on one backend, device and dtype: what every generic check works on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ..contract import NAMESPACES
from .compare import assert_close, assert_rounded, assert_three_way
from .levels import levels
from .spec import OpSpec, Sample, Sampler

# Interpreters get small problems.
_SIZE = {"native": "full", "reference": "full", "triton": "small", "simt": "full"}


@dataclass(frozen=True)
class Case:
    """See the module docstring. `level` is the instruction set of native kernels on a CPU, None for the one in use."""

    spec: OpSpec
    backend: str
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    level: str | None = None

    @property
    def namespace(self) -> str | None:
        """Namespace of this backend's raw operators; None for the reference, which has none."""
        return NAMESPACES.get(self.backend)

    def samples(self, size: str | None = None, tokens: int | None = None, seed: int = 0) -> list[Sample]:
        """The spec's calls, in the size that suits backend and level unless told otherwise."""
        if size is None:
            size = _SIZE[self.backend] if self.device == "cpu" else "full"
            if self.level is not None and self.level != levels()[-1]:
                size = "small"
        return list(self.spec.samples(Sampler(self.dtype, self.device, size, tokens, seed)))

    def first(self, size: str | None = "small", tokens: int | None = None, seed: int = 0) -> Sample:
        """The most typical call, small by default."""
        return self.samples(size, tokens, seed)[0]

    def fullest(self, size: str | None = "small", tokens: int | None = None) -> Sample:
        """The first call that leaves out the fewest optional tensors."""
        return max(self.samples(size, tokens), key=lambda s: sum(a is not None for a in s.args.values()))

    def with_dtype(self, dtype: torch.dtype) -> Case:
        return replace(self, dtype=dtype)

    def call(self, sample: Sample, **args: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """The op's results as a flat tuple; `args` replace tensors of the sample."""
        return self.invoke({**sample.args, **args}, {**sample.kwargs, "backend": self.backend})

    def invoke(self, args: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
        """Results of the op, and behind them copies of the tensors that it changes, as it leaves them."""
        changed = {n: copied(args[n]) for n in self.mutated(args)}
        result = self.spec.fn(**{**args, **changed}, **options)
        return (*tree_leaves(result), *(x.contiguous() for x in changed.values()))

    def mutated(self, args: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the tensors that the op changes, of those that are there."""
        return tuple(n for n in self.spec.mutates if isinstance(args.get(n), torch.Tensor))

    def reference(self, sample: Sample, **args: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """The reference's results on the same arguments."""
        return tuple(tree_leaves(self.spec.reference(**{**sample.args, **args}, **sample.kwargs)))

    def float_args(self, sample: Sample) -> tuple[str, ...]:
        """Names of the tensors that have the dtype under test: not of those that this sample has quantised."""
        return sample.wide(self.spec.grad_args)

    def rows(self, sample: Sample) -> tuple[str, ...]:
        """Names of the tensors whose first dimension counts tokens, of those the sample has."""
        return tuple(n for n in self.spec.rows if sample.args.get(n) is not None)

    def wide(self, sample: Sample) -> Sample:
        """The same values in float64, for the oracle."""
        return sample.to(torch.float64, self.float_args(sample))

    def leaves(self, sample: Sample, names: tuple[str, ...] | None = None) -> dict[str, torch.Tensor]:
        """Copies of the differentiable tensors with the same strides, which require gradients."""
        chosen = self.float_args(sample) if names is None else names
        return {n: same_layout(sample[n]).requires_grad_() for n in chosen}

    def upstream(self, outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Gradients to feed back, the same numbers for every backend."""
        generator = torch.Generator().manual_seed(99)
        return tuple(torch.randn(y.shape, generator=generator).to(y.dtype).to(y.device) for y in outputs)

    def gradients(self, sample: Sample, names: tuple[str, ...] | None = None) -> dict[str, torch.Tensor]:
        """Gradient of every named tensor, by autograd through the op; none of an op for inference."""
        if self.spec.inference:
            return {}
        leaves = self.leaves(sample, names)
        outputs = self.call(sample, **leaves)
        pairs = zip(outputs, self.upstream(outputs), strict=True)
        reached = [(y, g) for y, g in pairs if y.requires_grad]  # one leaf alone need not reach every output
        grads = torch.autograd.grad([y for y, _ in reached], tuple(leaves.values()), [g for _, g in reached])
        return dict(zip(leaves, grads, strict=True))

    def limit(self, dtype: torch.dtype, table: Mapping[torch.dtype, float]) -> float:
        """The largest relative L2 error of a result of this dtype; integers are equal or wrong."""
        if not dtype.is_floating_point:
            return 0.0
        rounded = self.spec.tol.products.get(self.backend) if self.dtype is not torch.float32 else None
        return table[dtype] if rounded is None or dtype is not torch.float32 else rounded

    def judge(
        self,
        actual: torch.Tensor,
        reference: torch.Tensor,
        oracle: torch.Tensor,
        table: Mapping[torch.dtype, float],
        what: str,
        rounded: bool = True,
    ) -> None:
        """The absolute table, the three-way rule and, for results that are rounded once, the elementwise rule."""
        tol = self.spec.tol
        if actual.dtype is not reference.dtype:
            raise AssertionError(f"{what}: dtype {actual.dtype} is not {reference.dtype}")
        assert_close(actual, oracle, self.limit(actual.dtype, table), what)
        if self.backend in tol.products and self.dtype is not torch.float32:
            return
        assert_three_way(actual, reference, oracle, tol.factor, tol.eps, what)
        if rounded:
            assert_rounded(actual, oracle, tol.ulps, tol.elementwise, what)


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy to write to, with the same strides."""
    return tensor.clone() if tensor.is_contiguous() else same_layout(tensor)


def same_layout(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, when no two elements share memory."""
    if tensor.numel() == 0 or 0 in tensor.stride():
        return tensor.detach().clone()
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(
        tensor.detach()
    )
