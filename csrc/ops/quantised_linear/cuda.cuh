// The product with quantised weights on a GPU, for a few tokens: a warp reads a row of codes once for up to 8 tokens,
// every lane the groups 32 apart. More tokens read the rows again. The gradient: a lane has a column and walks down the
// rows. Sums have one order whatever the grid is.
#pragma once

#include "cuda/portable.cuh"
#include "cuda/quantised.cuh"
#include "ops/quantised_linear/params.h"

namespace subquad::cuda {

constexpr int kQuantisedWarps = 4;
constexpr int kQuantisedTokens = 8;  // of a block

template <class T, QuantisedFormat kFormat, bool kAligned>
__global__ void __launch_bounds__(kQuantisedWarps* kWarp) quantised_linear_fwd_kernel(QuantisedLinearParams p) {
  constexpr int kWord = kVecElems<T>, kBytes = 16;
  constexpr int kWords = static_cast<int>(code_bytes(kFormat)) / kBytes, kInWord = kQuantisedGroup / kWords;
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
    sq::Vec<uint8_t, kBytes> raw[kWords];
    SQ_UNROLL
    for (int w = 0; w < kWords; ++w) {
      raw[w] = load_chunk<Reuse::kStream, kAligned, kBytes>(codes + (g * kWords + w) * kBytes, kBytes);
    }
    const float scale = load_half<kAligned>(scales, g);
    const float minimum = load_minimum<kFormat, kAligned>(scales, groups, g);
    SQ_UNROLL
    for (int t = 0; t < kQuantisedTokens; ++t) {
      if (t >= tokens) break;
      SQ_UNROLL
      for (int k = 0; k < kQuantisedGroup; k += kWord) {
        float value[kWord];
        to_floats(load_chunk<Reuse::kKeep, kAligned, kWord>(x + t * p.columns + g * kQuantisedGroup + k, kWord), value);
        SQ_UNROLL
        for (int j = 0; j < kWord; ++j) {
          const int i = (k + j) % kInWord;
          const float code = code_in<kFormat>(raw[(k + j) / kInWord].v[i % kBytes], i / kBytes);
          sums[t] += value[j] * (code * scale + minimum);
        }
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
    constexpr int kBytes = static_cast<int>(code_bytes(kFormat));
    const float code = code_in<kFormat>(sq::load_stream(codes + g * kBytes + j % kBytes), j / kBytes);
    const float w = code * load_half<false>(scales, g) + load_minimum<kFormat, false>(scales, groups, g);
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
