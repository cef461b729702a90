// The product with quantised weights on a GPU, for a few tokens: a warp reads a row of codes once for up to 8 tokens,
// every lane the groups 32 apart. More tokens read the rows again. The gradient: a lane has a column and walks down the
// rows. Sums have one order whatever the grid is.
#pragma once

#include "cuda/chunk.cuh"
#include "cuda/portable.cuh"
#include "ops/quantised_linear/params.h"

namespace subquad::cuda {

constexpr int kQuantisedWarps = 4;
constexpr int kQuantisedTokens = 8;  // of a block

/// The code of element j of a group, less what stands for 0.
template <QuantisedFormat kFormat>
__device__ __forceinline__ float quantised_code(const sq::Vec<uint8_t, code_bytes(kFormat)>& raw, int j) {
  if constexpr (kFormat == QuantisedFormat::kInt8) return static_cast<float>(static_cast<int8_t>(raw.v[j]));
  const int code = j < 16 ? raw.v[j % 16] & 15 : raw.v[j % 16] >> 4;
  return static_cast<float>(kFormat == QuantisedFormat::kInt4 ? code - 8 : code);
}

/// The bytes of a group, in words of 16.
template <QuantisedFormat kFormat, bool kAligned>
__device__ __forceinline__ sq::Vec<uint8_t, code_bytes(kFormat)> quantised_group(const uint8_t* p) {
  sq::Vec<uint8_t, code_bytes(kFormat)> raw;
  SQ_UNROLL
  for (int w = 0; w < code_bytes(kFormat) / 16; ++w) {
    const auto word = load_chunk<Reuse::kStream, kAligned, 16>(p + 16 * w, 16);
    SQ_UNROLL
    for (int j = 0; j < 16; ++j) raw.v[16 * w + j] = word.v[j];
  }
  return raw;
}

/// fp16 number i of a row of them, which begins at any byte.
__device__ __forceinline__ float half_at(const uint8_t* halves, int64_t i) {
  const int low = sq::load_nc(halves + 2 * i), high = sq::load_nc(halves + 2 * i + 1);
  return sq::to_float(sq::fp16{static_cast<uint16_t>(low | high << 8)});
}

template <class T, QuantisedFormat kFormat, bool kAligned>
__global__ void __launch_bounds__(kQuantisedWarps* kWarp) quantised_linear_fwd_kernel(QuantisedLinearParams p) {
  constexpr int kWord = kVecElems<T>;
  const int64_t tiles = ceil_div(p.tokens, kQuantisedTokens), groups = p.columns / kQuantisedGroup;
  const int lane = threadIdx.x % kWarp;
  const int64_t row = blockIdx.x / tiles * kQuantisedWarps + threadIdx.x / kWarp;
  const int64_t first = blockIdx.x % tiles * kQuantisedTokens;
  if (row >= p.rows) return;
  const uint8_t* codes = p.weight + row * p.row_bytes();
  const uint8_t* scales = codes + groups * code_bytes(kFormat);
  const T* x = static_cast<const T*>(p.x) + first * p.columns;
  const int tokens = static_cast<int>(smaller(kQuantisedTokens, p.tokens - first));
  float sums[kQuantisedTokens] = {};
  for (int64_t g = lane; g < groups; g += kWarp) {
    const auto raw = quantised_group<kFormat, kAligned>(codes + g * code_bytes(kFormat));
    const float scale = half_at(scales, g);
    const float minimum = has_minimum(kFormat) ? half_at(scales, groups + g) : 0.0f;
    SQ_UNROLL
    for (int t = 0; t < kQuantisedTokens; ++t) {
      if (t >= tokens) break;
      SQ_UNROLL
      for (int k = 0; k < kQuantisedGroup; k += kWord) {
        float value[kWord];
        to_floats(load_chunk<Reuse::kKeep, kAligned, kWord>(x + t * p.columns + g * kQuantisedGroup + k, kWord), value);
        SQ_UNROLL
        for (int j = 0; j < kWord; ++j) sums[t] += value[j] * (quantised_code<kFormat>(raw, k + j) * scale + minimum);
      }
    }
  }
  const float bias = p.bias == nullptr ? 0.0f : sq::to_float(sq::load_nc(static_cast<const T*>(p.bias) + row));
  SQ_UNROLL
  for (int t = 0; t < kQuantisedTokens; ++t) {
    const float sum = warp_sum(sums[t]);
    if (lane == 0 && t < tokens) {
      sq::store(static_cast<T*>(p.y) + (first + t) * p.rows + row, sq::from_float<T>(sum + bias));
    }
  }
}

template <class T, QuantisedFormat kFormat>
__global__ void __launch_bounds__(kQuantisedWarps* kWarp) quantised_linear_bwd_kernel(QuantisedLinearParams p) {
  const int64_t tiles = ceil_div(p.tokens, kQuantisedTokens), groups = p.columns / kQuantisedGroup;
  const int j = threadIdx.x % kWarp;
  const int64_t g = blockIdx.x / tiles * kQuantisedWarps + threadIdx.x / kWarp;
  const int64_t first = blockIdx.x % tiles * kQuantisedTokens;
  if (g >= groups) return;
  const T* grad = static_cast<const T*>(p.x) + first * p.rows;
  const int tokens = static_cast<int>(smaller(kQuantisedTokens, p.tokens - first));
  float sums[kQuantisedTokens] = {};
  for (int64_t row = 0; row < p.rows; ++row) {
    const uint8_t* codes = p.weight + row * p.row_bytes();
    const uint8_t* scales = codes + groups * code_bytes(kFormat);
    float code;
    if constexpr (kFormat == QuantisedFormat::kInt8) {
      code = static_cast<float>(static_cast<int8_t>(sq::load_stream(codes + g * kQuantisedGroup + j)));
    } else {
      const int both = sq::load_stream(codes + g * 16 + j % 16), half = j < 16 ? both & 15 : both >> 4;
      code = static_cast<float>(kFormat == QuantisedFormat::kInt4 ? half - 8 : half);
    }
    float w = code * half_at(scales, g);
    if constexpr (has_minimum(kFormat)) w += half_at(scales, groups + g);
    SQ_UNROLL
    for (int t = 0; t < kQuantisedTokens; ++t) {
      if (t < tokens) sums[t] += sq::to_float(sq::load_nc(grad + t * p.rows + row)) * w;
    }
  }
  SQ_UNROLL
  for (int t = 0; t < kQuantisedTokens; ++t) {
    if (t < tokens) {
      sq::store(static_cast<T*>(p.y) + (first + t) * p.columns + g * kQuantisedGroup + j, sq::from_float<T>(sums[t]));
    }
  }
}

template <class T>
void quantised_forward(const QuantisedLinearParams& p, sq::stream_t stream) {
  if (p.tokens == 0 || p.rows == 0) return;
  const int64_t blocks = ceil_div(p.rows, kQuantisedWarps) * ceil_div(p.tokens, kQuantisedTokens);
  const bool aligned = is_aligned16(p.x) && is_aligned16(p.weight) && p.row_bytes() % 16 == 0;
  by_format(p.format, [&]<QuantisedFormat kFormat>() {
    with_flag(aligned, [&](auto flag) {
      SQ_LAUNCH((quantised_linear_fwd_kernel<T, kFormat, flag>), blocks, kQuantisedWarps * kWarp, 0, stream, p);
    });
  });
}

template <class T>
void quantised_backward(const QuantisedLinearParams& p, sq::stream_t stream) {
  if (p.tokens == 0 || p.columns == 0) return;
  const int64_t groups = p.columns / kQuantisedGroup;
  const int64_t blocks = ceil_div(groups, kQuantisedWarps) * ceil_div(p.tokens, kQuantisedTokens);
  by_format(p.format, [&]<QuantisedFormat kFormat>() {
    SQ_LAUNCH((quantised_linear_bwd_kernel<T, kFormat>), blocks, kQuantisedWarps * kWarp, 0, stream, p);
  });
}

}  // namespace subquad::cuda
