// One token through the state of one head, in place: what decoding kernels have in common. The whole block works on it.
#pragma once

#include "cuda/chunk.cuh"
#include "cuda/portable.cuh"
#include "ops/gated_linear_attention/params.h"

namespace subquad::cuda {

constexpr int kStepThreads = 256;
constexpr int kStepWarps = kStepThreads / kWarp;
constexpr int kStepHeads = 4;  // query heads that one pass over the state serves
constexpr int kStepWidth = static_cast<int>(kGlaMaxDim);
static_assert(kStepThreads >= kStepWidth, "a thread owns one channel");
constexpr int kStepQuad = 4;                          // columns of a lane
constexpr int kStepLanes = 8;                         // lanes of a row
constexpr int kStepTile = kStepLanes * kStepQuad;     // columns of a warp
constexpr int kStepRows = kStepThreads / kStepLanes;  // rows of the block
constexpr int kStepDepth = 4;                         // rows of a thread whose loads are under way together

/// Sum over the lanes of a warp that own the same columns; the first `kStepLanes` lanes have it.
__device__ __forceinline__ float column_sum(float v) {
  SQ_UNROLL
  for (int offset = kWarp / 2; offset >= kStepLanes; offset /= 2) v += __shfl_xor_sync(kFullWarp, v, offset);
  return v;
}

/// S = a S + k v^T (with kUpdate; else S as it is), and what every warp's rows of it add to q S of `heads` query heads:
/// parts[warp][head][column]. All but the state is in shared memory; heads of query are `stride` apart.
template <bool kAligned, bool kUpdate>
__device__ __forceinline__ void step_state(float* state, int dk, int dv, const float* key, const float* decay,
                                           const float* value, const float* query, int stride, int heads,
                                           float* parts) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int row = static_cast<int>(threadIdx.x) / kStepLanes, quad = lane % kStepLanes * kStepQuad;
  for (int base = 0; base < dv; base += kStepTile) {
    const int col = base + quad;
    float acc[kStepHeads][kStepQuad] = {}, v[kStepQuad];
    SQ_UNROLL
    for (int j = 0; j < kStepQuad; ++j) v[j] = col + j < dv ? value[col + j] : 0.0f;
    for (int first = row; first < dk; first += kStepDepth * kStepRows) {
      sq::Vec<float, kStepQuad> raw[kStepDepth];
      SQ_UNROLL
      for (int i = 0; i < kStepDepth; ++i) {
        const int c = first + i * kStepRows;
        raw[i] = load_chunk<Reuse::kStream, kAligned, kStepQuad>(state + int64_t{c} * dv + col, c < dk ? dv - col : 0);
      }
      SQ_UNROLL
      for (int i = 0; i < kStepDepth; ++i) {
        const int c = first + i * kStepRows;
        if (c >= dk) continue;
        float s[kStepQuad];
        to_floats(raw[i], s);
        if constexpr (kUpdate) {
          SQ_UNROLL
          for (int j = 0; j < kStepQuad; ++j) s[j] = fmaf(key[c], v[j], decay[c] * s[j]);
          store_chunk<kAligned>(state + int64_t{c} * dv + col, dv - col, s);
        }
        SQ_UNROLL
        for (int h = 0; h < kStepHeads; ++h) {
          if (h >= heads) continue;
          SQ_UNROLL
          for (int j = 0; j < kStepQuad; ++j) acc[h][j] = fmaf(query[h * stride + c], s[j], acc[h][j]);
        }
      }
    }
    SQ_UNROLL
    for (int h = 0; h < kStepHeads; ++h) {
      if (h >= heads) continue;
      SQ_UNROLL
      for (int j = 0; j < kStepQuad; ++j) {
        const float sum = column_sum(acc[h][j]);
        if (lane < kStepLanes && col + j < dv) parts[(warp * kStepHeads + h) * dv + col + j] = sum;
      }
    }
  }
}

/// out[head * dv + column] = q S / (q z + eps) from the warps' shares, in their order; `totals[head][warp]` are shares
/// of q z, or null when nothing is normalised.
template <class T>
__device__ __forceinline__ void step_outputs(const float* parts, const float* totals, int heads, int dv, float eps,
                                             T* out) {
  for (int i = static_cast<int>(threadIdx.x); i < heads * dv; i += kStepThreads) {
    const int h = i / dv, column = i % dv;
    float sum = 0.0f, total = 0.0f;
    SQ_UNROLL
    for (int w = 0; w < kStepWarps; ++w) {
      sum += parts[(w * kStepHeads + h) * dv + column];
      if (totals != nullptr) total += totals[h * kStepWarps + w];
    }
    sq::store(out + i, sq::from_float<T>(totals == nullptr ? sum : sum / (total + eps)));
  }
}

}  // namespace subquad::cuda
