"""Is state that an op changes in place in good hands: after errors, in skipped rows, under aliases, in compiled code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..case import Case, copied
from ..compare import assert_close, assert_same_bits
from ..instruments import Guards
from ..spec import OpSpec, Sample
from .registry import check

_Call = tuple[str, tuple[str, ...], dict[str, Any], dict[str, Any]]  # what is wrong, names to blame, arguments, options


def _mutates(spec: OpSpec) -> bool:
    return bool(spec.mutates)


def _indexed(spec: OpSpec) -> bool:
    return spec.indices is not None


def _sample(case: Case) -> Sample:
    """A call of several rows with as many tensors as there are, each row with the state of its own number."""
    return case.fullest(tokens=case.spec.tokens[0])


def _arguments(case: Case, sample: Sample) -> dict[str, Any]:
    """The sample's tensors, those that are changed as copies."""
    return {n: copied(x) if n in case.mutated(sample.args) and x is not None else x for n, x in sample.args.items()}


def _inputs(case: Case, sample: Sample) -> tuple[str, ...]:
    """Tensors of one row each that are only read."""
    return tuple(n for n in case.rows(sample) if n not in case.spec.mutates)


def _refused(case: Case, what: str, args: Mapping[str, Any], options: Mapping[str, Any]) -> Exception:
    """The error of a call that must raise, and must not have touched a state."""
    before = {n: args[n].detach().clone() for n in case.mutated(args)}
    try:
        case.spec.fn(**args, **options, backend=case.backend)
    except (TypeError, ValueError, RuntimeError) as error:
        for name, value in before.items():
            assert_same_bits(args[name], value, f"{name} after {what} was refused")
        return error
    raise AssertionError(f"{what} was accepted")


def _wrong_tensors(case: Case, sample: Sample) -> Iterator[_Call]:
    for name, value in sample.args.items():
        if value is not None:
            wrongs = {"a list": value.tolist(), "integers": value.int(), "one dimension more": value[None]}
            for what, wrong in wrongs.items():
                yield f"{name} as {what}", (name,), _arguments(case, sample) | {name: wrong}, dict(sample.kwargs)


def _wrong_indices(case: Case, sample: Sample) -> Iterator[_Call]:
    name = case.spec.indices
    if name is None:
        return
    count = sample[_inputs(case, sample)[0]].shape[0]
    right = torch.arange(count, dtype=torch.int32, device=case.device)
    wrongs: dict[str, torch.Tensor] = {"floats": right.float(), "one more than rows": torch.arange(count + 1)}
    if case.device == "cpu":  # elsewhere nobody waits for the values
        for what, first in (("an index below -1", -2), ("an index behind the states", count), ("an index twice", 1)):
            wrongs[what] = torch.cat([torch.full_like(right[:1], first), right[1:]])
    for what, wrong in wrongs.items():
        yield f"{name} with {what}", (name,), _arguments(case, sample), {**sample.kwargs, name: wrong}


