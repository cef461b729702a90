"""One benchmark case: build it, check it, and only then time it against its peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..contract import CONTRACTS, HANDLES
from ..testing.case import Case
from ..testing.compare import assert_close, relative_l2
from ..testing.spec import BenchCase, OpSpec, Sample
from . import quantised_peers
from .timing import Candidate, Plan, Timing, interleaved

OURS = "subquad"
ROOFLINE_SLACK = 1.10  # how much of a saving in bytes may be lost


@dataclass
class Result:
    """What came out of one case. Times are seconds per call; `failure` excludes times."""

    op: str
    case: str
    params: Mapping[str, Any]
    backend: str
    error: float
    tolerance: float
    failure: str | None = None
    times: dict[str, Timing] = field(default_factory=dict)
    flops: float | None = None
    bytes: float | None = None
    bytes_ratio: float | None = None
    baseline: str | None = None

    def ratio(self, peer: str) -> float | None:
        """Our time over the peer's, or None when either was not measured."""
        if OURS not in self.times or peer not in self.times:
            return None
        return self.times[OURS].median / self.times[peer].median

    @property
    def gigaflops_per_second(self) -> float | None:
        """Useful arithmetic of the case over our time."""
        return None if self.flops is None or OURS not in self.times else self.flops / self.times[OURS].median / 1e9

    @property
    def gigabytes_per_second(self) -> float | None:
        """Least traffic of the case over our time."""
        return None if self.bytes is None or OURS not in self.times else self.bytes / self.times[OURS].median / 1e9

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "op": self.op,
            "case": self.case,
            "params": {name: str(v) if isinstance(v, torch.dtype) else v for name, v in self.params.items()},
            "backend": self.backend,
            "error": self.error,
            "tolerance": self.tolerance,
            "failure": self.failure,
            "seconds": {name: timing.as_dict() for name, timing in self.times.items()},
            "ratios": {name: self.ratio(name) for name in self.times if name != OURS},
            "flops": self.flops,
            "bytes": self.bytes,
            "bytes_ratio": self.bytes_ratio,
            "baseline": self.baseline,
            "gigabytes_per_second": self.gigabytes_per_second,
            "gigaflops_per_second": self.gigaflops_per_second,
        }


def default_backend(stem: str, device: str) -> str:
    """The backend that is meant for this device: the first that its contract prefers, compiled now if need be."""
    return CONTRACTS[stem].preference(device)[0]


def dense_twin(case: BenchCase, cases: Sequence[BenchCase]) -> BenchCase | None:
    """The case that differs from this one in having no sparsity (and in its target), if there is one."""

    def rest(params: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in params.items() if name not in ("sparsity", "target")}

    if not case.params.get("sparsity"):
        return None
    return next((c for c in cases if c.params.get("sparsity") == 0 and rest(c.params) == rest(case.params)), None)


def _ours(spec: OpSpec, sample: Sample, backend: str) -> Candidate:
    fn, args, kwargs = spec.fn, dict(sample.args), dict(sample.kwargs)
    return lambda: fn(**args, **kwargs, backend=backend)


def check(spec: OpSpec, sample: Sample, backend: str) -> tuple[float, float, str | None]:
    """Relative L2 error against the float64 oracle, the tolerance, and why it failed (None: it did not)."""
    case = Case(spec, backend, device=sample_device(sample))
    result = case.call(sample)[0]
    if spec.bench_oracle is None:
        oracle = case.reference(case.wide(sample))[0]
    else:
        result, oracle = spec.bench_oracle(case.wide(sample), result)
    tolerance = spec.tol.forward[result.dtype]
    error = relative_l2(result, oracle)
    try:
        assert_close(result, oracle, tolerance, what=spec.name)
    except AssertionError as failure:
        return error, tolerance, str(failure)
    return error, tolerance, None


