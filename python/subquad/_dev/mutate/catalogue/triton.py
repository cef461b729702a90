"""Faults of the Triton kernels, which the interpreter runs."""

from __future__ import annotations

from ..fault import Fault, Where, tests_of


def _of(file: str, *stems: str, first: tuple[str, ...] = ("forward", "gradients")) -> Where:
    return Where(f"kernels/triton_ops/{file}", tests_of(*stems), "triton", first)


_ACTIVATIONS = _of("_common/activations.py", "cats_activation", "cats_mlp")
_CHECKS = _of("_common/checks.py", "cats_activation", "cats_mlp", first=("errors", "refuse", "launcher"))
_CONVOLUTION = _of("_common/convolution.py", "causal_conv1d", "conv_feature_map")
_FEATURES = _of("_common/features.py", "feature_map", "conv_feature_map")
_NUMERICS = _of("_common/numerics.py", "cats_activation", "cats_mlp")
_TOKEN = _of("_common/linear.py", "gated_linear_attention", "lawcat_decode_step")
_GLU = _of("cats_activation.py", "cats_activation")
_MLP = _of("cats_mlp.py", "cats_mlp")
_CONV_FWD = _of("causal_conv1d/forward.py", "causal_conv1d")
_CONV_BWD = _of("causal_conv1d/backward.py", "causal_conv1d")
_CONV_TILE = _of("causal_conv1d/layout.py", "causal_conv1d")
_CONV = _of("causal_conv1d/__init__.py", "causal_conv1d")
_CONV_MAP = _of("conv_feature_map.py", "conv_feature_map")
_MAP = _of("feature_map.py", "feature_map")
_ATTENTION_FWD = _of("interval_attention/forward.py", "interval_attention")
_ATTENTION_BWD = _of("interval_attention/backward.py", "interval_attention")
_PAIRS = _of("interval_attention/pairs.py", "interval_attention")
_TILES = _of("interval_attention/tiles.py", "interval_attention")
_ARGUMENTS = _of("interval_attention/arguments.py", "interval_attention")
_ATTENTION = _of("interval_attention/__init__.py", "interval_attention")
_GLA_FWD = _of("gated_linear_attention/forward.py", "gated_linear_attention")
_GLA_BWD = _of("gated_linear_attention/backward.py", "gated_linear_attention")
_GLA_GRADS = _of("gated_linear_attention/gradients.py", "gated_linear_attention")
_GLA_CHUNK = _of("gated_linear_attention/chunk.py", "gated_linear_attention")
_GLA = _of("gated_linear_attention/__init__.py", "gated_linear_attention")
_DECODE = _of("lawcat_decode_step.py", "lawcat_decode_step")

