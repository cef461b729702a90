"""Is any call right, however odd: against the float64 oracle, with the error that rounding can cause in this very call.

The tolerances of a spec are for numbers that behave. Where terms cancel, decay to nothing or overflow, the error of a right
kernel is larger than any table says. There the oracle is computed again with every intermediate result rounded at random
(Monte Carlo arithmetic, Parker 1997): how far its results move is what roundings may cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .case import Case
from .compare import assert_rounded, assert_same_nonfinite
from .spec import Sample

Results = dict[str, torch.Tensor]
REPEATS = 2  # runs with random roundings
MARGIN = 8.0  # how much more than they an order of operations of its own may cost
_SUMS = {"sum", "mean", "mm", "bmm", "addmm", "baddbmm", "addmv", "mv", "dot", "cumsum", "linear"}
_ROUNDED = _SUMS | {
    "add", "sub", "rsub", "mul", "div", "exp", "log", "_softmax", "_softmax_backward_data", "silu", "silu_backward", "gelu",
    "gelu_backward", "sigmoid", "sigmoid_backward", "log_sigmoid_forward", "log_sigmoid_backward", "tanh", "tanh_backward",
    "elu", "pow", "reciprocal", "sqrt", "rsqrt",
}  # fmt: skip


class _RandomRounding(TorchDispatchMode):
    """Multiplies what float64 arithmetic gives, and the terms of sums, by 1 + eps * noise, forward and backward."""

    def __init__(self, eps: float, seed: int) -> None:
        super().__init__()
        self._eps, self._generator = eps, torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        result = func(*(map(self._round, args) if name in _SUMS else args), **(kwargs or {}))
        if name not in _ROUNDED:
            return result
        return tuple(map(self._round, result)) if isinstance(result, (tuple, list)) else self._round(result)

    def _round(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or x.dtype is not torch.float64 or not x.numel():
            return x
        noise = torch.randn(x.shape, generator=self._generator, dtype=torch.float64).mul_(self._eps).add_(1.0)
        return x * noise.to(x.device)


def results(
    call: Callable[..., tuple[torch.Tensor, ...]], case: Case, sample: Sample, names: tuple[str, ...]
) -> Results:
    """Outputs by number and gradients by the name of their tensor; 0 where nothing depends on it."""
    leaves = {n: sample[n].detach().requires_grad_() for n in names}
    outputs = call(sample, **leaves)
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    reached = [(y, g) for y, g in zip(outputs, _upstream(outputs), strict=True) if y.requires_grad] if leaves else []
    grads = tuple(torch.zeros_like(x) for x in leaves.values())
    if reached:
        roots, weights = zip(*reached, strict=True)
        grads = torch.autograd.grad(roots, tuple(leaves.values()), weights, allow_unused=True, materialize_grads=True)
    return found | {f"gradient of {n}": g for n, g in zip(leaves, grads, strict=True)}


def _upstream(outputs: tuple[torch.Tensor, ...]) -> Iterator[torch.Tensor]:
    """Numbers of few bits: the same in every dtype."""
    generator = torch.Generator().manual_seed(99)
    for y in outputs:
        yield torch.randint(-16, 17, y.shape, generator=generator).to(y.device, y.dtype) / 8


def check(case: Case, sample: Sample, names: tuple[str, ...] = (), poisoned: bool = False) -> None:
    """Compare the call's results, and the gradients of the named tensors, with the oracle's.

    Of a `poisoned` call, which was given a NaN or an infinity, it is compared which results are finite; whether the others are
    NaN or infinite is left to the order of operations.

    Raises:
        AssertionError: another shape or dtype; NaN or infinity where the oracle has none, or the reverse, unless the reference
            in this dtype overflows there too; an error beyond the spec's tolerances and beyond what rounding may cost.
    """
    found = results(case.call, case, sample, names)
    wide = case.wide(sample)
    partners = {n for name in names for n in case.spec.tol.cancels.get(name, ())}
    names = (*names, *(n for n in case.float_args(sample) if n in partners and n not in names))
    expected = results(case.reference, case, wide, names)
    context = _Context(case, sample, wide, names, poisoned)
    for what, actual in found.items():
        _judge(context, what, actual, expected[what], _terms(case, wide, expected, what))


def _terms(case: Case, wide: Sample, expected: Results, what: str) -> float:
    """The norm of what cancels in a gradient; see `Tolerance.cancels`."""
    names = case.spec.tol.cancels.get(what.removeprefix("gradient of "), ())
    pairs = ((wide[n], expected.get(f"gradient of {n}")) for n in names)
    return sum(float((x * grad).nan_to_num(0.0, 0.0, 0.0).norm()) for x, grad in pairs if grad is not None)


class _Context:
    """What is computed only when the plain comparison fails."""

    def __init__(self, case: Case, sample: Sample, wide: Sample, names: tuple[str, ...], poisoned: bool) -> None:
        self.case, self.sample, self._wide, self._names, self.poisoned = case, sample, wide, names, poisoned
        self._reference: Results | None = None
        self._moved: list[Results] | None = None

    def loss(self) -> float:
        """The relative error that the size of numbers in this call causes; see `Tolerance.loss`."""
        found = self.case.spec.tol.loss
        return 0.0 if found is None else torch.finfo(torch.float32).eps * found(self._wide)

    def reference(self, what: str) -> torch.Tensor:
        """The result of the reference in the call's own dtype."""
        if self._reference is None:
            self._reference = results(self.case.reference, self.case, self.sample, self._names)
        return self._reference[what]

    def moved(self, what: str) -> list[torch.Tensor]:
        """The oracle's result under random roundings."""
        if self._moved is None:
            narrow = self.case.spec.tol.narrow and not self.sample.rounded_once
            eps = torch.finfo(self.case.dtype if narrow else torch.float32).eps
            self._moved = []
            for seed in range(REPEATS):
                with _RandomRounding(eps, seed):
                    self._moved.append(results(self.case.reference, self.case, self._wide, self._names))
        return [found[what] for found in self._moved]


