// Causal convolution and feature map in one pass. A block takes a tile of tokens of one head; what the convolution
// makes of them stays in shared memory, and goes on as a tile of the feature map does. Backward computes both again;
// the gradient between them is written once, in float, for the backward of the convolution.
#pragma once

#include "ops/causal_conv1d/cuda.cuh"
#include "ops/conv_feature_map/params.h"
#include "ops/feature_map/cuda.cuh"

namespace subquad::cuda {

// allow-spill(conv_feature_map_fwd_kernel): one word on sm_90a, once per block
// allow-spill(conv_feature_map_bwd_kernel): a few words on sm_80 and sm_90a, per tile of 16 tokens

constexpr int kStripRows = 4;  // tokens that a thread walks down, with the last inputs of its channel in registers

/// x[r * d + k] = channel c + k of the convolution at token first + r; 0 beyond the last token.
template <class T, int kTaps>
__device__ __forceinline__ void convolve_tile(const ConvParams& p, int64_t b, int64_t first, int64_t c, float* x) {
  const int d = static_cast<int>(p.head_dim);
  for (int i = static_cast<int>(threadIdx.x); i < kMapRows / kStripRows * d; i += kMapThreads) {
    const int strip = i / d, k = i - strip * d;
    const int64_t input = conv_input(p, c + k), begin = first + strip * kStripRows;
    float w[kTaps][1], bias[1], window[kTaps][1];
    conv_weights<T>(p, c + k, w, bias);
    ConvSpan s{};
    for (int r = 0; r < kStripRows; ++r) {
      const int64_t t = begin + r;
      float z[1] = {0.0f};
      if (t < p.time) {
        if (r == 0 || t == s.end) s = conv_span(p, b, t);
        if (r == 0 || t == s.start) conv_window<T>(p, b, s, t, input, window);
        conv_load<1>(conv_x<T>(p, b, t, input), window[0]);
        conv_sum(w, window, bias, conv_exist(p, s, t), z);
        if (p.silu) z[0] *= reciprocal(1.0f + expf(-z[0]));
        conv_shift(window);
      }
      x[(strip * kStripRows + r) * d + k] = z[0];
    }
  }
}

/// Matrix of a head. Heads are fewer than 2^31: a 64-bit division would be a function call that spills.
template <class T>
__device__ __forceinline__ const T* map_weight(const FeatureMapParams& p, unsigned head) {
  return static_cast<const T*>(p.weight) + static_cast<int64_t>(head / static_cast<unsigned>(p.sharing)) * p.d * p.f;
}

template <class T, int kTaps>
__global__ void __launch_bounds__(kMapThreads) conv_feature_map_fwd_kernel(ConvFeatureMapParams p, unsigned tiles) {
  SQ_DYNAMIC_SHARED(float, x);
  float* y = x + kMapRows * p.map.d;
  const auto heads = static_cast<unsigned>(p.map.heads), tile = blockIdx.x / heads, head = blockIdx.x - tile * heads;
  const int64_t b = tile / tiles, first = static_cast<int64_t>(tile % tiles) * kMapRows;
  convolve_tile<T, kTaps>(conv_params<kTaps>(p.conv), b, first, head * p.map.d, x);
  __syncthreads();
  project_tile<T>(p.map, map_weight<T>(p.map, head), x, y);
  __syncthreads();
  store_tile<T>(p.map, head, b * p.conv.time + first, p.conv.time - first, y);
}

/// One block per head and chunk of tokens: dy, and the chunk's sum of the matrix's gradient. A chunk is chunk_b rows of
/// the batch and chunk_t tokens long; chunks are few, so that counting replaces a division.
template <class T, int kTaps>
__global__ void __launch_bounds__(kMapThreads)
    conv_feature_map_bwd_kernel(ConvFeatureMapParams p, int64_t chunk_b, int64_t chunk_t) {
  SQ_DYNAMIC_SHARED(float, x);
  const FeatureMapParams& map = p.map;
  float* y = x + kMapRows * map.d;
  const auto heads = static_cast<unsigned>(map.heads), chunk = blockIdx.x / heads, head = blockIdx.x - chunk * heads;
  const int64_t begin = chunk * map.chunk, end = begin + map.chunk < map.rows ? begin + map.chunk : map.rows;
  const T* weight = map_weight<T>(map, head);
  float* partial = map.partials + (chunk * map.heads + head) * map.d * map.f;
  int64_t b = 0, t = 0;
  for (unsigned i = 0; i < chunk; ++i) {
    b += chunk_b, t += chunk_t;
    if (t >= map.time) t -= map.time, ++b;
  }
  for (int64_t first = begin, count; first < end; first += count) {
    count = end - first < kMapRows ? end - first : kMapRows;
    if (map.time - t < count) count = map.time - t;
    __syncthreads();
    convolve_tile<T, kTaps>(conv_params<kTaps>(p.conv), b, t, head * map.d, x);
    __syncthreads();
    project_tile<T>(map, weight, x, y);
    __syncthreads();
    backward_tile(map, head, first, static_cast<int>(count), first == begin, weight, x, y, p.dy, partial);
    t += count;
    if (t == map.time) t = 0, ++b;
  }
}

template <class T>
void conv_feature_map_forward(const ConvFeatureMapParams& p, sq::stream_t stream) {
  causal_conv1d_final_state<T>(p.conv, stream);
  if (p.map.rows * p.map.heads == 0) return;
  with_taps(p.conv.taps, [&](auto taps) {
    const int64_t tiles = ceil_div(p.conv.time, kMapRows);
    SQ_LAUNCH((conv_feature_map_fwd_kernel<T, taps>), tiles * p.conv.batch * p.map.heads, kMapThreads,
              feature_map_shared(p.map), stream, p, static_cast<unsigned>(tiles));
  });
}

template <class T>
void conv_feature_map_backward(const ConvFeatureMapParams& p, sq::stream_t stream) {
  const FeatureMapParams& map = p.map;
  if (map.rows * map.heads > 0) {
    with_taps(p.conv.taps, [&](auto taps) {
      SQ_LAUNCH((conv_feature_map_bwd_kernel<T, taps>), map.chunks * map.heads, kMapThreads, feature_map_shared(map),
                stream, p, map.chunk / map.time, map.chunk % map.time);
    });
  }
  if (map.heads > 0) feature_map_reduce<T>(map, stream);
  causal_conv1d_backward<T, float>(p.conv, stream);
}

}  // namespace subquad::cuda
