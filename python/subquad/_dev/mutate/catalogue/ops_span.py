"""Faults of what Superlinear attention does around its kernels: positions, tables, gates, the step."""

from __future__ import annotations

from ..fault import Fault, Where


def _of(file: str, *tests: str) -> Where:
    return Where(f"python/subquad/{file}", tests, "not triton and not simt", ())


_BOTH = ("tests/ops/span_search", "tests/ops/span_attention")
_REACH = _of("ops/_spans.py", *_BOTH)
_SPANS = _of("ops/span_attention.py", "tests/ops/span_attention")
_RECIPE = _of("recipes/superlinear.py", "tests/ops/span_attention")
_CONFIG = _of("superlinear.py", *_BOTH)
_SEARCH_ORACLE = _of("reference/span_search.py", *_BOTH)
_SPANS_ORACLE = _of("reference/span_attention.py", "tests/ops/span_attention")

FAULTS = (
    # --- what a query may reach
    Fault("ops-reach-seen", "formula", _REACH, "(position + 1 - first).clamp(min=0)", "position + 1"),
    Fault(
        "ops-reach-last",
        "bounds",
        _REACH,
        "(position - config.window_len()).clamp",
        "(position - config.window_len() + 1).clamp",
    ),
    Fault(
        "ops-reach-overflow",
        "index width",
        _REACH,
        "(torch.minimum(x, seen) for x in",
        "(x for x in",
        "every search adds lengths to places in 64 bits, and cuts spans to the first key and the window",
    ),
    Fault(
        "ops-reach-packed", "mask", _REACH, "packed.int32[packed.sequence.long()][None]", "torch.zeros_like(position)"
    ),
    Fault(
        "ops-reach-padding", "mask", _REACH, "mask.int().argmax(1, keepdim=True)", "mask.int().argmin(1, keepdim=True)"
    ),
    Fault(
        "ops-reach-default",
        "formula",
        _REACH,
        "torch.arange(keys - tokens, keys, dtype",
        "torch.arange(0, tokens, dtype",
    ),
    Fault("ops-reach-beyond", "guard", _REACH, "if low < 0 or high >= keys:", "if low < 0 or high > keys:"),
    Fault(
        "ops-reach-window",
        "mask",
        _REACH,
        "torch.maximum(ends - config.window_len(), reached.first)",
        "ends - config.window_len()",
    ),
    Fault(
        "ops-reach-holes", "mask", _REACH, "stop.masked_fill(mask[:, None], 0), stop", "torch.zeros_like(stop), stop"
    ),
    Fault("ops-reach-page", "guard", _REACH, "if k.shape[1] & (k.shape[1] - 1):", "if not k.shape[1]:"),
    # --- attention to spans
    Fault("ops-span-slots", "stride", _SPANS, "base_lse.repeat_interleave(spans, 2)", "base_lse.repeat(1, 1, spans)"),
    Fault(
        "ops-span-window",
        "bounds",
        _SPANS,
        "reached.position - (config.window_len() - 1)",
        "reached.position - config.window_len()",
    ),
    Fault(
        "ops-span-window-first",
        "mask",
        _SPANS,
        "(config.window_len() - 1), reached.first)",
        "(config.window_len() - 1), 0 * reached.first)",
        "keys before the first of a row are masked",
    ),
    Fault("ops-span-pages", "guard", _SPANS, '_checks.no_gradient(name, x, "pages are for decoding")', "pass"),
    Fault("ops-span-narrow", "index width", _SPANS, "x.clamp(-1, limit).int()", "x.int()"),
    # --- Superlinear attention and its step
    Fault(
        "recipe-gate-infinite", "nan", _RECIPE, "found.score.clamp(max=limit).masked_fill", "found.score.masked_fill"
    ),
    Fault("recipe-gate-nothing", "nan", _RECIPE, "score.masked_fill(nothing, 0.0)", "score"),
    Fault(
        "recipe-search-keys",
        "dispatch",
        _RECIPE,
        "search(q_search, search_keys, config, reached, keys, mask, None",
        "search(q_search, k, config, reached, keys, mask, None",
    ),
    Fault(
        "recipe-step-follow",
        "formula",
        _RECIPE,
        "given[:, None] + torch.arange(tokens, device=q.device)",
        "given[:, None].expand(batch, tokens)",
    ),
    Fault("recipe-step-lens", "guard", _RECIPE, "given >= (keys if lens is None else lens[:, None])", "given >= keys"),
    Fault(
        "recipe-step-padding",
        "mask",
        _RECIPE,
        "_spans.first_key(mask, q.device), keys)",
        "_spans.first_key(None, q.device), keys)",
    ),
    Fault(
        "recipe-step-mask",
        "mask",
        _RECIPE,
        "span_window(q, k, v, config, reached, mask,",
        "span_window(q, k, v, config, reached, None,",
    ),
    Fault(
        "recipe-combine-base",
        "formula",
        _RECIPE,
        "gate, base_out, base_lse)[0].to(out.dtype)",
        "gate, None, None)[0].to(out.dtype)",
    ),
    # --- powers, tables, lengths, gaps
    Fault(
        "superlinear-offset-rounded", "rounding", _CONFIG, "int(float(i) ** exponent)", "round(float(i) ** exponent)"
    ),
    Fault(
        "superlinear-window",
        "bounds",
        _CONFIG,
        "_offset(self.sw_index + 1, self.exponent) - 1, _INT32",
        "_offset(self.sw_index + 1, self.exponent), _INT32",
    ),
    Fault(
        "superlinear-table-index",
        "bounds",
        _CONFIG,
        "numbers = _offsets_of_capacity(exponent, capacity)[sw_index:]",
        "numbers = _offsets_of_capacity(exponent, capacity)[sw_index + 1 :]",
    ),
    Fault("superlinear-table-key", "stale", _CONFIG, "key = (stripes, capacity, device)", "key = (stripes, 0, device)"),
    Fault("superlinear-capacity", "bounds", _CONFIG, "while capacity < tokens:", "while 2 * capacity < tokens:"),
    Fault(
        "superlinear-table-traced",
        "dispatch",
        _CONFIG,
        "torch.empty(len(_offsets_of_capacity(exponent, capacity)[sw_index:])",
        "torch.empty(len(_offsets_of_capacity(exponent, capacity))",
    ),
    Fault("superlinear-length-whole", "rounding", _CONFIG, "torch.where(whole, nearest, x.ceil())", "x.ceil()"),
    Fault("superlinear-length-large", "index width", _CONFIG, "x.double().clamp(max=_INT32).int()", "x.int()"),
    Fault(
        "superlinear-length-single",
        "rounding",
        _CONFIG,
        "tokens_seen.float() ** config.span_power",
        "tokens_seen.double() ** config.span_power",
    ),
    Fault("superlinear-max-keys", "bounds", _CONFIG, "+ min(t, self.window_len())", "+ self.window_len()"),
    Fault("superlinear-gaps-back", "bounds", _CONFIG, "(max(0, anchor - back),", "(max(0, anchor - back + 1),"),
    Fault(
        "superlinear-gaps-end",
        "bounds",
        _CONFIG,
        "return gaps + ([(reached, t)] if reached < t else [])",
        "return gaps",
    ),
    Fault("superlinear-warned", "state", _CONFIG, "_warned.add(config)", "pass"),
    Fault(
        "superlinear-enough",
        "formula",
        _CONFIG,
        "config.span_power >= 1 - 1 / config.exponent and",
        "config.span_power > 0 and",
    ),
    # --- what all of them are compared with
    Fault("reference-search-nearer", "formula", _SEARCH_ORACLE, "offsets.long().flip(0)  #", "offsets.long()  #"),
    Fault("reference-search-nan", "nan", _SEARCH_ORACLE, "| rank.isnan(), -torch.inf)", ", -torch.inf)"),
    Fault("reference-spans-last-key", "bounds", _SPANS_ORACLE, "(start, end.long() + 1)", "(start, end.long())"),
    Fault(
        "reference-spans-base-unread",
        "nan",
        _SPANS_ORACLE,
        "torch.where((base_lse > -torch.inf)[..., None], base_out, 0.0)",
        "base_out",
    ),
    Fault(
        "reference-spans-joint-base",
        "formula",
        _SPANS_ORACLE,
        "weight.sum(-1, keepdim=True)) + base",
        "weight.sum(-1, keepdim=True) - base) + base",
    ),
)
