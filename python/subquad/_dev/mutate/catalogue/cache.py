"""Faults of states and caches."""

from __future__ import annotations

from ..fault import Fault, Where

_TESTS = (
    "tests/models/test_rollback.py",
    "tests/models/test_caches.py",
    "tests/package/test_state_laws.py",
    "tests/models/test_lawcat_module.py",
    "tests/models/test_lawcat.py",
)
_LAWCAT = Where("python/subquad/cache/lawcat.py", _TESTS, "", ())
_STATE = Where("python/subquad/cache/state.py", _TESTS, "", ())
_DERIVED = Where(
    "python/subquad/_derived.py",
    ("tests/package/test_kept.py", "tests/models/test_masks.py", "tests/models/test_once.py"),
    "",
    (),
)
_TOKENS = Where("python/subquad/nn/_tokens.py", ("tests/models/test_once.py", "tests/models/test_tokens.py"), "", ())

FAULTS = (
    Fault("cache-derived-written", "stale", _DERIVED, "kept if version == tensor._version else []", "kept"),
    Fault("cache-derived-key-written", "stale", _DERIVED, "key.append(part._version)", "key.append(0)"),
    Fault("cache-derived-itself", "state", _DERIVED, "_ITSELF if part is tensor else part", "part"),
    Fault("cache-tokens-mask", "stale", _TOKENS, "for name in TOLD), mask, *parts)", "for name in TOLD))"),
    Fault(
        "cache-tokens-seen",
        "stale",
        _TOKENS,
        "versioned(batch, length, window, known,",
        "versioned(batch, length, window,",
    ),
    Fault(
        "cache-select-in-place",
        "state",
        _STATE,
        "self.put(name, value.index_select(0, rows.to(value.device)))",
        "self.put(name, value)",
    ),
    Fault("cache-load-alias", "stale", _STATE, "fresh.put(name, value.clone())", "fresh.put(name, value)"),
    Fault("cache-load-keeps-old", "stale", _STATE, "fresh = type(self)()", "fresh = self"),
    Fault("cache-rollback-unchecked", "guard", _STATE, "if not 0 <= tokens <= kept:", "if not 0 <= tokens:"),
    Fault(
        "cache-counters-lost",
        "state",
        _STATE,
        "return {name: getattr(self, name) for name in self.counters} | self.tensors()",
        "return self.tensors()",
    ),
    Fault(
        "cache-derived-class",
        "dispatch",
        _STATE,
        "for kind in type(cache).__mro__:",
        "for kind in type(cache).__mro__[:1]:",
    ),
    Fault("cache-rollback-seen", "state", _LAWCAT, "self.seen = self.seen - tokens", "self.seen = self.seen - 0"),
    Fault(
        "cache-rollback-rows",
        "state",
        _LAWCAT,
        "self.rows = {name: x[:, :left].clone() for name, x in self.rows.items()} if left else {}",
        "self.rows = {}",
    ),
    Fault("cache-rollback-base", "stale", _LAWCAT, "self.base = self.base if left else None", "self.base = self.base"),
    Fault(
        "cache-record-forgets",
        "bounds",
        _LAWCAT,
        "self.base, self.rows = self._after(extra), {name: x[:, extra:].clone() for name, x in self.rows.items()}",
        "self.rows = {name: x[:, extra:].clone() for name, x in self.rows.items()}",
    ),
    Fault(
        "cache-record-real",
        "mask",
        _LAWCAT,
        'other["real"] = torch.ones_like(other["conv_q"][..., 0], dtype=torch.bool)',
        'other["real"] = torch.zeros_like(other["conv_q"][..., 0], dtype=torch.bool)',
    ),
    Fault(
        "cache-tail-window",
        "bounds",
        _LAWCAT,
        "return stream.narrow(along, count, size).clone()",
        "return stream.narrow(along, 0, size).clone()",
    ),
    Fault("cache-tail-late", "state", _LAWCAT, "order = order[:, order.shape[1] - size :]", "order = order[:, :size]"),
    Fault(
        "cache-tail-padding",
        "mask",
        _LAWCAT,
        'real = self.rows.get("real")\n        if real is None:',
        "real = None\n        if real is None:",
    ),
    Fault(
        "cache-after-normalised",
        "state",
        _LAWCAT,
        'sums: Any = self.base.get("s") if self.z is None else (self.base.get("s"), self.base.get("z"))',
        'sums: Any = self.base.get("s") if self.z is None else (self.base.get("s"), self.z)',
    ),
    Fault(
        "cache-reset-rows", "state", _LAWCAT, "value[mask.to(value.device)] = 0", "value[~mask.to(value.device)] = 0"
    ),
    Fault(
        "cache-reset-seen",
        "state",
        _LAWCAT,
        "self.seen = torch.zeros_like(self.seen) if isinstance(self.seen, torch.Tensor) else 0",
        "pass",
    ),
    Fault(
        "cache-reorder",
        "state",
        _LAWCAT,
        "for state in self.states.values():\n            state.select(beam_idx)",
        "for state in list(self.states.values())[:1]:\n            state.select(beam_idx)",
    ),
    Fault(
        "cache-keep-nothing",
        "state",
        _LAWCAT,
        "return self.states.setdefault(layer_idx, LawcatState(depth=self.depth))",
        "return self.states.setdefault(layer_idx, LawcatState())",
    ),
)
