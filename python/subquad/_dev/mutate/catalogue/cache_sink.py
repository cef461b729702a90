"""Faults of the streaming cache above its step: what it forgets, moves and takes back, many tokens, frames, checks."""

from __future__ import annotations

from ..fault import Fault, Where

_K = "not triton and not simt"


_STEP = "tests/ops/sink_attention_step"


def _of(file: str, *tests: str) -> Where:
    return Where(f"python/subquad/{file}", tests, _K, ("test_cache",))


_TESTS = tuple(f"{_STEP}/test_{name}.py" for name in ("cache", "cache_state", "frames"))
_CACHE = _of("cache/sink.py", *_TESTS)
_MOVES = _of("cache/_sink_moves.py", *_TESTS)
_PREFILL = _of("cache/_sink_prefill.py", *_TESTS)
_FRAMES = _of("cache/frames.py", f"{_STEP}/test_frames.py")
_STATE = _of("cache/sink_state.py", "tests/models/test_sink.py", "tests/models/test_sink_generate.py")
_SHARE = _of("cache/_share.py", "tests/distributed/test_decoding.py")
_SHARED_PREFILL = _of("cache/_sink_prefill.py", "tests/distributed/test_decoding.py")
_SHARED = _of("distributed/sink_cache.py", "tests/distributed/test_decoding.py")
_SHARED_MODELS = _of("distributed/sink_cache.py", "tests/distributed/test_parallel_models.py")
_HANDED = _of("distributed/hand_over.py", "tests/distributed/test_decoding.py")
_CHANNELS = _of("distributed/linear_step.py", "tests/distributed/test_decoding.py")
_DTENSOR = _of("distributed/dtensor.py", "tests/distributed/test_dtensor.py")
_DTENSOR_CALL = _of("ops/_call.py", "tests/distributed/test_dtensor.py")
_CHECKS = _of("ops/_sink_checks.py", *_TESTS, f"{_STEP}/test_errors.py")