def _judge(context: _Context, what: str, actual: torch.Tensor, oracle: torch.Tensor, terms: float) -> None:
    if actual.shape != oracle.shape:
        raise AssertionError(f"{what}: shape {list(actual.shape)} is not {list(oracle.shape)}")
    if actual.dtype.itemsize == 1 or not actual.dtype.is_floating_point:
        return _judge_steps(what, actual, oracle)
    finite = _judged(context, what, actual, oracle)
    found, right = actual[finite], oracle[finite]
    if not found.numel():
        return
    case, tol, info = context.case, context.case.spec.tol, torch.finfo(actual.dtype)
    error, norm = float((found.double() - right).norm()), float(right.norm()) + terms
    table = tol.grad if what.startswith("gradient") else tol.forward
    limit = max(case.limit(actual.dtype, table), 0.51 * info.eps)  # elements that are all alike are all rounded alike
    tiny = max(info.smallest_normal * info.eps, torch.finfo(torch.float32).smallest_normal)  # may be taken for 0
    floor = tiny * right.numel() ** 0.5
    once = context.sample.rounded_once and case.backend not in tol.products
    if error <= limit * norm + floor and (not once or _is_rounded(found, right, tol.ulps, tol.elementwise)):
        return
    loss = context.loss()
    moves = [(moved[finite] - right).nan_to_num(0.0, 0.0, 0.0) for moved in context.moved(what)]
    lost = max(float(move.norm()) for move in moves)
    allowed = (limit + loss) * norm + floor + MARGIN * lost
    if error > allowed:
        raise AssertionError(
            f"{what}: error {error:.3e} of {norm:.3e}, allowed {allowed:.3e}, of it roundings {lost:.1e}"
        )
    if once:
        slack = tiny + tol.elementwise * terms + loss * norm + MARGIN * max(float(move.abs().max()) for move in moves)
        assert_rounded(found, right, tol.ulps, tol.elementwise, what, slack)


def _judge_steps(what: str, actual: torch.Tensor, oracle: torch.Tensor) -> None:
    """Quantised numbers may be one step of their type away, where a rounding falls the other way; integers are exact."""
    found, right = actual.double(), oracle.to(actual.dtype).double()
    assert_same_nonfinite(found, right, what)
    step: torch.Tensor | float = 1.0 if actual.dtype is torch.int8 else 0.0
    if actual.dtype.is_floating_point:
        info = torch.finfo(actual.dtype)
        step = (right.abs() * info.eps).clamp_min(info.smallest_normal * info.eps)
    excess = ((found - right).abs() - step).nan_to_num(0.0)
    if bool((excess > 0).any()):
        at = tuple((excess > 0).nonzero()[0].tolist())
        raise AssertionError(f"{what}: {found[at].item():g} at {list(at)}, expected {right[at].item():g}")


def _judged(context: _Context, what: str, actual: torch.Tensor, oracle: torch.Tensor) -> torch.Tensor:
    """Where numbers are to be compared: what is finite on both sides, after NaN and infinity were found in the same places."""
    rounded = oracle.to(actual.dtype)
    finite = torch.isfinite(rounded)
    wrong = torch.isfinite(actual) != finite
    if not context.poisoned and not what.startswith("gradient"):  # there, sums of what overflows may be NaN
        wrong |= torch.isinf(oracle) & (actual != rounded)
    if bool(wrong.any()):
        # What overflows on the way, in the reference as well, decides nothing, nor what nearly overflows at the end.
        clear = (oracle.abs() <= torch.finfo(torch.float32).max / 64) | ~finite
        wrong &= clear & (torch.isfinite(context.reference(what)) == finite)
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {actual[at].item()} at {list(at)}, expected {rounded[at].item()} ({int(wrong.sum())} such elements)"
        )
    return finite & torch.isfinite(actual)


def _is_rounded(actual: torch.Tensor, oracle: torch.Tensor, ulps: float, slack: float) -> bool:
    try:
        assert_rounded(actual, oracle, ulps, slack)
    except AssertionError:
        return False
    return True