FAULTS = (
    # --- shared
    Fault(
        "triton-gelu-grad",
        "gradient",
        _ACTIVATIONS,
        "+ x * INV_SQRT_2PI * tl.exp(-0.5 * x * x)",
        "+ x * INV_SQRT_2PI * tl.exp(-x * x)",
    ),
    Fault(
        "triton-active-nan", "nan", _ACTIVATIONS, "return (tl.abs(s) <= threshold) == 0", "return tl.abs(s) > threshold"
    ),
    Fault(
        "triton-packed-unchecked",
        "guard",
        _CHECKS,
        "tensor.shape == shape and tensor.dtype == like.dtype and tensor.is_contiguous()",
        "tensor.shape == shape and tensor.dtype == like.dtype",
    ),
    Fault("triton-bf16-truncates", "rounding", _NUMERICS, "bits + 0x7FFF + ((bits >> 16) & 1)", "bits"),
    Fault(
        "triton-token-not-stored",
        "state",
        _TOKEN,
        "tl.store(s_ptr + at, state, mask)",
        "tl.store(s_ptr + at, state, mask & (rows == 0)[:, None])",
    ),
    Fault(
        "triton-token-padding",
        "bounds",
        _TOKEN,
        "mask = some[:, None] & (cols < dv)[None, :]",
        "mask = some[:, None] & (cols <= dv)[None, :]",
    ),
    # --- CATS
    Fault(
        "triton-glu-threshold",
        "stride",
        _GLU,
        "tl.load(threshold_ptr + c.to(tl.int64) * threshold_stride, c < cols, other=0.0)",
        "tl.load(threshold_ptr + c.to(tl.int64) * 0, c < cols, other=0.0)",
    ),
    Fault(
        "triton-glu-columns",
        "bounds",
        _GLU,
        "(r < rows)[:, None] & (c < cols)[None, :], threshold[None, :]",
        "(r < rows)[:, None] & (c < cols - 1)[None, :], threshold[None, :]",
    ),
    Fault(
        "triton-glu-du",
        "gradient",
        _GLU,
        "tl.where(active, grad * s, 0.0), mask)",
        "tl.where(active, grad, 0.0), mask)",
    ),
    Fault(
        "triton-mlp-word",
        "mask",
        _MLP,
        "word = tl.sum(active.to(tl.int32) << group.lane[:, None], axis=0)",
        "word = tl.max(active.to(tl.int32) << group.lane[:, None], axis=0)",
    ),
    Fault(
        "triton-mlp-union-group",
        "mask",
        _MLP,
        "bits_ptr + tl.minimum(g, group.count - 1) * inner + neurons",
        "bits_ptr + group.index * inner + neurons",
    ),
    Fault(
        "triton-mlp-up-dead",
        "mask",
        _MLP,
        "tl.store(ptrs, tl.load(ptrs, active, other=0.0) * u, active)",
        "tl.store(ptrs, tl.load(ptrs, active, other=0.0) * u, group.live[:, None] & need[None, :])",
        "an entry that is not active is masked again where it is read: what stands there is never used",
    ),
    Fault(
        "triton-mlp-span",
        "bounds",
        _MLP,
        "stop = tl.minimum(begin + span, inner)",
        "stop = tl.minimum(begin + span - 1, inner)",
    ),
    Fault(
        "triton-mlp-inf-leaks",
        "nan",
        _MLP,
        "if tl.min(tl.min(is_finite(acc).to(tl.int32), axis=1), axis=0) == 0:",
        "if False:",
    ),
    Fault(
        "triton-mlp-splits",
        "accumulator",
        _MLP,
        "(split < splits)[:, None] & in_cols[None, :]",
        "(split < splits - 1)[:, None] & in_cols[None, :]",
    ),
    Fault(
        "triton-mlp-down-stride",
        "stride",
        _MLP,
        "down = Matrix(w_down, w_down.stride(1 if neuron_major else 0), None)",
        "down = Matrix(w_down, h if neuron_major else i, None)",
    ),
    # --- causal convolution
    Fault(
        "triton-conv-tap-crosses",
        "mask",
        _CONVOLUTION,
        "inside = (tokens.before >= J)[:, None]",
        "inside = (tokens.rows >= J)[:, None]",
    ),
    Fault("triton-conv-slot", "state", _CONVOLUTION, "slot = TAPS - 1 - J + tokens.before", "slot = TAPS - 1 - J"),
    Fault(
        "triton-conv-place-trusts",
        "guard",
        _CONVOLUTION,
        "n = tl.minimum(tl.maximum(n, 0), sequences - 1).to(tl.int64)",
        "n = n.to(tl.int64)",
    ),
    Fault(
        "triton-conv-rows",
        "bounds",
        _CONV_TILE,
        "(rows < time)[:, None] & (c < width)[None, :]",
        "(rows < time - 1)[:, None] & (c < width)[None, :]",
    ),
    Fault(
        "triton-conv-batch",
        "stride",
        _CONV_TILE,
        "return (i // tiles).to(tl.int64), tile,",
        "return (i % tiles).to(tl.int64), tile,",
    ),
    Fault(
        "triton-conv-residual-stride",
        "stride",
        _CONV_FWD,
        "offsets = rows.to(tl.int64)[:, None] * residual.stride_t + c[None, :]",
        "offsets = rows.to(tl.int64)[:, None] * conv.channels + c[None, :]",
    ),
    Fault(
        "triton-conv-final",
        "state",
        _CONV_FWD,
        "past = tl.load(conv.state + base + k + length,",
        "past = tl.load(conv.state + base + k,",
    ),
    Fault("triton-conv-ring-position", "state", _CONV_FWD, "slot = zero + position + t\n", "slot = zero + t\n"),
    Fault(
        "triton-conv-update-skip", "guard", _CONV_FWD, "live = (n >= 0) & (n < state.count)", "live = n < state.count"
    ),
    Fault(
        "triton-conv-dx-later",
        "gradient",
        _CONV_BWD,
        "late = mask & (tokens.left > j)[:, None]",
        "late = mask & (tokens.left >= j)[:, None]",
    ),
    Fault(
        "triton-conv-dbias",
        "gradient",
        _CONV_BWD,
        "tl.sum(tl.where(mask, dz, 0.0), 0), used)",
        "tl.sum(tl.where(mask, dz, 0.0), 0) * 0.5, used)",
    ),
    Fault(
        "triton-conv-partials",
        "accumulator",
        _CONV_BWD,
        "for k in range(blocks):\n        total +=",
        "for k in range(tl.minimum(blocks, 1)):\n        total +=",
    ),
    Fault(
        "triton-conv-dstate-through",
        "gradient",
        _CONV_BWD,
        "through = used & (lengths <= k)",
        "through = used & (lengths < k)",
    ),
    Fault(
        "triton-conv-back-tiles",
        "bounds",
        _CONV,
        "tiles = triton.cdiv(time, BACK_ROWS)",
        "tiles = max(1, time // BACK_ROWS)",
    ),
    Fault("triton-conv-map-silu", "formula", _CONV_MAP, "if SILU:\n        z = activate(z, 0)\n    return", "return"),
    Fault(
        "triton-conv-map-channel",
        "bounds",
        _CONV_MAP,
        "mask = live[:, None] & (k < d)[None, :]",
        "mask = live[:, None] & (k < d - 1)[None, :]",
    ),
    Fault(
        "triton-conv-map-sharing",
        "stride",
        _CONV_MAP,
        "y = Projection(fm_weight, heads, heads // max(1, maps), f, least(kind, eps))",
        "y = Projection(fm_weight, heads, 1, f, least(kind, eps))",
    ),
    # --- feature maps
    Fault(
        "triton-map-joint",
        "formula",
        _FEATURES,
        "row_max_down = row_max\n            up",
        "row_max_down = row_max + 1.0\n            up",
    ),
    Fault("triton-map-clamp", "gradient", _FEATURES, "g = tl.where(up < eps, 0.0, g)", "g = g"),
    Fault("triton-map-elu-slope", "gradient", _FEATURES, "return tl.where(y > 0.0, 1.0, value)", "return value"),
    Fault("triton-map-half", "stride", _FEATURES, "tl.store(out + f, cast(", "tl.store(out + f - 1, cast("),
    Fault(
        "triton-map-reduce",
        "gradient",
        _FEATURES,
        "first = (index * sharing + h) * entries + (at - index * entries)",
        "first = (index * sharing) * entries + (at - index * entries)",
    ),
    Fault(
        "triton-map-dx-block",
        "bounds",
        _FEATURES,
        "for start in range(0, D, BK):\n        k = start + tl.arange(0, BK)\n        w = tl.load(w_ptr",
        "for start in range(0, D - BK, BK):\n        k = start + tl.arange(0, BK)\n        w = tl.load(w_ptr",
    ),
    Fault(
        "triton-map-batch-rows",
        "stride",
        _MAP,
        "token = (rows - batch * time).to(tl.int64)",
        "token = rows.to(tl.int64)",
    ),
    Fault(
        "triton-map-chunk",
        "bounds",
        _MAP,
        "tl.minimum(rows, (part + 1) * chunk), BM):",
        "tl.minimum(rows, (part + 1) * chunk) - 1, BM):",
    ),
    # --- interval attention
    Fault(
        "triton-attention-sink-dropped",
        "sink",
        _ATTENTION_FWD,
        'row_sum = tl.where(row_max == float("-inf"), 0.0, 1.0 + (row_max - row_max))',
        "row_sum = tl.zeros([BM], tl.float32)",
    ),
    Fault(
        "triton-attention-sink-doubled",
        "sink",
        _ATTENTION_FWD,
        "0.0, 1.0 + (row_max - row_max))",
        "0.0, 2.0 + (row_max - row_max))",
    ),
    Fault(
        "triton-attention-rescale",
        "accumulator",
        _ATTENTION_FWD,
        "return acc, new_max, row_sum * rescale + tl.sum(p, 1), nonfinite",
        "return acc, new_max, row_sum + tl.sum(p, 1), nonfinite",
    ),
    Fault(
        "triton-attention-full-tiles",
        "bounds",
        _ATTENTION_FWD,
        "for n in range(tiles.masked, tiles.count):",
        "for n in range(tiles.masked, tiles.count - 1):",
    ),
    Fault("triton-attention-nan", "nan", _ATTENTION_FWD, "if nonfinite > 0:", "if nonfinite > 1:"),
    Fault(
        "triton-attention-lse",
        "formula",
        _ATTENTION_FWD,
        'tl.where(empty, float("-inf"), row_max + log_sum), rows < tq)',
        'tl.where(empty, float("-inf"), log_sum), rows < tq)',
    ),
    Fault(
        "triton-attention-delta",
        "gradient",
        _ATTENTION_BWD,
        " - tl.load(grads.lse + row, live, other=0.0)  # [BM]",
        "  # [BM]",
    ),
    Fault(
        "triton-attention-dq-scale",
        "gradient",
        _ATTENTION_BWD,
        "cast(dq * scale, dq_ptr.dtype.element_ty)",
        "cast(dq * scale2, dq_ptr.dtype.element_ty)",
    ),
    Fault("triton-attention-dv-hidden", "gradient", _ATTENTION_BWD, "p = tl.where(keep, p, 0.0)", "p = p"),
    Fault(
        "triton-attention-group",
        "gradient",
        _ATTENTION_BWD,
        "h = kv_head * FLAGS.GROUP + g",
        "h = kv_head * FLAGS.GROUP",
    ),
    Fault("triton-attention-dbias", "gradient", _ATTENTION_BWD, "dbias += tl.sum(ds, 1)", "dbias = tl.sum(ds, 1)"),
    Fault(
        "triton-attention-cap-slope",
        "gradient",
        _ATTENTION_BWD,
        "    if FLAGS.CAPPED:\n        ds *= cap_slope(capped, terms)\n    if MASKED:",
        "    if MASKED:",
    ),
    Fault(
        "triton-attention-cap-slope-keys",
        "gradient",
        _ATTENTION_BWD,
        "ds *= cap_slope(capped, terms)\n        if",
        "if",
    ),
    Fault(
        "triton-attention-dbias-capped",
        "gradient",
        _ATTENTION_BWD,
        "dbias += tl.sum(ds, 1)",
        "dbias += tl.sum(ds * cap_slope(capped, terms), 1)",
    ),
    Fault(
        "triton-attention-hidden-cap-slope",
        "nan",
        _ATTENTION_BWD,
        "ds = tl.where(keep, ds, 0.0)  # not 0 * NaN",
        "ds = ds",
    ),
    Fault(
        "triton-attention-distance",
        "formula",
        _PAIRS,
        "own = tl.expand_dims(rows + (mask.tk - mask.tq), R)",
        "own = tl.expand_dims(rows + mask.tk, R)",
    ),
    Fault(
        "triton-attention-slope-batch",
        "stride",
        _ARGUMENTS,
        "tl.load(mask.alibi_slopes + b * mask.slope_stride_b + h)",
        "tl.load(mask.alibi_slopes + h)",
    ),
    Fault(
        "triton-attention-slope-head",
        "stride",
        _ATTENTION_BWD,
        "        terms = ScoreTerms(scale, softcap, slope_of_head(mask, b, h))\n        bias",
        "        terms = ScoreTerms(scale, softcap, slope_of_head(mask, b, kv_head))\n        bias",
    ),
    Fault("triton-attention-window", "mask", _PAIRS, "(i - j < mask.window)", "(i - j <= mask.window)"),
    Fault(
        "triton-attention-sink-tokens",
        "sink",
        _PAIRS,
        "keep = keep & ((j < mask.sink_tokens) | (i - j < mask.window))",
        "keep = keep & (i - j < mask.window)",
    ),
    Fault(
        "triton-attention-lifetime",
        "mask",
        _PAIRS,
        "keep = keep & (t >= first) & (t < last)",
        "keep = keep & (t > first) & (t < last)",
    ),
    Fault(
        "triton-attention-offset-width",
        "index width",
        _PAIRS,
        "offsets = rows.to(tl.int64)[:, None] * x.stride + cols[None, :]",
        "offsets = rows[:, None] * x.stride.to(tl.int32) + cols[None, :]",
    ),
    Fault(
        "triton-attention-empty-rows", "nan", _PAIRS, 'live, other=float("inf")) * LOG2E', "live, other=0.0) * LOG2E"
    ),
    Fault(
        "triton-tiles-window",
        "bounds",
        _TILES,
        "low = tl.maximum(sink_tiles, tl.maximum(i0 - mask.window + 1, 0) // BN)",
        "low = tl.maximum(sink_tiles, tl.cdiv(tl.maximum(i0 - mask.window + 1, 0), BN))",
    ),
    Fault(
        "triton-tiles-sinks",
        "sink",
        _TILES,
        "sink_tiles = tl.minimum(tl.cdiv(mask.sink_tokens, BN), high)",
        "sink_tiles = tl.minimum(mask.sink_tokens // BN, high)",
    ),
    Fault(
        "triton-tiles-full",
        "mask",
        _TILES,
        "full_low = tl.cdiv(tl.maximum(i1 - mask.window + 1, 0), BN)",
        "full_low = tl.cdiv(tl.maximum(i0 - mask.window + 1, 0), BN)",
    ),
    Fault(
        "triton-tiles-rows-window",
        "bounds",
        _TILES,
        "high = tl.minimum(tiles, tl.maximum(last, -1) // BM + 1)",
        "high = tl.minimum(tiles, tl.maximum(last, -1) // BM)",
    ),
    Fault(
        "triton-tiles-plan-half",
        "mask",
        _TILES,
        "count = masked + tl.load(plan.counts + 2 * entry + 1) * SUB",
        "count = masked",
    ),
    Fault(
        "triton-tiles-per-key",
        "mask",
        _ATTENTION,
        "PER_KEY=key_start is not None or key_bias is not None,",
        "PER_KEY=key_bias is not None,",
    ),
    Fault(
        "triton-attention-plan-swapped",
        "mask",
        _ATTENTION,
        "(Plan(*plan[:2]), Plan(*plan[2:]))",
        "(Plan(*plan[2:]), Plan(*plan[:2]))",
    ),
    Fault(
        "triton-attention-key-stride",
        "stride",
        _ARGUMENTS,
        "b * mask.key_stride_b + h.to(tl.int64) * mask.key_stride_h,",
        "b * mask.key_stride_b + h.to(tl.int64) * mask.bias_stride_h,",
    ),
    # --- linear attention
    Fault(
        "triton-gla-final-state",
        "state",
        _GLA_FWD,
        "tl.store(final.s + tile, state, inside)",
        "tl.store(final.s + tile, tl.zeros([BK, BV], tl.float32), inside)",
    ),
    Fault(
        "triton-gla-walked-late",
        "state",
        _GLA_FWD,
        "z = (z * tl.exp2(g_mid) + tl.sum(b_k, 0)) * tl.exp2(g_last)",
        "z = z * tl.exp2(g_mid) + tl.sum(b_k, 0) * tl.exp2(g_last)",
    ),
    Fault(
        "triton-gla-diagonal",
        "mask",
        _GLA_FWD,
        "tl.where(order[:, None] >= order[None, :], scores, 0.0), FLAGS)  # [C, C]",
        "tl.where(order[:, None] > order[None, :], scores, 0.0), FLAGS)  # [C, C]",
    ),
    Fault("triton-gla-eps", "formula", _GLA_FWD, "out = out / (den + eps)[:, None]", "out = out / den[:, None]"),
    Fault(
        "triton-gla-step-z",
        "state",
        _GLA_FWD,
        "tl.store(state.z + own * dk + chan, z, inside)",
        "tl.store(state.z + own * dk + chan, z, inside & (chan > 0))",
    ),
    Fault("triton-gla-step-skip", "guard", _GLA_FWD, "out = tl.where(used, out, 0.0)", "out = out"),
    Fault(
        "triton-gla-bounds",
        "guard",
        _GLA_CHUNK,
        "start = tl.minimum(tl.maximum(tl.load(sequences.cu_seqlens + n), 0), tokens)",
        "start = tl.load(sequences.cu_seqlens + n)",
    ),
    Fault(
        "triton-gla-min-gate",
        "guard",
        _GLA_CHUNK,
        "g = tl.where(g < MIN_GATE, MIN_GATE, g) * LOG2E\n    after",
        "g = g * LOG2E\n    after",
        equivalent="a gate below MIN_GATE exceeds HALF_RANGE by itself; such chunks go token by token and use no g_cum",
    ),
    Fault(
        "triton-gla-range",
        "guard",
        _GLA_CHUNK,
        "HALF_RANGE = tl.constexpr(57.7)",
        "HALF_RANGE = tl.constexpr(5770.0)",
    ),
    Fault(
        "triton-gla-chunk-number",
        "stride",
        _GLA_CHUNK,
        "start += ((number - tl.load(sequences.first_chunk + n)) * C).to(tl.int32)",
        "start += (number * C).to(tl.int32)",
    ),
    Fault(
        "triton-gla-den-grad", "gradient", _GLA_BWD, "-product * inverse * inverse, live)", "-product * inverse, live)"
    ),
    Fault("triton-gla-dz-decay", "gradient", _GLA_BWD, "dz = dz * tl.exp2(g_last)\n", "dz = dz\n"),
    Fault("triton-gla-shared", "accumulator", _GLA_BWD, "for j in range(SHARE):", "for j in range(1):"),
    Fault(
        "triton-gla-dk-z",
        "gradient",
        _GLA_GRADS,
        "dk = tl.zeros([C, BK], tl.float32) + (dz * tl.exp2(g_last))[None, :]",
        "dk = tl.zeros([C, BK], tl.float32)",
    ),
    Fault(
        "triton-gla-dg-state",
        "gradient",
        _GLA_GRADS,
        "dg_state = (dg_state + z * dz * tl.exp2(g_last)) * tl.exp2(g_mid) + tl.sum(b_k * dk, 0)",
        "dg_state = dg_state * tl.exp2(g_mid) + tl.sum(b_k * dk, 0)",
    ),
    Fault(
        "triton-gla-dv-rows",
        "bounds",
        _GLA_GRADS,
        "live[:, None] & (cols < shape.dv)[None, :])",
        "live[:, None] & (cols < shape.dv - 1)[None, :])",
    ),
    Fault(
        "triton-gla-grid",
        "bounds",
        _GLA,
        "self.slots = self.tokens // chunk + self.sequences",
        "self.slots = self.tokens // chunk + 1",
    ),
    Fault("triton-gla-gate-parts", "gradient", _GLA, "parts *= 1 if g.dim() == 4 else plan.narrow_k", "parts *= 1"),
    # --- LAWCAT's step
    Fault(
        "triton-decode-shift",
        "state",
        _DECODE,
        "x = tl.load(past_ptr + chan * (TAPS - 1) + j + 1, inside, other=0.0)",
        "x = tl.load(past_ptr + chan * (TAPS - 1) + j, inside, other=0.0)",
    ),
    Fault("triton-decode-query-update", "state", _DECODE, "if r == 0:\n", "if r >= 0:\n"),
    Fault(
        "triton-decode-gate-half",
        "stride",
        _DECODE,
        "decay_down = _decay(gate, gate_at + f if GATE == 2 else gate_at, some, GATE)",
        "decay_down = _decay(gate, gate_at, some, GATE)",
    ),
    Fault(
        "triton-decode-clamp", "guard", _DECODE, "tl.exp(tl.where(g < gate.clamp_min, gate.clamp_min, g))", "tl.exp(g)"
    ),
)