def with_gradients(call: Candidate, sample: Sample) -> Candidate:
    """`call` followed by its backward pass, when tensors of the sample require gradients; else `call`."""
    leaves = [a for a in sample.args.values() if a is not None and a.requires_grad]
    upstream: list[torch.Tensor] = []

    def run() -> Any:
        with torch.enable_grad():
            result = call()
            output = result[0] if isinstance(result, tuple) else result
            if not upstream:
                upstream.append(torch.randn_like(output))
            return torch.autograd.grad(output, leaves, upstream[0], allow_unused=True)  # peers have no gates

    return run if leaves else call


def run_case(spec: OpSpec, case: BenchCase, device: str, backend: str, plan: Plan) -> Result:
    """Check one case and, when it is right, time it against the spec's peers."""
    assert spec.bench_sample is not None
    sample = spec.bench_sample(case, device)
    with torch.no_grad():
        error, tolerance, failure = check(spec, sample, backend)
        result = Result(spec.name, case.id, case.params, backend, error, tolerance, failure)
        result.flops = spec.flops(case) if spec.flops else None
        result.bytes = spec.bytes(case) if spec.bytes else None
        twin = dense_twin(case, spec.bench)
        if twin is not None:
            result.baseline = twin.id
            result.bytes_ratio = spec.bytes(case) / spec.bytes(twin) if spec.bytes else None
        if failure is None:
            if case.params.get("backward"):
                sample = sample.replace(
                    **{n: sample[n].requires_grad_() for n in spec.grad_args if sample.args.get(n) is not None}
                )
            calls = {OURS: _ours(spec, sample, backend)}
            calls |= {name: peer for name, build in spec.peers.items() if (peer := build(sample)) is not None}
            calls |= quantised_peers.peers(spec.name, sample)
            result.times = interleaved({n: with_gradients(call, sample) for n, call in calls.items()}, plan, device)
    return result


@contextmanager
def _recorded(backend: str, stem: str) -> Iterator[list[tuple[Callable[..., Any], tuple[Any, ...]]]]:
    """The raw operator calls made inside the block."""
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
    handles = HANDLES[backend]
    originals = {name: handles[name] for name in CONTRACTS[stem].operators}

    def spy(handle: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls.append((handle, args))
            return handle(*args)

        return call

    handles.update({name: spy(handle) for name, handle in originals.items()})
    try:
        yield calls
    finally:
        handles.update(originals)


def overhead(spec: OpSpec, sample: Sample, backend: str, plan: Plan) -> dict[str, float]:
    """Seconds per call of the public function and of the one operator it ends in, on a tiny input.

    Raises:
        ValueError: if the function does not end in exactly one operator call.
    """
    call = _ours(spec, sample, backend)
    with torch.no_grad():
        with _recorded(backend, spec.stem) as calls:
            call()
        if len(calls) != 1:
            raise ValueError(f"{spec.name}: expected one operator call, got {len(calls)}")
        handle, args = calls[0]
        times = interleaved({"public": call, "raw": lambda: handle(*args)}, plan, sample_device(sample))
    public, raw = times["public"].median, times["raw"].median
    return {"public": public, "raw": raw, "difference": public - raw}


def sample_device(sample: Sample) -> str:
    """Device type of a sample's tensors."""
    return next(a.device.type for a in sample.args.values() if a is not None)


def benchmark_calls(specs: Sequence[OpSpec], device: str = "cpu") -> list[tuple[str, str, Callable[[], Candidate]]]:
    """(case, candidate, maker of the call) of every quick case, for pytest-benchmark; a maker checks our own first."""

    def maker(spec: OpSpec, case: BenchCase, name: str) -> Callable[[], Candidate]:
        def make() -> Candidate:
            assert spec.bench_sample is not None
            sample = spec.bench_sample(case, device)
            if name != OURS:
                peer = spec.peers[name](sample)
                assert peer is not None, f"{name} has no case {case.id}"
                return peer
            backend = default_backend(spec.stem, device)
            failure = check(spec, sample, backend)[2]
            if failure is not None:
                raise AssertionError(failure)
            return _ours(spec, sample, backend)

        return make

    quick = [(spec, case) for spec in specs for case in spec.bench if case.quick]
    return [(case.id, name, maker(spec, case, name)) for spec, case in quick for name in (OURS, *spec.peers)]
