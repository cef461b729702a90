"""Faults of the Triton kernels of Superlinear attention, which the interpreter runs."""

from __future__ import annotations

from ..fault import Fault, Where


def _of(file: str, *stems: str, first: tuple[str, ...] = ("forward", "test_triton", "gradients")) -> Where:
    tests = tuple(f"tests/ops/{stem}" for stem in stems)
    return Where(f"kernels/triton_ops/{file}", tests, "triton", first)


_PAGES = _of("_common/paged.py", "span_search", "span_attention", first=("pages",))
_LISTS = _of("_common/lists.py", "span_search", "span_attention", first=("gradients",))
_SEARCH = _of("span_search.py", "span_search")
_PAIRS = _of("span_attention/pairs.py", "span_attention")
_FORWARD = _of("span_attention/forward.py", "span_attention")
_BACKWARD = _of("span_attention/backward.py", "span_attention", first=("gradients", "test_triton"))
_LAUNCH = _of("span_attention/__init__.py", "span_attention")

FAULTS = (
    Fault("triton-pages-unclamped", "guard", _PAGES, "tl.minimum(tl.maximum(page, 0), x.count - 1).to", "page.to"),
    Fault("triton-pages-place", "stride", _PAGES, "(rows - ((rows >> x.bits) << x.bits))", "rows"),
    Fault("triton-lists-unstable", "formula", _LISTS, "dim=1, stable=True)", "dim=1, descending=True)"),
    # --- the search
    Fault("triton-search-zeros", "formula", _SEARCH, "tl.where(score == 0.0, 0.0, score).to", "score.to"),
    Fault("triton-search-nothing", "nan", _SEARCH, '(score == score) & (score > float("-inf"))', "(score == score)"),
    Fault("triton-search-count", "bounds", _SEARCH, "other=0) <= limits)", "other=0) < limits)"),
    Fault("triton-search-beyond", "bounds", _SEARCH, "(key >= first) & (key < keys)", "(key >= first)"),
    Fault("triton-search-mask-row", "mask", _SEARCH, "reach.key_mask + b * keys + key", "reach.key_mask + key"),
    Fault("triton-search-own", "mask", _SEARCH, "(t[:, None] == token[None, :]) & live[:, None]", "live[:, None]"),
    Fault("triton-search-dead-heads", "nan", _SEARCH, "tl.where(live[:, None], score, 0.0), [BT", "score, [BT"),
    Fault(
        "triton-search-group-score",
        "formula",
        _SEARCH,
        "score = tl.sum(tl.where(chosen, best_score, 0.0), 1)",
        "score = _score_of(top)",
    ),
    Fault("triton-search-ahead", "bounds", _SEARCH, "tl.minimum(anchor + ahead, last)", "anchor + ahead"),
    Fault("triton-search-infinite-query", "nan", _SEARCH, "if nonfinite > 0:", "if nonfinite > 1000:"),
    # --- attention, forward
    Fault("triton-span-last-key", "bounds", _PAIRS, "keys - 1) + 1", "keys - 1)"),
    Fault("triton-span-run", "bounds", _PAIRS, "(tile.stop + BN - 1) // BN", "tile.stop // BN"),
    Fault("triton-span-mask-row", "mask", _PAIRS, "spans.key_mask + b * keys + cols", "spans.key_mask + cols"),
    Fault("triton-span-first-token", "state", _PAIRS, "token = first_token + pair", "token = pair"),
    Fault("triton-span-rescale", "accumulator", _FORWARD, "row_sum * rescale + tl.sum(p, 1)", "row_sum + tl.sum(p, 1)"),
    Fault("triton-span-hidden-values", "nan", _FORWARD, "BDV), 0, CAREFUL)", "BDV), 0, False)"),
    Fault("triton-span-lse", "formula", _FORWARD, "row_max + tl.log2(safe_sum) * LN2", "row_max + tl.log2(safe_sum)"),
    Fault(
        "triton-span-gate",
        "formula",
        _FORWARD,
        "spans.gate + row * FLAGS.SPANS + slot",
        "spans.gate + row * FLAGS.SPANS",
    ),
    Fault("triton-span-base-dropped", "formula", _FORWARD, "acc += total[:, None] * base_out", "acc += 0.0 * base_out"),
    Fault("triton-span-beyond", "bounds", _LAUNCH, "end.clamp(max=keys - 1)", "end.clamp(max=keys)"),
    # --- attention, backward
    Fault("triton-span-longest", "bounds", _LAUNCH, "length.amax()", "length.amin()"),
    Fault("triton-span-reaches", "bounds", _BACKWARD, "- length <= place.first)", "- length < place.first)"),
    Fault("triton-span-dgate-base", "gradient", _BACKWARD, "delta += tl.where(seen, w * of_base, 0.0)", "delta += 0.0"),
    Fault("triton-span-dbase-lse", "gradient", _BACKWARD, "w * (gate * of_base - c)", "w * gate * of_base"),
    Fault("triton-span-dv-gate", "gradient", _BACKWARD, "cast(p * gate[None, :], grad.dtype)", "cast(p, grad.dtype)"),
    Fault(
        "triton-span-dq-mask",
        "mask",
        _BACKWARD,
        "ds = tl.where(seen_of_block(spans, tile, place, cols, keys), ds, 0.0)",
        "ds = tl.where(tile.live[:, None], ds, 0.0)",
    ),
    Fault("triton-span-hidden-keys", "nan", _BACKWARD, "finite_part(b_k, 0, CAREFUL)", "finite_part(b_k, 0, False)"),
)
