"""Faults of the CPU kernels of Superlinear attention: the search for spans, and attention to them."""

from __future__ import annotations

from ..fault import Fault
from .cpu import of

_PAGES = of("common/paged.h", "span_search", "span_attention", first=("pages",))
_STRIPES = of("ops/span_search/cpu_stripes.h", "span_search")
_BEST = of("ops/span_search/cpu_best.h", "span_search")
_CHOSEN = of("ops/span_search/cpu_gradients.h", "span_search", first=("gradients",))
_SEARCH = of("ops/span_search/cpu.isa.cpp", "span_search")

_SPANS = of("ops/span_attention/params.h", "span_attention")
_PAIRS = of("ops/span_attention/cpu_pairs.h", "span_attention")
_SUMS = of("ops/span_attention/cpu_sums.h", "span_attention")
_MANY = of("ops/span_attention/cpu_forward.h", "span_attention")
_FEW = of("ops/span_attention/cpu_pieces.h", "span_attention")
_ITEMS = of("ops/span_attention/cpu.isa.cpp", "span_attention")
_SCORES = of("ops/span_attention/cpu_backward_scores.h", "span_attention", first=("gradients", "backward"))
_QUERIES = of("ops/span_attention/cpu_backward_queries.h", "span_attention", first=("gradients", "backward"))
_GROUPS = of("ops/span_attention/cpu_backward_pairs.h", "span_attention", first=("gradients", "backward"))
_KEYS = of("ops/span_attention/cpu_backward_keys.h", "span_attention", first=("gradients", "backward"))