def _in_one_storage(tensors: Mapping[str, torch.Tensor], overlap: int = 0) -> dict[str, torch.Tensor]:
    """Contiguous copies one behind the other, the last ones beginning `overlap` bytes early."""
    device = next(iter(tensors.values())).device
    raw = torch.zeros(sum(x.nbytes + 64 for x in tensors.values()), dtype=torch.uint8, device=device)
    copies, start = {}, 0
    for name, x in tensors.items():
        start = max(-(-start // 64) * 64 if not overlap else (start - overlap) // 8 * 8, 0)
        copies[name] = raw[start : start + x.nbytes].view(x.dtype).view(x.shape).copy_(x)
        start += x.nbytes
    return copies


def _aliases(case: Case, sample: Sample) -> Iterator[_Call]:
    """States that share memory with another argument, by as little as possible, or with themselves."""
    present: dict[str, torch.Tensor] = {n: x for n, x in sample.args.items() if x is not None and x.numel()}
    for name in case.mutated(present):
        for other in present:
            if other != name and not (other in case.spec.mutates and other < name):
                pair = _in_one_storage({n: present[n] for n in (name, other)}, overlap=1)
                args = _arguments(case, sample) | pair
                yield f"{name} that overlaps {other}", (name, other), args, dict(sample.kwargs)
        if present[name].shape[0] > 1:
            args = _arguments(case, sample) | {name: present[name][:1].clone().expand(present[name].shape)}
            yield f"{name} with stride 0", (name,), args, dict(sample.kwargs)


@check(applies=_mutates)
def state_after_errors(case: Case) -> None:
    """A call that raises leaves every state as it was: types, dtypes, shapes, indices, aliases, gradients."""
    sample = _sample(case)
    for calls in (_wrong_tensors, _wrong_indices, _aliases):
        for what, _, args, options in calls(case, sample):
            _refused(case, what, args, options)
    with torch.enable_grad():
        for name in case.float_args(sample):
            leaf = sample[name].clone().requires_grad_()
            error = _refused(case, f"{name} with a gradient", _arguments(case, sample) | {name: leaf}, sample.kwargs)
            assert str(error).startswith(f"{name}: "), f"the message does not name {name}: {error}"


@check(applies=_indexed)
def skipped_rows(case: Case) -> None:
    """A row with index -1 gives 0 and touches no state, whatever its input; the others work as without it, in any place."""
    sample = _sample(case)
    name, rows = case.spec.indices, _inputs(case, sample)
    count = sample[rows[0]].shape[0]
    expected = case.call(sample)
    for dtype in (torch.int32, torch.int64):
        for skipped in ({1}, set(range(count))):
            places = torch.tensor([-1 if i in skipped else count + 1 - i for i in range(count)], dtype=dtype)
            guards = Guards()
            args = _arguments(case, sample)
            for n in rows:
                args[n] = sample[n].clone()
                args[n][list(skipped)] = float("nan")
            for n in case.mutated(args):
                pool = guards.allocate((count + 2, *args[n].shape[1:]), args[n].dtype, n).to(case.device)
                for i in set(range(count)) - skipped:
                    pool[places[i]] = args[n][i]
                args[n] = pool
            before = {n: args[n].clone() for n in case.mutated(args)}
            result = case.spec.fn(**args, **{**sample.kwargs, str(name): places.to(case.device)}, backend=case.backend)
            outputs = (result,) if isinstance(result, torch.Tensor) else tuple(result)
            kept = [i for i in range(count) if i not in skipped]
            for y, wanted in zip(outputs, expected, strict=False):
                for i in skipped:
                    assert not bool(y[i].ne(0).any()), f"row {i} is skipped, but its result is not 0"
                assert_close(y[kept], wanted[kept], case.spec.tol.forward[y.dtype], "rows beside skipped ones")
            for (n, old), wanted in zip(before.items(), expected[len(outputs) :], strict=True):
                used = [int(places[i]) for i in kept]
                rest = [i for i in range(count + 2) if i not in used]
                assert_same_bits(args[n][rest], old[rest], f"{n} of no row")
                assert_close(args[n][used], wanted[kept], case.spec.tol.forward[old.dtype], f"{n} beside skipped rows")
            guards.check()


@check(applies=_mutates)
def aliased_state(case: Case) -> None:
    """Memory that a state shares with another argument or itself is refused by name; neighbours in one storage work."""
    sample = _sample(case)
    for what, names, args, options in _aliases(case, sample):
        error = _refused(case, what, args, options)
        named = any(str(error).startswith(f"{n}: ") for n in names)
        assert isinstance(error, ValueError) and named, f"{what}: expected a ValueError that names it, got {error!r}"
    present: dict[str, torch.Tensor] = {n: x for n, x in sample.args.items() if x is not None}
    apart = _in_one_storage(present)
    result = case.spec.fn(**{**sample.args, **apart}, **sample.kwargs, backend=case.backend)
    outputs = (result,) if isinstance(result, torch.Tensor) else tuple(result)
    changed = tuple(apart[n] for n in case.mutated(sample.args))
    for i, (a, b) in enumerate(zip((*outputs, *changed), case.call(sample), strict=True)):
        assert_close(a, b, case.spec.tol.forward[b.dtype], f"arguments side by side in one storage: result {i}")


@check(("native",), heavy=True, applies=_indexed)
def compiled_in_place(case: Case) -> None:
    """torch.compile(fullgraph=True) writes to the states given: no memory as large as the smallest of them is allocated."""
    sample = _sample(case)
    expected = case.call(sample)
    count = expected[0].shape[0]
    most = max(x.nbytes for x in (*expected, *(x for x in sample.args.values() if x is not None)))
    names = case.mutated(sample.args)
    places = count + 4 * most // min(sample[n][0].nbytes for n in names)
    args = dict(sample.args)
    for n in names:
        args[n] = torch.zeros((places, *sample[n].shape[1:]), dtype=sample[n].dtype, device=case.device)
        args[n][:count] = sample[n]  # type: ignore[index]
    given = tuple(n for n, x in args.items() if x is not None)
    index = torch.arange(count, dtype=torch.int32, device=case.device)

    def run(index: torch.Tensor, *tensors: torch.Tensor) -> Any:
        named = dict(zip(given, tensors, strict=True))
        options = {**sample.kwargs, str(case.spec.indices): index, "backend": case.backend}
        return case.spec.fn(**{**args, **named}, **options)

    def fresh() -> list[torch.Tensor]:
        return [args[n].clone() if n in names else args[n] for n in given]  # type: ignore[union-attr, misc]

    torch._dynamo.reset()
    # The compiler's caches on disk do not know which arguments share memory.
    with (
        torch.no_grad(),
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        compiled = torch.compile(run, fullgraph=True)
        compiled(index, *fresh())
        tensors = fresh()
        largest = _largest_allocation(lambda: compiled(index, *tensors))
    states = dict(zip(given, tensors, strict=True))
    for n, wanted in zip(names, expected[-len(names) :], strict=True):
        assert_close(states[n][:count], wanted, case.spec.tol.forward[wanted.dtype], f"{n}, compiled")
        assert not bool(states[n][count:].count_nonzero()), f"{n}: places of no row were written to"
    smallest = min(states[n].nbytes for n in names)
    assert largest < smallest, f"compiled code allocates {largest} bytes at once, the smallest state has {smallest}"


def _largest_allocation(call: Any) -> int:
    """Bytes of the largest piece of memory that is allocated during the call."""
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    return max((event.nbytes() for event in events if event.name() == "[memory]"), default=0)
