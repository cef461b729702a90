"""Faults of weights in few bits: formats, calls, and the kernels of the products and of CATS on them."""

from __future__ import annotations

from ..fault import Fault, Where, tests_of
from .cpu import of

_BOTH = ("quantised_linear", "quantised_cats_mlp")


def _gpu(file: str, side: str, *stems: str) -> Where:
    library = "simt" if side == "simt" else ""
    return Where(file, tests_of(*stems), side, ("forward", "foreign", "mask"), library)


def _python(file: str, *stems: str) -> Where:
    return Where(f"python/subquad/{file}", tests_of(*stems), "not triton and not simt")


_READ = of("cpu/simd/quantised.h", *_BOTH)
_READ_V3 = of("cpu/simd/quantised.h", *_BOTH, levels=("v3",))
_READ_BASE = of("cpu/simd/quantised.h", *_BOTH, levels=("baseline",))
_ROWS = of("cpu/simd/quantised_rows.h", *_BOTH)
_PLANES = of("cpu/simd/quantised_planes.h", *_BOTH, levels=("v3",))
_CATS = of("ops/quantised_cats_mlp/cpu.isa.cpp", "quantised_cats_mlp", first=("forward", "foreign", "mask"))

CPU = (
    Fault(
        "cpu-quantised-high-codes",
        "formula",
        _READ,
        "out[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4), table);",
        "out[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 3), table);",
    ),
    Fault(
        "cpu-quantised-minimum",
        "formula",
        _READ,
        "has_minimum(kFormat) ? vec_fma(table, by, vec_set(minimum)) : vec_mul(table, by), w);",
        "vec_mul(table, by), w);",
    ),
    Fault(
        "cpu-quantised-last-group",
        "bounds",
        _READ,
        "for (; i < here; ++i) one(i);",
        "for (; i + 1 < here; ++i) one(i);",
    ),
    Fault(
        "cpu-quantised-v3-middle",
        "formula",
        _READ_V3,
        "_mm256_sub_epi32(_mm256_srli_epi32(words, 4), middle)",
        "_mm256_srli_epi32(words, 4)",
    ),
    Fault("cpu-quantised-baseline-high", "formula", _READ_BASE, ": p[i - 16] >> 4;", ": p[i - 16] & 15;"),
    Fault("cpu-quantised-planes-carry", "formula", _PLANES, "largest * (128.0f / 127.0f)", "largest"),
    Fault("cpu-quantised-planes-base", "formula", _PLANES, "_mm256_set1_epi16(256)", "_mm256_set1_epi16(128)"),
    Fault("cpu-quantised-planes-middle", "formula", _PLANES, "here *= -8;", "here *= -7;"),
    Fault("cpu-quantised-planes-minimum", "formula", _PLANES, "by, vec_set(8.0f),", "by, vec_set(7.0f),"),
    Fault("cpu-quantised-planes-fits", "nan", _PLANES, "- 1] != 0.0f;", "- 1] != 2.0f;"),
    Fault("cpu-quantised-planes-outlier", "rounding", _PLANES, "fits && squares.fit()", "fits"),
    Fault(
        "cpu-quantised-planes-foreign-scale",
        "nan",
        of("cpu/simd/quantised_rows.h", *_BOTH, levels=("v3",)),
        "if (kInPlanes && !(y - y == 0.0f))",
        "if (kInPlanes && y != y && y == 0.0f)",
    ),
    Fault(
        "cpu-quantised-planes-tokens",
        "mask",
        of("cpu/simd/quantised_rows.h", *_BOTH, levels=("v3",)),
        "some : wanted[first + i] & some;",
        "some : wanted[first + i];",
    ),
    Fault(
        "cpu-quantised-rows-wanted",
        "mask",
        _ROWS,
        "bits |= wanted == nullptr ?",
        "bits = wanted == nullptr ?",
    ),
    Fault(
        "cpu-quantised-rows-place",
        "stride",
        _ROWS,
        "out[token[r][k] * ld + first + i] =",
        "out[k * ld + first + i] =",
    ),
    Fault(
        "cpu-quantised-mlp-gate",
        "stride",
        _CATS,
        "own.h[t * kRound + j] *= own.gate[t * kRound + own.index[j]];",
        "own.h[t * kRound + j] *= own.gate[t * kRound + j];",
    ),
    Fault(
        "cpu-quantised-mlp-factor",
        "stride",
        _CATS,
        "factor[t][count[t]] = own.h[t * kRound + begin + r];",
        "factor[t][count[t]] = own.h[begin + r];",
    ),
    Fault(
        "cpu-quantised-mlp-blocks",
        "bounds",
        _CATS,
        "own.index[end] / kGroup == own.index[begin] / kGroup) ++end;",
        "end - begin < kGroup) ++end;",
    ),
    Fault(
        "cpu-quantised-mlp-minimum",
        "mask",
        _CATS,
        "if ((own.wanted[j] >> t & 1) != 0) total += own.h[t * kRound + j], any = true;",
        "total += own.h[t * kRound + j], any = true;",
    ),
    Fault("cpu-quantised-mlp-foreign-scale", "nan", _CATS, "if (!any) continue;", ""),
    Fault(
        "cpu-quantised-mlp-union",
        "mask",
        _CATS,
        "p.mask[t * p.intermediate + first + i] = bits[i] != 0;",
        "p.mask[t * p.intermediate + first + i] |= bits[i] == all + 1;",
    ),
    Fault(
        "cpu-quantised-mlp-chunks",
        "accumulator",
        _CATS,
        "for (int64_t c = 0; c < s.chunks; ++c) sum =",
        "for (int64_t c = 0; c < 1; ++c) sum =",
    ),
    Fault(
        "cpu-quantised-linear-few",
        "dispatch",
        of("ops/quantised_linear/cpu.cpp", "quantised_linear"),
        "p.tokens <= kQuantisedFewTokens",
        "p.tokens < kQuantisedFewTokens",
    ),
    Fault(
        "cpu-quantised-linear-gradient",
        "stride",
        of("ops/quantised_linear/cpu.isa.cpp", "quantised_linear", first=("gradients",)),
        "column / kGroup, width / kGroup,",
        "0, width / kGroup,",
    ),
)