FAULTS = (
    Fault(
        "cpu-pages-place", "stride", _PAGES, "(int64_t{1} << rows.page_bits) - 1", "(int64_t{1} << rows.page_bits) - 2"
    ),
    Fault(
        "cpu-pages-unclamped",
        "guard",
        _PAGES,
        "clamp(rows.table[b * rows.pages_per_row + (j >> rows.page_bits)], 0, rows.page_count - 1)",
        "rows.table[b * rows.pages_per_row + (j >> rows.page_bits)]",
    ),
    # --- the search
    Fault(
        "cpu-search-last-slot",
        "formula",
        _BEST,
        "if (!(new_rank > rank[spans - 1])) return;",
        "if (new_rank < rank[spans - 1]) return;",
    ),
    Fault("cpu-search-nearer", "formula", _BEST, "i > 0 && new_rank > rank[i - 1]", "i > 0 && new_rank >= rank[i - 1]"),
    Fault("cpu-search-behind", "bounds", _BEST, "larger(anchor - back, first)", "larger(anchor - back, 0)"),
    Fault("cpu-search-ahead", "bounds", _BEST, "smaller(anchor + ahead, last)", "anchor + ahead"),
    Fault("cpu-search-first", "mask", _STRIPES, "key < larger(p_.first[token], 0) ||", "key < 0 ||"),
    Fault("cpu-search-mask-row", "mask", _STRIPES, "p_.key_mask[b_ * p_.keys + key]", "p_.key_mask[key]"),
    Fault(
        "cpu-search-farthest", "bounds", _STRIPES, "p_.offsets[end - 1] > farthest", "p_.offsets[end - 1] >= farthest"
    ),
    Fault(
        "cpu-search-farthest-of-the-last",
        "bounds",
        _STRIPES,
        "farthest = larger(farthest, p_.position[token]",
        "farthest = larger(0, p_.position[token]",
    ),
    Fault(
        "cpu-search-group-score",
        "formula",
        _STRIPES,
        "p_.per_group ? sum : scores[g], scores[g], anchor",
        "p_.per_group ? sum : scores[g], p_.per_group ? sum : scores[g], anchor",
    ),
    Fault(
        "cpu-search-tail",
        "bounds",
        _STRIPES,
        "std::memcpy(last[i], rows[i] + c, static_cast<size_t>(p_.d - c)",
        "std::memcpy(last[i], rows[i] + c, static_cast<size_t>(p_.d - c - 1)",
    ),
    Fault(
        "cpu-search-range-order",
        "formula",
        _SEARCH,
        "for (int64_t range = ranges(p) - 1; range >= 0; --range)",
        "for (int64_t range = 0; range < ranges(p); ++range)",
    ),
    Fault(
        "cpu-search-range-end",
        "bounds",
        _SEARCH,
        "all > 1 ? smaller(p.stripes, begin + kRangeStripes) : p.stripes",
        "p.stripes",
    ),
    Fault("cpu-search-dk-begin", "bounds", _CHOSEN, "for (int64_t i = j == 0 ? 0", "for (int64_t i = j == begin ? 0"),
    Fault(
        "cpu-search-slot-head", "stride", _CHOSEN, "sequence % p.kv_heads * group + row", "sequence % p.kv_heads + row"
    ),
    Fault("cpu-search-no-anchor", "guard", _CHOSEN, "anchor >= 0 && anchor < p.keys", "anchor < p.keys"),
    # --- attention, forward
    Fault(
        "cpu-span-last-key", "bounds", _SPANS, "clamp(int64_t{p.end[at]} + 1, 0, p.keys)", "clamp(p.end[at], 0, p.keys)"
    ),
    Fault("cpu-span-full", "mask", _PAIRS, "pair.begin <= key_ && pair.end >= key_ + kKeys", "pair.begin <= key_"),
    Fault("cpu-span-last-tile", "bounds", _PAIRS, "pair.end > key_ + kKeys)", "pair.end > key_ + kKeys + 1)"),
    Fault("cpu-span-whole", "mask", _PAIRS, "whole &= mask[j];", "whole &= mask[0];"),
    Fault("cpu-span-mask-row", "mask", _PAIRS, "p.key_mask + b * p.keys + key", "p.key_mask + key"),
    Fault("cpu-span-hull", "bounds", _PAIRS, "end = larger(end, clamp(", "end = larger(0, clamp("),
    Fault(
        "cpu-span-first-tile",
        "stale",
        _MANY,
        "if (pairs[i].begin >= key) zero_words",
        "if (pairs[i].begin > key) zero_words",
    ),
    Fault("cpu-span-padding-row", "accumulator", _MANY, "i < count ? out_ + id * cols_ : spare_", "out_ + id * cols_"),
    Fault("cpu-span-rescale", "accumulator", _MANY, "sum = vec_mul(sum, vec_set(factor));", ""),
    Fault("cpu-span-rescale-values", "accumulator", _MANY, "scale_row(out_ + slot * cols_, cols_, factor);", ""),
    Fault("cpu-span-hidden-values", "nan", _MANY, "if (finite_) {", "if (true) {"),
    Fault("cpu-span-few-rescale", "accumulator", _FEW, "keys.sum *= factor, keys.top", "keys.top"),
    Fault("cpu-span-few-mask", "mask", _FEW, "if (p.key_mask != nullptr && !p.key_mask[b * p.keys + j]) continue;", ""),
    Fault("cpu-span-few-padding", "accumulator", _FEW, "for (int64_t j = count; j < padded; ++j) x[j] = kNothing;", ""),
    Fault("cpu-span-few-head", "stride", _FEW, "kv_head = h / (p.heads / p.kv_heads)", "kv_head = h % p.kv_heads"),
    Fault("cpu-span-piece-end", "bounds", _ITEMS, "smaller(span.end, begin + keys)", "begin + keys"),
    Fault("cpu-span-piece-top", "formula", _SUMS, "more = exp_of(other.top - shift);", "more = 1.0f;"),
    Fault("cpu-span-base-dropped", "formula", _SUMS, "based_ ? exp_of(base_lse_ - shift) : 0.0f", "0.0f"),
    Fault("cpu-span-base-unread", "nan", _SUMS, "based_ = base_lse_ != kNothing;", "based_ = p.base_lse != nullptr;"),
    Fault("cpu-span-lse", "formula", _SUMS, "shift + logf(total)", "shift + log2f(total)"),
    Fault("cpu-span-gate", "formula", _SUMS, "p_.gate[at_ * p_.spans + slot]", "p_.gate[at_ * p_.spans]"),
    Fault("cpu-span-nothing", "nan", _SUMS, "top == kNothing ? 0.0f : top", "top"),
    # --- attention, backward
    Fault("cpu-span-grad-seen", "mask", _SCORES, "(place < end_[i])", "(place <= end_[i])"),
    Fault("cpu-span-dgate-base", "gradient", _QUERIES, "e * norm + weight * norm * to_base_[row]", "e * norm"),
    Fault(
        "cpu-span-dbase-lse",
        "gradient",
        _QUERIES,
        "weight * (gate * to_base_[row] - *c)",
        "weight * gate * to_base_[row]",
    ),
    Fault(
        "cpu-span-dq-scale",
        "gradient",
        _QUERIES,
        "dbase_lse = 0.0f, factor = p_.scale;",
        "dbase_lse = 0.0f, factor = 1.0f;",
    ),
    Fault("cpu-span-longest", "bounds", _GROUPS, "before((first - *longest_) / kCell * kCell)", "before(first)"),
    Fault("cpu-span-dv-gate", "gradient", _KEYS, "scores_.factor[i] = gate * norm", "scores_.factor[i] = norm"),
)
