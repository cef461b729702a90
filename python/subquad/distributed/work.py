"""How long a rank works beside one process, at gated linear attention: `subquad bench distributed --case work` and `processes`.

"work": a rank in the middle of three, of which there is only this one, and one process on the same tokens: what walks for other
ranks cost. "processes": two processes of one thread each with half of the tokens, and one process of one thread with all.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from ..bench.timing import Plan, Timing, interleaved
from ..ops.gated_linear_attention import gated_linear_attention as on_one
from ..testing.compare import assert_close
from .gated_linear_attention import gated_linear_attention
from .layout import SequenceLayout
from .traffic import played

CLOSE = {torch.float32: 3e-5, torch.bfloat16: 1e-2}  # of results and gradients, as relative L2 errors
_OPTIONS: dict[str, Any] = {"normalize": True}


@dataclass(frozen=True)
class Case:
    """Heads of `width` channels, `tokens` of a rank or of the whole sequence, gates of every channel from -`fall` to 0."""

    tokens: int
    heads: int
    width: int
    dtype: torch.dtype = torch.float32
    fall: float = 0.1

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.tokens} tokens, {self.heads} heads of {self.width}, {dtype}, gates to -{self.fall:g}"

    def tensors(self) -> list[torch.Tensor]:
        """q, k, v and g, the same in every process. Values have a mean of 0, else gradients would be rounding errors mostly."""
        generator = torch.Generator().manual_seed(0)
        q, k, v, g = (torch.rand(1, self.tokens, self.heads, self.width, generator=generator) for _ in range(4))
        return [*(x.to(self.dtype).requires_grad_() for x in (q, k, v - 0.5)), (-self.fall * g).requires_grad_()]


FALLS = (0.1, 0.0001)  # what enters is forgotten after 2,000 tokens; after more than there are
WORK = tuple(Case(*size, dtype, fall) for size in ((32768, 4, 64), (8192, 8, 128)) for dtype in CLOSE for fall in FALLS)
PROCESSES = tuple(Case(65536, 4, 64, dtype, fall) for dtype in CLOSE for fall in FALLS)
QUICK = (Case(512, 2, 16),)


@dataclass(frozen=True)
class Ratio:
    """Seconds of `ours` and of one process, as medians of samples taken in turn."""

    name: str
    ours: float
    one: float

    def __str__(self) -> str:
        return f"{self.name:<85} {self.ours * 1e3:9.2f} ms {self.one * 1e3:9.2f} ms {self.ours / self.one:6.2f} of one process"


def local_work(case: Case, plan: Plan) -> list[Ratio]:
    """Forward, and backward alone, of a rank in the middle of three, beside one process on the tokens of that rank.

    What would come from another rank is a copy of what this one sends: right is what one process makes of these tokens from the
    state that they leave, with the gradient behind them that they ask of the state before them.

    Raises:
        AssertionError: a result or a gradient is not that.
        RuntimeError: there is a process group.
    """
    tensors = case.tensors()
    with played(1, 3):
        layout = SequenceLayout.contiguous(3 * case.tokens)

        def rank(*x: torch.Tensor) -> torch.Tensor:
            return gated_linear_attention(*x, layout=layout, **_OPTIONS)[0]

        weight = torch.rand_like(tensors[0]).detach()
        _check(rank, tensors, weight)
        calls = {"rank": rank, "one": _one}
        times = {"forward": _timed(calls, tensors, plan)}
        outputs = {name: call(*tensors) for name, call in calls.items()}
        back: dict[str, Callable[..., Any]] = {
            name: lambda *x, y=y: torch.autograd.grad(y, x, weight, retain_graph=True) for name, y in outputs.items()
        }
        times["backward"] = _timed(back, tensors, plan, gradients=True)
    return [Ratio(f"work, {case}, {way}", t["rank"].median, t["one"].median) for way, t in times.items()]


def _one(*x: torch.Tensor) -> torch.Tensor:
    return on_one(*x, **_OPTIONS)[0]


def _check(rank: Callable[..., torch.Tensor], tensors: list[torch.Tensor], weight: torch.Tensor) -> None:
    y = rank(*tensors)
    found = (y, *torch.autograd.grad(y, tensors, weight))
    left: Any = on_one(*tensors, output_final_state=True, **_OPTIONS)[1]
    entered = tuple(x.detach().requires_grad_() for x in left)
    o, after = on_one(*tensors, initial_state=entered, output_final_state=True, **_OPTIONS)
    asked = torch.autograd.grad(o, entered, weight, retain_graph=True)
    wanted = (o, *torch.autograd.grad((o, *after), tensors, (weight, *asked)))  # type: ignore[misc]
    for name, one, other in zip(("o", "dq", "dk", "dv", "dg"), found, wanted, strict=True):
        assert_close(one.detach().double(), other.detach().double(), CLOSE[tensors[0].dtype], name)


def _timed(
    calls: Mapping[str, Callable[..., Any]], tensors: list[torch.Tensor], plan: Plan, gradients: bool = False
) -> dict[str, Timing]:
    def bound(call: Callable[..., Any]) -> Callable[[], Any]:
        def run() -> Any:
            with torch.set_grad_enabled(gradients):
                return call(*tensors)

        return run

    return interleaved({name: bound(call) for name, call in calls.items()}, plan)


def beside_one(rank: int, case: Case, plan: Plan) -> list[Ratio]:
    """Forward, and forward with backward, of all ranks of the default group on their shards, and of rank 0 alone on everything,
    in turn. The time of all is that of the slowest; others wait meanwhile.

    Raises:
        AssertionError: a result is not that of one process.
    """
    whole = case.tensors()
    layout = SequenceLayout.contiguous(case.tokens)
    shards = [layout.shard(x.detach()).requires_grad_() for x in whole]

    def ours(*x: torch.Tensor) -> torch.Tensor:
        return gated_linear_attention(*x, layout=layout, **_OPTIONS)[0]

    with torch.no_grad():
        assert_close(ours(*shards).double(), layout.shard(_one(*whole)).double(), CLOSE[case.dtype], "o")
    found = []
    for way in ("forward", "forward and backward"):
        samples: list[tuple[float, float]] = []
        begin = time.perf_counter()
        for round_ in range(-plan.warmup, plan.rounds):
            both = _slowest(_seconds(ours, shards, way))
            alone = _slowest(_seconds(_one, whole, way) if rank == 0 else 0.0)
            if round_ >= 0:
                samples.append((both, alone))
            if samples and _slowest(time.perf_counter() - begin) > plan.budget:
                break
        seconds = [median(column) for column in zip(*samples, strict=True)]
        found.append(Ratio(f"{layout.size} processes, {case}, {way}", *seconds))
    return found


def _slowest(seconds: float) -> float:
    """Of all ranks, which meet here."""
    longest = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return float(longest)


def _seconds(call: Callable[..., torch.Tensor], tensors: list[torch.Tensor], way: str) -> float:
    begin = time.perf_counter()
    with torch.set_grad_enabled(way != "forward"):
        y = call(*tensors)
    if way != "forward":
        torch.autograd.grad(y, tensors, torch.ones_like(y))
    return time.perf_counter() - begin


def _process(rank: int, store: str, cases: tuple[Case, ...], plan: Plan) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for case in cases:
        for ratio in beside_one(rank, case, plan):
            if rank == 0:
                print(ratio, flush=True)
    dist.destroy_process_group()


def main(name: str, quick: bool, plan: Plan) -> int:
    """Print a line for every case of "work" or "processes". Returns 0.

    Raises:
        ValueError: there are no such cases.
    """
    if name not in ("work", "processes"):
        raise ValueError(f"case: expected 'work' or 'processes', got {name!r}")
    if name == "work":
        for case in QUICK if quick else WORK:
            print(*local_work(case, plan), sep="\n", flush=True)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        arguments = (str(Path(folder) / "store"), QUICK if quick else PROCESSES, plan)
        torch.multiprocessing.spawn(_process, arguments, nprocs=2)  # type: ignore[no-untyped-call]
    return 0
