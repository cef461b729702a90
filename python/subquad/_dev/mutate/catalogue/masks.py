"""Faults of interval masks: builders, algebra, plans, conversions."""

from __future__ import annotations

from ..fault import Fault, Where


def _of(file: str, *more: str) -> Where:
    tests = ("tests/ops/interval_attention/test_masks.py", "tests/ops/interval_attention/test_recipes.py", *more)
    return Where(f"python/subquad/masks/{file}", tests, "", ())


_ALGEBRA = _of("algebra.py")
_BUILDERS = _of("builders.py")
_CHECKS = _of("checks.py")
_INTEROP = _of("interop.py")
_MASK = _of("interval_mask.py", "tests/models/test_attention.py")
_PLAN = _of("plan.py", "tests/ops/interval_attention/test_interval_attention.py")
_LIFETIMES = _of("key_lifetimes.py", "tests/models/test_masks.py")
_MODEL = _of("model_mask.py", "tests/models/test_attention.py", "tests/models/test_lawcat.py")

FAULTS = (
    Fault(
        "masks-touching-runs",
        "bounds",
        _ALGEBRA,
        "first[..., 1:] = starts[..., 1:] > reach[..., :-1]",
        "first[..., 1:] = starts[..., 1:] > reach[..., :-1] + 1",
    ),
    Fault("masks-reach", "mask", _ALGEBRA, "reach = ends.cummax(-1).values", "reach = ends"),
    Fault(
        "masks-complement-end",
        "bounds",
        _ALGEBRA,
        "ends = torch.nn.functional.pad(a[0], (0, 1), value=tk)",
        "ends = torch.nn.functional.pad(a[0], (0, 1), value=tk - 1)",
    ),
    Fault(
        "masks-dense-runs",
        "bounds",
        _ALGEBRA,
        "for edges, offset in ((rises, 0), (falls, 1))",
        "for edges, offset in ((rises, 0), (falls, 0))",
    ),
    Fault(
        "masks-trimmed",
        "bounds",
        _ALGEBRA,
        "used = (starts < ends).flatten(0, -2).any(0)",
        "used = (starts < ends).flatten(0, -2).all(0)",
    ),
    Fault(
        "masks-sink-window",
        "bounds",
        _BUILDERS,
        "first = (i - window + 1).clamp_min(0)",
        "first = (i - window).clamp_min(0)",
    ),
    Fault(
        "masks-sink-last-row",
        "sink",
        _BUILDERS,
        "(i + 1).clamp(max=sink_tokens)), (first, i + 1))",
        "(i + 1).clamp(max=max(sink_tokens - 1, 0))), (first, i + 1))",
    ),
    Fault(
        "masks-packed-queries",
        "mask",
        _BUILDERS,
        "stop = low + (row - cu_q[:-1][document]) + 1 + (high - low) - lengths[document]",
        "stop = low + (row - cu_q[:-1][document]) + 1",
    ),
    Fault(
        "masks-packed-sinks",
        "sink",
        _BUILDERS,
        "sinks = torch.minimum(low + sink_tokens, stop)",
        "sinks = torch.minimum(low * 0 + sink_tokens, stop)",
    ),
    Fault(
        "masks-packed-window", "mask", _BUILDERS, "(torch.maximum(low, stop - window), stop))", "(stop - window, stop))"
    ),
    Fault(
        "masks-pine-document",
        "mask",
        _BUILDERS,
        "stop = torch.where(~in_suffix & (group == j), i + 1, high)",
        "stop = torch.where(~in_suffix & (group >= j), i + 1, high)",
    ),
    Fault(
        "masks-frame-window",
        "bounds",
        _BUILDERS,
        "first = (last - (local - sinks) + 1).clamp_min(0)",
        "first = (last - local + 1).clamp_min(0)",
    ),
    Fault(
        "masks-lookahead",
        "bounds",
        _BUILDERS,
        "(i + 1 + ahead.long()).clamp(max=tk)",
        "(i + ahead.long()).clamp(max=tk)",
    ),
    Fault(
        "masks-overlap-unchecked",
        "guard",
        _CHECKS,
        "bad = live[..., 1:] & (starts[..., 1:] < reach[..., :-1])",
        "bad = live[..., 1:] & (starts[..., 1:] < 0)",
    ),
    Fault("masks-lifetime-unchecked", "guard", _CHECKS, "if key_start.shape[2] != tk:", "if key_start.shape[2] < tk:"),
    Fault(
        "masks-flex-lifetime",
        "mask",
        _INTEROP,
        "keep = keep & (q >= alive[0](b, h, kv)) & (q < alive[1](b, h, kv))",
        "keep = keep & (q >= alive[0](b, h, kv)) & (q <= alive[1](b, h, kv))",
    ),
    Fault("masks-flex-slots", "mask", _INTEROP, "for start, stop in slots[1:]:", "for start, stop in slots[2:]:"),
    Fault(
        "masks-flashmask-upper",
        "mask",
        _INTEROP,
        "upper = (starts[..., 0] == 0) & (ends[..., 0] > 0)",
        "upper = starts[..., 0] > 0",
    ),
    Fault(
        "masks-plan-stale",
        "stale",
        _PLAN,
        "get(starts, (ends, ends._version, tk), lambda",
        "get(starts, (ends, tk), lambda",
    ),
    Fault("masks-plan-slots", "stale", _PLAN, "return _PLANS[per_slot].get(", "return _PLANS[False].get("),
    Fault(
        "masks-and-lifetimes",
        "mask",
        _LIFETIMES,
        "return torch.maximum(a[0], b[0]), torch.minimum(a[1], b[1])",
        "return torch.maximum(a[0], b[0]), torch.maximum(a[1], b[1])",
    ),
    Fault(
        "masks-live-keys",
        "mask",
        _LIFETIMES,
        "stop = torch.where(visible, tq, 0).int()[:, None]",
        "stop = torch.where(visible, tq - 1, 0).int()[:, None]",
    ),
    Fault(
        "masks-is-causal",
        "mask",
        _MASK,
        "return bool(((starts >= ends) | (ends <= stop)).all())",
        "return bool(((starts >= ends) | (starts <= stop)).all())",
    ),
    Fault(
        "masks-is-closed",
        "mask",
        _LIFETIMES,
        "return bool(((rows >= stops) | ((rows >= lo) & (stops <= hi))).all())",
        "return bool(((rows >= stops) | (stops <= hi)).all())",
    ),
    Fault(
        "masks-bound-sizes",
        "guard",
        _MASK,
        "if self.tq is not None and (self.tq != tq or self.tk != tk):",
        "if self.tq is not None and self.tq != tq:",
    ),
    Fault("masks-union-shift", "guard", _MASK, "if self.shift is not None and not shifts:", "if False:"),
    Fault("masks-spans-negative", "guard", _MASK, "stop = torch.where(start < 0, start, stop)\n", ""),
    Fault(
        "masks-plan-full",
        "mask",
        _PLAN,
        "full = _covered(first, last, live & (first < last), nq, nk) == rows[:, None]",
        "full = _covered(first, last, live & (first < last), nq, nk) > 0",
    ),
    Fault(
        "masks-plan-last-tile",
        "bounds",
        _PLAN,
        "-(-ends // PLAN_K), live, nq, nk) > 0",
        "ends // PLAN_K, live, nq, nk) > 0",
    ),
    Fault(
        "masks-plan-last-rows",
        "bounds",
        _PLAN,
        "nq, nk = -(-tq // PLAN_Q), -(-tk // PLAN_K)",
        "nq, nk = max(1, tq // PLAN_Q), -(-tk // PLAN_K)",
    ),
    Fault(
        "masks-model-attributes",
        "stale",
        _MODEL,
        "result.__dict__.update(attributes)",
        'result.__dict__.update(attributes | {"sliding_window": -1})',
    ),
)