_READ_CUDA = _gpu("csrc/cuda/quantised.cuh", "simt", *_BOTH)
_CATS_CUDA = _gpu("csrc/ops/quantised_cats_mlp/cuda.cuh", "simt", "quantised_cats_mlp")
_DENSE_CUDA = _gpu("csrc/ops/cats_mlp/cuda.cuh", "simt", "quantised_cats_mlp")

CUDA = (
    Fault("cuda-quantised-high-codes", "formula", _READ_CUDA, "byte >> (4 * half) & 15;", "byte & 15;"),
    Fault("cuda-quantised-odd-address", "stride", _READ_CUDA, "(low | high << 8)", "(high | low << 8)"),
    Fault(
        "cuda-quantised-minimum",
        "stride",
        _READ_CUDA,
        "load_half<kAligned>(scales, groups + group, live);",
        "load_half<kAligned>(scales, group, live);",
    ),
    Fault(
        "cuda-quantised-linear-element",
        "stride",
        _gpu("csrc/ops/quantised_linear/cuda.cuh", "simt", "quantised_linear"),
        "raw[(k + j) / kInWord].v[i % kBytes]",
        "raw[0].v[i % kBytes]",
    ),
    Fault(
        "cuda-quantised-mlp-high-x",
        "stride",
        _CATS_CUDA,
        "+ half * (kQuantisedGroup / 2);",
        "+ half * K;",
    ),
    Fault("cuda-quantised-mlp-words", "bounds", _CATS_CUDA, "word < words; word", "word + 1 < words; word"),
    Fault(
        "cuda-quantised-mlp-columns",
        "stride",
        _CATS_CUDA,
        "(j < kBytes ? j : 16 + j - kBytes)",
        "(j < kBytes ? j : 8 + j - kBytes)",
    ),
    Fault(
        "cuda-quantised-mlp-row-scale",
        "stride",
        _CATS_CUDA,
        "const int64_t group = column / kQuantisedGroup;",
        "const int64_t group = 0;",
    ),
    Fault("cuda-quantised-mlp-block", "stride", _DENSE_CUDA, "rows.block(base / kWarp);", "rows.block(start / kWarp);"),
    Fault(
        "cuda-quantised-mlp-start",
        "stride",
        _DENSE_CUDA,
        "Rows::kBlocks ? begin / kWarp * kWarp : begin;",
        "begin;",
    ),
    Fault(
        "cuda-quantised-mlp-twice",
        "bounds",
        _DENSE_CUDA,
        "start + lane >= begin && start + lane < end ?",
        "start + lane < end ?",
    ),
    Fault(
        "cuda-quantised-mlp-mask",
        "mask",
        _DENSE_CUDA,
        "sq::store(mask + lane * p.intermediate + i, (alive >> lane & 1) != 0);",
        "sq::store(mask + lane * p.intermediate + i, alive != 0);",
    ),
)

_READ_TRITON = _gpu("kernels/triton_ops/_common/quantised.py", "triton", *_BOTH)
_CATS_TRITON = _gpu("kernels/triton_ops/cats_mlp.py", "triton", "quantised_cats_mlp")

