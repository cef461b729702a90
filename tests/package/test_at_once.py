"""Calls without checks in Python: what is taken, refused and left alone is what the long way takes, refuses and leaves alone."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

import subquad
from subquad.ops import _call
from subquad.testing import assert_same_bits, backend_params

Arguments = dict[str, Any]
ROWS, POOL = 2, 3


def tensors(seed: int = 3) -> Callable[..., torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.rand(shape, generator=g)


def lawcat() -> Iterator[Arguments]:
    new = tensors()
    rows: Arguments = {"q0": new(ROWS, 4, 8), "k0": new(ROWS, 1, 8), "v": new(ROWS, 1, 5), "u": None}
    rows |= {"cq": new(32, 4), "ck": new(16, 4), "wphi": new(2, 8, 3)}
    yield {**rows, "conv_q": new(ROWS, 32, 3), "conv_k": new(ROWS, 8, 3), "state": new(ROWS, 2, 6, 5)}
    states = {"conv_q": new(POOL, 32, 3), "conv_k": new(POOL, 8, 3), "state": new(POOL, 2, 6, 5)}
    more = {"u": new(ROWS, 2, 6), "z": new(POOL, 2, 6), "wphi_k": new(1, 8, 3), "cq_bias": new(32), "ck_bias": new(16)}
    options = {"activation": "silu", "tau": 8.0, "clamp_min": -3.0, "scale": 0.5, "eps": 1e-8, "fm_eps": 1e-9}
    yield {**rows, **states, **more, **options, "state_indices": torch.tensor([2, -1]), "cq": new(32, 1, 4)}


def linear() -> Iterator[Arguments]:
    new = tensors()
    rows: Arguments = {"q": new(ROWS, 4, 8), "k": new(ROWS, 2, 8), "v": new(ROWS, 1, 5), "g": None}
    yield {**rows, "state": new(ROWS, 2, 8, 5)}
    states = {"state": new(POOL, 2, 8, 5), "z": new(POOL, 2, 8), "state_indices": torch.tensor([2, 0])}
    yield {**rows, **states, "g": -new(ROWS, 2, 8), "scale": 0.3, "eps": 1e-8}


def convolution() -> Iterator[Arguments]:
    new = tensors()
    yield {"x": new(ROWS, 6), "conv_state": new(ROWS, 6, 3), "weight": new(6, 1, 4)}
    x, weight = {"x": new(ROWS, 2, 6)}, {"weight": new(12, 4), "bias": new(12), "residual": new(ROWS, 2, 12)}
    places = {"cache_seqlens": torch.tensor([4, 5]), "conv_state_indices": torch.tensor([2, 0], dtype=torch.int32)}
    groups = {"channel_groups": 2, "head_dim": 3, "activation": "swish"}
    yield {**x, "conv_state": new(POOL, 6, 5), **weight, **places, **groups}


def sinks() -> Iterator[Arguments]:
    new = tensors()

    def count(*n: int) -> torch.Tensor:
        return torch.tensor(n)

    rows: Arguments = {"q": new(ROWS, 3, 4, 8), "k": new(ROWS, 3, 2, 8), "v": new(ROWS, 3, 2, 5)}
    rows |= {"sink_k": new(ROWS, 2, 2, 8), "sink_v": new(ROWS, 2, 2, 5)}
    counters = {"seen": count(5, 1), "written": count(6, 1), "first": count(0, 0)}
    yield {**rows, "ring_k": new(ROWS, 2, 9, 8), "ring_v": new(ROWS, 2, 9, 5), **counters, "window": 6}
    rings = {n: torch.ones(ROWS, 2, 9, width, dtype=torch.int8) for n, width in (("ring_k", 8), ("ring_v", 5))}
    scales = {"k_scale": new(ROWS, 2, 9), "v_scale": new(ROWS, 2, 9)}
    rope = subquad.RopeSpec(torch.tensor([1.0, 0.1]), 4, interleaved=True, attention_scaling=1.5)
    options = {"m": count(3, 0), "sink_logits": new(4), "rope": rope, "key_rope": "post", "positions": "absolute"}
    yield {
        **rows,
        **rings,
        **counters,
        **scales,
        **options,
        "window": 4,
        "together": True,
        "commit": False,
        "scale": 0.2,
    }
    wide = {n: rows[n].bfloat16() for n in ("k", "v", "sink_k", "sink_v")}
    yield {**wide, **rings, **counters, **scales, "q": None, "sink_logits": new(4).bfloat16(), "window": 4}


def thresholds(n: int) -> Iterator[Arguments]:
    for threshold in (0.3, torch.tensor(0.3), torch.linspace(-0.1, 0.5, n)):
        yield {"threshold": threshold}


def mlp() -> Iterator[Arguments]:
    new = tensors()
    weights = {"w_gate": new(12, 8), "w_up": new(12, 8), "w_down": new(12, 8).t()}
    for more in thresholds(12):
        yield {"x": new(ROWS, 8), **weights, **more}
    biases = {"b_gate": -new(12), "b_up": new(12), "b_down": new(8)}
    options = {"activation": "gelu", "inclusive": True, "mask_mode": "union", "max_sparse_tokens": 8, "grad": "ste"}
    yield {"x": new(ROWS, 3, 8), **weights, **more, **biases, **options, "prefill": "dense"}


def activation() -> Iterator[Arguments]:
    new = tensors()
    for more in thresholds(6):
        yield {"z": new(ROWS, 3, 6), **more}
    yield {"z": new(ROWS, 6), **more, "activation": "relu", "inclusive": True, "grad": "ste"}


def quantised() -> Iterator[Arguments]:
    new = tensors()
    yield {"x": new(ROWS, 3, 64), "weight": subquad.quantise(new(5, 64), "int8"), "bias": None, "format": "int8"}
    yield {"x": new(ROWS, 64), "weight": subquad.quantise(new(5, 64), "int4_min"), "bias": new(5), "format": "int4_min"}


def quantised_mlp() -> Iterator[Arguments]:
    new = tensors()
    formats = ("int8", "int4", "int4_min")
    weights = {n: subquad.quantise(new(64, 32), f) for n, f in zip(("w_gate", "w_up", "w_down"), formats, strict=True)}
    for more in thresholds(64):
        yield {"x": new(ROWS, 32), **weights, **more, "format": formats}
    biases = {"b_gate": -new(64), "b_up": new(64), "b_down": new(32)}
    yield {
        "x": new(1, ROWS, 32),
        **weights,
        **more,
        **biases,
        "format": formats,
        "return_mask": True,
        "activation": "relu",
    }
    shared = {"w_down": (255 * new(64, 32)).byte(), "down_scales": new(2, 32).half().view(torch.uint8)}
    yield {
        "x": new(ROWS, 32),
        "w_gate": weights["w_gate"],
        "w_up": weights["w_gate"],
        **shared,
        **more,
        "format": "int8",
    }


CALLS: dict[str, Callable[[], Iterator[Arguments]]] = {
    "lawcat_decode_step": lawcat,
    "gated_linear_attention_step": linear,
    "causal_conv1d_update": convolution,
    "sink_attention_step": sinks,
    "cats_mlp": mlp,
    "cats_activation": activation,
    "quantised_linear": quantised,
    "quantised_cats_mlp": quantised_mlp,
}


# --- one call, and what it does ----------------------------------------


class Other(torch.Tensor):
    pass


def freed(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


CHANGED: dict[str, Callable[[torch.Tensor], Any]] = {
    "is a list": lambda x: x.tolist(),
    "is an array": lambda x: x.float().numpy(),
    "is another class": lambda x: x.as_subclass(Other),
    "is a parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "has no dimension": lambda x: x.flatten()[0],
    "has one dimension": lambda x: x.flatten(),
    "has a dimension more": lambda x: x[None],
    "has a dimension more behind": lambda x: x[..., None],
    "has a dimension less": lambda x: x[0],
    "is shorter": lambda x: x[..., :-1],
    "is longer": lambda x: torch.cat([x, x], -1),
    "has fewer rows": lambda x: x[:-1],
    "has no rows": lambda x: x[:0],
    "has twice the rows": lambda x: torch.cat([x, x]),
    "has no heads": lambda x: x[:, :0] if x.dim() > 1 else x,
    "has twice the heads": lambda x: torch.cat([x, x], 1) if x.dim() > 1 else x,
    "has three times the heads": lambda x: torch.cat([x, x, x], 1) if x.dim() > 1 else x,
    "has no elements": lambda x: x[..., :0],
    "is wide": lambda x: torch.cat([x] * 300, -1),
    "is float64": lambda x: x.double(),
    "is bfloat16": lambda x: x.bfloat16(),
    "is float16": lambda x: x.half(),
    "is int32": lambda x: x.int(),
    "is int64": lambda x: x.long(),
    "is uint8": lambda x: x.byte(),
    "is bool": lambda x: x.bool(),
    "is complex": lambda x: x.cfloat(),
    "is transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "is every other": lambda x: torch.stack([x, x], -1)[..., 0],
    "is expanded": lambda x: x[:1].expand_as(x),
    "overlaps itself": lambda x: torch.cat([x.flatten()] * 2).as_strided(x.shape, (1,) * x.dim()),
    "is sparse": lambda x: x.to_sparse(),
    "is of another layout": lambda x: x.float().to_mkldnn() if x.dim() > 1 else x,
    "is on no device": lambda x: x.to("meta"),
    "lost its memory": freed,
    "needs a gradient": lambda x: x.clone().requires_grad_() if x.is_floating_point() else x,
    "is NaN": lambda x: torch.full_like(x, math.nan) if x.is_floating_point() else x,
    "is one more": lambda x: x + 1,
    "is negative": lambda x: -x - 2,
    "is one and the same": lambda x: torch.full_like(x, x.flatten()[0].item()),
}
VALUES = (
    None, True, False, 0, 1, -1, 2, 3, 2.5, 0.0, -0.5, 1e39, -1e39, math.nan, math.inf, -math.inf, 10**400, 2**63, "silu", "x",
    b"x", [], (1, 2), torch.tensor(0.5), torch.tensor([1]), torch.float32, ...,
)  # fmt: skip
BACKENDS = (None, "native", "reference", "fast", "", 3)


def columns(wide: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    """A view of some columns, of the shape of `like`."""
    part = wide[:, start : start + like[0].numel()]
    return part.unflatten(1, like.shape[1:]) if like.dim() > 1 else part[:, 0]


def changes(name: str, arguments: Arguments) -> Iterator[tuple[str, Arguments]]:
    """(what, arguments with that changed): each argument by itself, and tensors that share memory."""
    for argument, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            continue
        for what, change in CHANGED.items():
            yield f"{argument} {what}", {**arguments, argument: change(value if value.dim() else value[None])}
        for other, its in arguments.items():
            if other == argument or not isinstance(its, torch.Tensor):
                continue
            buffer = torch.zeros(value.numel() + its.numel(), dtype=value.dtype)
            for what, start in (("inside", 0), ("behind", its.numel()), ("at the end of", its.numel() - 1)):
                if its.dtype is value.dtype and value.numel() and its.numel():
                    first = buffer[: its.numel()].view(its.shape).copy_(its)
                    second = buffer[start : start + value.numel()].view(value.shape)
                    yield f"{argument} {what} {other}", {**arguments, other: first, argument: second}
            if its.shape[:1] == value.shape[:1] and its.dtype is value.dtype:
                wide, end = torch.cat([x.reshape(len(x), -1) for x in (value, its)], 1), value[0].numel()
                for overlap in (0, 1):
                    a, b = columns(wide, 0, value), columns(wide, end - overlap, its)
                    yield f"{argument} beside {other}, {overlap}", {**arguments, argument: a, other: b}
    options = getattr(subquad, name).__kwdefaults__
    for option in (*options, *(n for n in arguments if n in ("window", "threshold"))):
        values = BACKENDS if option == "backend" else VALUES
        for value in values:
            yield f"{option} of {value!r:.20}", {**arguments, option: value}
    for argument in arguments:
        yield f"{argument} is none", {**arguments, argument: None}


def copies(arguments: Arguments) -> Arguments:
    """What shares memory goes on sharing it."""
    plain = {n: x for n, x in arguments.items() if isinstance(x, torch.Tensor) and bits(x) is not None}
    others = {n: x.clone() for n, x in arguments.items() if isinstance(x, Other)}
    return {**arguments, **copy.deepcopy(plain), **others}


def bits(x: Any) -> Any:
    if (
        not isinstance(x, torch.Tensor)
        or type(x) not in (torch.Tensor, torch.nn.Parameter)
        or x.layout is not torch.strided
    ):
        return None
    if x.is_meta or (x.numel() and not x.untyped_storage().nbytes()):
        return None
    return x.detach().clone()


def outcome(name: str, arguments: Arguments, long: bool) -> tuple[Any, Arguments, bool]:
    """(the results, or type and words of the error), the tensors after the call, whether the operator was called at once."""
    taken = []
    at_once = _call.at_once

    def watched(*given: Any) -> Any:
        found = None if long else at_once(*given)
        taken.append(found is not None)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_call, "at_once", watched)
        try:
            found = getattr(subquad, name)(**arguments)
        except Exception as error:
            found = (type(error), str(error).split("\nException raised from")[0])
    return found, {n: bits(x) for n, x in arguments.items()}, any(taken)


def same(a: Any, b: Any, what: str) -> None:
    __tracebackhide__ = True
    assert type(a) is type(b), f"{what}: {a} and {b}"
    if isinstance(a, tuple):
        assert len(a) == len(b), what
        for x, y in zip(a, b, strict=True):
            same(x, y, what)
    elif isinstance(a, torch.Tensor):
        if a.is_meta:
            assert b.is_meta and a.shape == b.shape, what
        else:
            assert_same_bits(a.detach(), b.detach(), what)
    else:
        assert a == b, f"{what}: {a} and {b}"


def both_ways(name: str, what: str, arguments: Arguments) -> bool:
    """Whether the operator was called at once. Results, errors and all tensors are those of the long way."""
    __tracebackhide__ = True  # pytest would print the arguments, of which some have no memory
    near, far = copies(arguments), copies(arguments)
    found, after, taken = outcome(name, near, long=False)
    expected, wanted, _ = outcome(name, far, long=True)
    same(found, expected, what)
    failed = isinstance(found, tuple) and isinstance(found[0], type)
    for n, value in arguments.items():
        same(after[n], wanted[n], f"{what}: {n} after the call")
        if failed:
            same(after[n], bits(value), f"{what}: {n} after the error")
    assert not (failed and taken), what
    return taken


# --- tests ----------------------------------------


@pytest.mark.filterwarnings("ignore")
@backend_params("causal_conv1d", "native")
@pytest.mark.parametrize("name", CALLS)
def test_it_is_the_long_way(name: str, backend: str) -> None:
    """Every argument of a call changed in every way: the same result or the same error, and nothing written before one."""
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            for i, arguments in enumerate(CALLS[name]()):
                outcome(name, copies(arguments), long=True)  # the first call chooses a backend
                assert both_ways(name, f"call {i}", arguments)
                for what, changed in changes(name, arguments):
                    both_ways(name, f"call {i}, {what}", changed)


def anywhere(draw: random.Random, buffer: torch.Tensor, *shape: int) -> torch.Tensor:
    strides = [draw.choice((0, 1, 2, 3, 4, 6, 8, 12)) for _ in shape]
    reach = sum(stride * (n - 1) for stride, n in zip(strides, shape, strict=True))
    return buffer.as_strided(shape, strides, draw.randrange(len(buffer) - reach))


@backend_params("causal_conv1d", "native")
def test_shared_memory_is_found_as_in_python(backend: str) -> None:
    """Operators look at less than Python does: whether one begins before another ends. It is the same for what they are given."""
    draw, taken = random.Random(5), set()
    sinks_of = next(iter(CALLS["sink_attention_step"]()))
    for _ in range(400):
        buffer = torch.arange(80.0)
        x, places = buffer.as_strided((2, 2), (2, 1), draw.randrange(76)), draw.randrange(44)
        arguments = {"x": x, "conv_state": anywhere(draw, buffer, 2, 2, 3), "weight": torch.ones(2, 3)}
        taken.add(both_ways("causal_conv1d_update", str(arguments["conv_state"].stride()), arguments))
        ring = buffer[places : places + 36].view(2, 1, 9, 2)
        rest = {n: x[:, :1, :, :2].contiguous() for n, x in sinks_of.items() if n in ("sink_k", "sink_v", "ring_v")}
        keys = {"q": torch.ones(2, 1, 1, 2), "k": anywhere(draw, buffer, 2, 1, 1, 2), "v": torch.ones(2, 1, 1, 2)}
        arguments = {**sinks_of, **rest, **keys, "ring_k": ring}
        taken.add(both_ways("sink_attention_step", str(arguments["k"].stride()), arguments))
    assert taken == {False, True}


MODES: dict[str, tuple[Callable[[], Any], bool]] = {
    "inference": (torch.inference_mode, True),
    "autocast": (lambda: torch.autocast("cpu", dtype=torch.bfloat16), False),
    "forward mode": (forward_ad.dual_level, False),
    "use_backend": (lambda: subquad.use_backend("reference"), False),
    "the same backend": (lambda: subquad.use_backend("native"), True),
}


@backend_params("causal_conv1d", "native")
@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: str, backend: str) -> None:
    """Where more is to be done than to call a kernel, the call goes the long way."""
    context, short = MODES[mode]
    for name, calls in CALLS.items():
        for i, arguments in enumerate(calls()):
            with context():
                outcome(name, copies(arguments), long=True)
                assert both_ways(name, f"{name}, call {i}", arguments) is short, f"{name}, call {i}"