FAULTS = (
    Fault("dtensor-partial", "formula", _DTENSOR, "Partial() if placement == WHOLE else placement", "placement"),
    Fault("dtensor-pairing", "bounds", _DTENSOR, "WHOLE if count == 1 else None", "WHOLE"),
    Fault("dtensor-head-width", "bounds", _DTENSOR, "of.shape[2] % (width * n) == 0", "of.shape[2] % n == 0"),
    Fault("dtensor-bias-of-all", "formula", _DTENSOR, "if result == Partial())\n", "if not result)\n"),
    Fault("dtensor-union", "formula", _DTENSOR, 'mask_mode == "token", dim)', "True, dim)"),
    Fault("dtensor-few-of-many", "bounds", _DTENSOR, 'if prefill == "dense" and x.numel()', "if False and x.numel()"),
    Fault("dtensor-groups-of-neurons", "bounds", _DTENSOR, "count % (GROUP * size) == 0", "True"),
    Fault("dtensor-no-gradient", "state", _DTENSOR_CALL, "ctx.set_materialize_grads(False)", "pass"),
    Fault(
        "cache-channels-own",
        "bounds",
        _CHANNELS,
        "slice(rank * width // size, (rank + 1) * width // size)",
        "slice(rank, width, size)",
    ),
    Fault("cache-channels-scale", "formula", _CHANNELS, "factor = width**-0.5", "factor = (width // size)**-0.5"),
    Fault("cache-channels-sum", "formula", _CHANNELS, "_collectives.all_reduce(o, group)", "pass"),
    Fault("cache-shared-model", "state", _SHARED_MODELS, "layer.cache_kind = made", "pass"),
    Fault("cache-handed-window", "bounds", _HANDED, "tokens - cache.places)", "tokens - cache.window)"),
    Fault("cache-handed-order", "formula", _HANDED, "given[order.to(k.device)]", "given"),
    Fault("cache-handed-owner", "state", _HANDED, "run.low < run.high == layout.tokens", "run.low == 0"),
    Fault("cache-shared-column", "bounds", _SHARE, "(self.rank - seen) % self.size", "self.rank"),
    Fault(
        "cache-shared-position",
        "formula",
        _SHARED_PREFILL,
        "token, entering = share.token(number),",
        "token, entering = number,",
    ),
    Fault(
        "cache-shared-new-position", "formula", _SHARED_PREFILL, "share.token(n + torch.arange(", "(n + torch.arange("
    ),
    Fault(
        "cache-shared-sink-per-rank", "sink", _SHARED, "together, scale, None))", "together, scale, self.sink_logits))"
    ),
    Fault("cache-shared-sink-dropped", "sink", _SHARED, "if sink_logits is not None:", "if False:"),
    Fault("cache-shared-sum", "formula", _SHARED, "whole += weight[..., None] * part", "whole += part / len(parts)"),
    Fault("cache-shared-padding", "mask", _SHARED, "if m is not None:  # what", "if False:  # what"),
    Fault("cache-shared-turn", "formula", _SHARED, "values, self.seen[:, None] + own,", "values, held[:, None] + own,"),
    Fault("cache-shared-entered", "state", _SHARED, "held, share.count(after) - held)", "held, share.count(count))"),
    Fault("cache-sink-oldest", "bounds", _CACHE, "torch.maximum(least, self.written - self.places)", "least"),
    Fault(
        "cache-sink-floor",
        "bounds",
        _CACHE,
        "self.written - (places - self.window + 1)",
        "self.written - (places - self.window + 2)",
    ),
    Fault(
        "cache-sink-back-to-sinks",
        "state",
        _CACHE,
        "self.written.copy_(torch.where(left <= sinks, left, self.written))",
        "pass",
    ),
    Fault("cache-sink-for-space", "bounds", _CACHE, "self.seen + coming - self.window", "self.seen - self.window"),
    Fault(
        "cache-sink-keep",
        "bounds",
        _CACHE,
        "if self.window + tokens - 1 > self.places",
        "if self.window + tokens - 2 > self.places",
    ),
    Fault(
        "cache-sink-spare",
        "guard",
        _CACHE,
        "spare = self.places - self.window + 1",
        "spare = self.places - self.window + 2",
    ),
    Fault("cache-sink-pad", "mask", _CACHE, "self.step(q, k, v, width - pad[:, 0])", "self.step(q, k, v)"),
    Fault("cache-sink-pad-lse", "mask", _CACHE, "lse.masked_fill(padding[..., None], -torch.inf)", "lse"),
    Fault("cache-sink-gather", "mask", _CACHE, "torch.where(number < held, number, -1)", "number"),
    Fault("cache-sink-load-alias", "stale", _CACHE, "state[name].to(value.device, copy=True)", "state[name]"),
    Fault("cache-sink-enlarged", "state", _MOVES, "cache.written.add_(share.size * (places - before))", "pass"),
    Fault("cache-sink-evict-turn", "formula", _MOVES, 'side == "k" and cache.key_rope == "post"', "False"),
    Fault(
        "cache-sink-evict-last", "bounds", _MOVES, "number < (lo - oldest)[:, None]", "number <= (lo - oldest)[:, None]"
    ),
    Fault("cache-sink-evict-rise", "state", _MOVES, "torch.minimum(sinks - stay, left)", "torch.zeros_like(left)"),
    Fault("cache-sink-evict-bits", "rounding", _MOVES, "moves = (by != 0)[:, None]", "moves = (by == by)[:, None]"),
    Fault("cache-sink-evict-others", "state", _MOVES, "touched = gone > 0", "touched = gone >= gone.amin()"),
    Fault(
        "cache-sink-prompt-forgotten",
        "mask",
        _PREFILL,
        "torch.maximum(last + 1 - window, cache.first[:, None])",
        "(last + 1 - window)",
    ),
    Fault("cache-sink-prompt-turn", "formula", _PREFILL, "torch.stack([base - gone,", "torch.stack([gone - base,"),
    Fault("cache-sink-prompt-base", "formula", _PREFILL, "base * turned, 0)", "0 * base, 0)"),
    Fault(
        "cache-sink-prompt-lse", "mask", _PREFILL, "result[1].masked_fill(~real[..., None], -torch.inf)", "result[1]"
    ),
    Fault(
        "cache-sink-prompt-gone",
        "bounds",
        _PREFILL,
        "torch.maximum(last + 1 - sinks - window, cache.first[:, None] - sinks)",
        "(last + 1 - sinks - window)",
    ),
    Fault("cache-sink-prompt-padding", "mask", _PREFILL, "real & (a < b)", "(a < b)"),
    Fault(
        "cache-frames-commit",
        "state",
        _FRAMES,
        "self._pending = [None] * len(self.states)\n\n    def _check_block",
        "pass\n\n    def _check_block",
    ),
    Fault(
        "cache-frames-pinned-window",
        "bounds",
        _FRAMES,
        "seen + width - state.window, scale",
        "seen - state.window, scale",
    ),
    Fault("cache-frames-pinned-gap", "formula", _FRAMES, "max(0, begin - first - count) if", "0 if"),
    Fault(
        "cache-frames-pinned-sum", "formula", _FRAMES, "torch.logaddexp(lse, other[1])", "torch.maximum(lse, other[1])"
    ),
    Fault(
        "cache-frames-replay-window",
        "mask",
        _FRAMES,
        "state.first.copy_(state.first.clamp_min(self._replay.start + self._replay.width - state.window))",
        "pass",
    ),
    Fault("cache-frames-failed", "state", _FRAMES, "x.copy_(tensors[name])", "pass"),
    Fault("cache-frames-dropped", "state", _FRAMES, "self._dropped += start", "pass"),
    Fault(
        "cache-columns-of-padding",
        "mask",
        _STATE,
        "return columns if self.late is None else self.late[:, self.late.shape[1] - columns :].sum(1)",
        "return columns",
    ),
    Fault("cache-columns-late", "bounds", _STATE, "[:, -self.slack - 1 :].clone()", "[:, -self.slack + 1 :].clone()"),
    Fault("cache-columns-back", "state", _STATE, "self.late = self.late[:, :-tokens].clone()", "pass"),
    Fault(
        "cache-columns-reset", "state", _STATE, "self.late = self.late & ~mask.to(self.late.device)[:, None]", "pass"
    ),
    Fault("cache-columns-keep", "state", _STATE, "self.cache.keep(self.slack)", "pass"),
    Fault("ops-sink-heads", "guard", _CHECKS, "if q.shape[2] < 1 or q.shape[2] % heads:", "if q.shape[2] < 1:"),
    Fault("ops-sink-count", "guard", _CHECKS, "any(not 0 <= n <= k.shape[1]", "any(not 0 <= n"),
    Fault("ops-sink-ring", "guard", _CHECKS, "if ring < 1:", "if ring < 0:"),
    Fault(
        "ops-sink-scales",
        "guard",
        _CHECKS,
        "if (scale is None) is not (of_ring.dtype is k.dtype):",
        "if of_ring is None:",
    ),
)