TRITON = (
    Fault("triton-quantised-high-codes", "formula", _READ_TRITON, "(k // 16 * 4)[None, :]", "(k // 16 * 3)[None, :]"),
    Fault("triton-quantised-minimum", "stride", _READ_TRITON, "        at += w.groups\n", "        at += 1\n"),
    Fault("triton-quantised-middle", "formula", _READ_TRITON, "middle = 8 if FORMAT == INT4 else 0", "middle = 8"),
    Fault(
        "triton-quantised-sums",
        "formula",
        _READ_TRITON,
        "tl.sum(low.to(tl.float32), axis=1) + tl.sum(high.to(tl.float32), axis=1)",
        "tl.sum(low.to(tl.float32), axis=1)",
    ),
    Fault(
        "triton-quantised-infinite-scale",
        "nan",
        _READ_TRITON,
        "acc = tl.where(is_finite(acc), acc, exact)",
        "acc = tl.where(is_finite(acc), acc, acc)",
    ),
    Fault(
        "triton-quantised-shared-block",
        "stride",
        _READ_TRITON,
        "tl.cast(block, tl.int64) * row",
        "tl.cast(block, tl.int64) * 0",
    ),
    Fault(
        "triton-quantised-odd-offset",
        "guard",
        _READ_TRITON,
        "data.clone() if data.storage_offset() % 2 else data",
        "data",
    ),
    Fault(
        "triton-quantised-mlp-mask",
        "mask",
        _CATS_TRITON,
        "tl.store(mask_ptr + at, active.to(tl.uint8)",
        "tl.store(mask_ptr + at, (active | need[None, :]).to(tl.uint8)",
    ),
    Fault(
        "triton-quantised-mlp-column",
        "stride",
        _CATS_TRITON,
        "weights(weight, neurons, need, cols.first // GROUP, start // GROUP, FORMAT)",
        "weights(weight, neurons, need, cols.first // GROUP, h.stop // GROUP - 1, FORMAT)",
    ),
)

_CALL = _python("ops/quantised_cats_mlp.py", "quantised_cats_mlp")
_REFERENCE = _python("reference/quantised_linear.py", "quantised_linear")

OPS = (
    Fault("ops-quantised-mlp-dense", "dispatch", _CALL, 'prefill == "dense" and tokens > limit', 'prefill == "dense"'),
    Fault(
        "ops-quantised-mlp-down-format",
        "dispatch",
        _CALL,
        "self.across(h, self.w_down, self.formats[2])",
        "self.across(h, self.w_down, self.formats[0])",
    ),
    Fault(
        "ops-quantised-mlp-block-scales",
        "stride",
        _CALL,
        "self.down_scales[i // GROUP : (i + _BLOCK) // GROUP]",
        "self.down_scales[: _BLOCK // GROUP]",
    ),
    Fault("ops-quantised-mlp-union", "mask", _CALL, "mask.any(0).expand_as(mask)", "mask.all(0).expand_as(mask)"),
    Fault("ops-quantised-mlp-dead", "nan", _CALL, "    if not_finite(y):\n", "    if False:\n"),
    Fault(
        "ops-cats-dead",
        "nan",
        _python("ops/cats_mlp.py", "cats_mlp"),
        "return _checks.readable(y) and not bool",
        "return bool",
    ),
    Fault(
        "nn-dense-dtype",
        "dispatch",
        Where("python/subquad/convert/weights.py", ("tests/models/test_weights.py",)),
        "placement(model)[1] if dtype is None",
        "torch.float32 if dtype is None",
    ),
    Fault(
        "ops-quantised-mlp-union-gradient",
        "gradient",
        _CALL,
        "w_gate, w_up, w_down, down_scales, t, z, u, x, b_gate",
        "w_gate, w_up, w_down, down_scales, threshold, z, u, x, b_gate",
    ),
    Fault(
        "ops-quantised-mlp-straight-through",
        "gradient",
        _CALL,
        "(layer.activation, layer.inclusive, layer.straight_through)",
        "(layer.activation, layer.inclusive, False)",
    ),
    Fault(
        "ops-quantised-mlp-up-gradient",
        "gradient",
        _CALL,
        "+ layer.across(du, layer.w_up, layer.formats[1])",
        "",
    ),
    Fault(
        "ops-quantised-linear-bias-gradient",
        "gradient",
        _python("ops/quantised_linear.py", "quantised_linear"),
        "grad_y.float().sum(0)",
        "grad_y.float().mean(0)",
    ),
    Fault(
        "ops-quantise-limit",
        "guard",
        _python("ops/quantised_linear.py", "quantised_linear"),
        '"int4": 8, "int4_min": 1}',
        '"int4": 8, "int4_min": 2}',
    ),
    Fault(
        "ops-quantise-clip",
        "bounds",
        _REFERENCE,
        "(_divide(groups, scale) + 8).clamp(max=15)",
        "(_divide(groups, scale) + 8)",
    ),
    Fault(
        "ops-quantise-round-up", "rounding", _REFERENCE, "(half.double() < magnitude)", "(half.double() > magnitude)"
    ),
    Fault("ops-quantise-zero-scale", "guard", _REFERENCE, "torch.where(wide == 0, 0.0, x / wide)", "(x / wide)"),
)
