// Causal depthwise convolution over time, channels last, forward, backward and one decoding step.
//
// A block owns kConvBlock tokens; its lanes lie side by side along the channels, kLaneChannels each (16 bytes where
// alignment allows, else one), and its four warps take 16 tokens each, with the last inputs in registers. dweight and
// dbias are partial sums per block in a workspace, added up in block order by a second kernel: no atomics.
#pragma once

#include <algorithm>

#include "common/activations.h"
#include "cuda/chunk.cuh"
#include "cuda/portable.cuh"
#include "ops/causal_conv1d/params.h"

namespace subquad::cuda {

constexpr int kConvWarps = 4;
constexpr int kConvRows = static_cast<int>(kConvBlock) / kConvWarps;  // tokens of one warp
constexpr int kConvThreads = 256;                                     // of the kernels without a time axis

using ConvParams = CausalConv1dParams;
using ConvUpdateParams = CausalConv1dUpdateParams;

/// The sequence of a token: its index, its first token and the token after its last.
struct ConvSpan {
  int64_t n, start, end;
};

__device__ __forceinline__ ConvSpan conv_span(const ConvParams& p, int64_t b, int64_t t) {
  if (p.cu_seqlens == nullptr) return {b, 0, p.time};
  const int64_t n = clamp(sq::load_nc(p.sequence + t), 0, p.sequences - 1);
  return {n, clamp(sq::load_nc(p.cu_seqlens + n), 0, t), clamp(sq::load_nc(p.cu_seqlens + n + 1), t + 1, p.time)};
}

/// All of sequence n, for the kernels that are not about one token.
__device__ __forceinline__ ConvSpan conv_sequence(const ConvParams& p, int64_t n) {
  if (p.cu_seqlens == nullptr) return {n, 0, p.time};
  const int64_t start = clamp(sq::load_nc(p.cu_seqlens + n), 0, p.time);
  return {n, start, clamp(sq::load_nc(p.cu_seqlens + n + 1), start, p.time)};
}

/// Input channel of an output channel, and the output channel of group g for an input channel. Channels are fewer than
/// 2^31: a 64-bit division would be a function call that spills.
template <class P>
__device__ __forceinline__ int64_t conv_input(const P& p, int64_t c) {
  if (p.groups == 1) return c;
  const auto width = static_cast<uint32_t>(p.head_dim), h = static_cast<uint32_t>(c) / width;
  return static_cast<int64_t>(h / static_cast<uint32_t>(p.groups)) * width + (static_cast<uint32_t>(c) - h * width);
}

template <class P>
__device__ __forceinline__ int64_t conv_output(const P& p, int64_t ci, int64_t g) {
  if (p.groups == 1) return ci;
  const auto width = static_cast<uint32_t>(p.head_dim), h = static_cast<uint32_t>(ci) / width;
  return (h * p.groups + g) * p.head_dim + (static_cast<uint32_t>(ci) - h * width);
}

template <int K, class T>
__device__ __forceinline__ void conv_load(const T* p, float (&out)[K]) {
  to_floats(load_chunk<Reuse::kKeep, true, K>(p, K), out);
}

template <class T>
__device__ __forceinline__ const T* conv_x(const ConvParams& p, int64_t b, int64_t t, int64_t c) {
  return static_cast<const T*>(p.x) + b * p.x_stride_b + t * p.x_stride_t + c;
}

/// X at row t of a sequence for channels c .. c + K - 1. Before the sequence: its state, or 0 without one.
template <class T, int K>
__device__ __forceinline__ void conv_tap(const ConvParams& p, int64_t b, const ConvSpan& s, int64_t t, int64_t c,
                                         float (&out)[K]) {
  if (t >= s.start) return conv_load<K>(conv_x<T>(p, b, t, c), out);
  const int64_t past = p.taps - 1;
  SQ_UNROLL
  for (int k = 0; k < K; ++k) {
    out[k] = 0.0f;
    if (p.state != nullptr) {
      const T* state = static_cast<const T*>(p.state) + (s.n * p.inputs + c + k) * past;
      out[k] = sq::to_float(sq::load_nc(state + past - (s.start - t)));
    }
  }
}

/// p with the number of taps known to the compiler where the kernel is for one number.
template <int kTaps>
__device__ __forceinline__ ConvParams conv_params(ConvParams p) {
  if constexpr (kTaps < kConvMaxTaps) p.taps = kTaps;
  return p;
}

/// Taps of a row that exist.
__device__ __forceinline__ int conv_exist(const ConvParams& p, const ConvSpan& s, int64_t t) {
  return p.state != nullptr || t - s.start >= p.taps ? p.taps : static_cast<int>(t - s.start) + 1;
}

/// w[j] is the weight of the input j tokens back; kTaps is the number of taps, or kConvMaxTaps when fewer are in use.
template <class T, int K, int kTaps>
__device__ __forceinline__ void conv_weights(const ConvParams& p, int64_t c, float (&w)[kTaps][K], float (&bias)[K]) {
  const T* weight = static_cast<const T*>(p.weight) + c * p.taps;
  SQ_UNROLL
  for (int k = 0; k < K; ++k) {
    bias[k] = p.bias == nullptr ? 0.0f : sq::to_float(sq::load_nc(static_cast<const T*>(p.bias) + c + k));
    SQ_UNROLL
    for (int j = 0; j < kTaps; ++j) {
      w[j][k] = j < p.taps ? sq::to_float(sq::load_nc(weight + k * p.taps + p.taps - 1 - j)) : 0.0f;
    }
  }
}

/// The inputs behind row t into window[1 ..]: window[j] is the input j tokens back.
template <class T, int K, int kTaps>
__device__ __forceinline__ void conv_window(const ConvParams& p, int64_t b, const ConvSpan& s, int64_t t, int64_t c,
                                            float (&window)[kTaps][K]) {
  SQ_UNROLL
  for (int j = 1; j < kTaps; ++j) {
    if (j < p.taps && (p.state != nullptr || t - j >= s.start)) {
      conv_tap<T, K>(p, b, s, t - j, c, window[j]);
    } else {
      SQ_UNROLL
      for (int k = 0; k < K; ++k) window[j][k] = 0.0f;
    }
  }
}

template <int K, int kTaps>
__device__ __forceinline__ void conv_shift(float (&window)[kTaps][K]) {
  SQ_UNROLL
  for (int j = kTaps - 1; j > 0; --j) {
    SQ_UNROLL
    for (int k = 0; k < K; ++k) window[j][k] = window[j - 1][k];
  }
}

/// z = bias + the taps that exist, oldest first; the others are not multiplied.
template <int K, int kTaps>
__device__ __forceinline__ void conv_sum(const float (&w)[kTaps][K], const float (&window)[kTaps][K],
                                         const float (&bias)[K], int exist, float (&z)[K]) {
  SQ_UNROLL
  for (int k = 0; k < K; ++k) z[k] = bias[k];
  SQ_UNROLL
  for (int j = kTaps - 1; j >= 0; --j) {
    if (j < exist) {
      SQ_UNROLL
      for (int k = 0; k < K; ++k) z[k] = fmaf(w[j][k], window[j][k], z[k]);
    }
  }
}

/// window[j][k] where j is not known to the compiler, which must not put the window in memory for it.
template <int K, int kTaps>
__device__ __forceinline__ float conv_at(const float (&window)[kTaps][K], int j, int k) {
  float value = window[0][k];
  SQ_UNROLL
  for (int i = 1; i < kTaps; ++i) value = i == j ? window[i][k] : value;
  return value;
}

/// What a block works on: a block of tokens, kWarp * K channels from `channel` on, a batch row.
struct ConvPlace {
  int64_t b, channel, block;
};

inline int64_t conv_grid(const ConvParams& p, int64_t channels, int per_thread) {
  return p.blocks() * ceil_div(channels, kWarp * per_thread) * p.batch;
}

__device__ __forceinline__ ConvPlace conv_place(const ConvParams& p, int64_t channels, int per_thread) {
  const unsigned blocks = static_cast<unsigned>(ceil_div(p.time, kConvBlock)), rest = blockIdx.x / blocks;
  const unsigned columns = static_cast<unsigned>(ceil_div(channels, kWarp * per_thread));
  return {rest / columns, int64_t{rest % columns} * kWarp * per_thread, blockIdx.x % blocks};
}

template <class T, int K, int kTaps>
__global__ void __launch_bounds__(kWarp* kConvWarps, 1) causal_conv1d_fwd_kernel(ConvParams params) {
  const ConvParams p = conv_params<kTaps>(params);
  const ConvPlace at = conv_place(p, p.channels, K);
  const int64_t b = at.b, c = at.channel + threadIdx.x * K, first = at.block * kConvBlock + threadIdx.y * kConvRows;
  if (c >= p.channels || first >= p.time) return;
  const int64_t stop = p.time - first < kConvRows ? p.time : first + kConvRows, input = conv_input(p, c);
  float w[kTaps][K], bias[K];
  conv_weights<T>(p, c, w, bias);
  float window[kTaps][K];
  ConvSpan s = conv_span(p, b, first);
  for (int64_t t = first; t < stop; ++t) {
    if (t == s.end) s = conv_span(p, b, t);
    if (t == first || t == s.start) conv_window<T>(p, b, s, t, input, window);
    conv_load<K>(conv_x<T>(p, b, t, input), window[0]);
    float z[K];
    conv_sum(w, window, bias, conv_exist(p, s, t), z);
    if (p.silu) {
      SQ_UNROLL
      for (int k = 0; k < K; ++k) z[k] = activate<Activation::kSilu>(z[k]);
    }
    if (p.residual != nullptr) {
      float residual[K];
      conv_load<K>(static_cast<const T*>(p.residual) + b * p.residual_stride_b + t * p.residual_stride_t + c, residual);
      SQ_UNROLL
      for (int k = 0; k < K; ++k) z[k] += residual[k];
    }
    store_chunk<true>(static_cast<T*>(p.y) + (b * p.time + t) * p.channels + c, K, z);
    conv_shift(window);
  }
}

/// dx of one block of tokens, and its partial sums of dweight and dbias. With several groups dx is added up over them
/// in dynamic shared memory, [kConvBlock, kWarp, K] floats, of which a thread touches its own alone.
template <class T, class G, int K, int kTaps>
__global__ void __launch_bounds__(kWarp* kConvWarps, 1) causal_conv1d_bwd_kernel(ConvParams params) {
  const ConvParams p = conv_params<kTaps>(params);
  SQ_SHARED(float, warps, kConvWarps*(kTaps + 1) * kWarp * K);
  SQ_DYNAMIC_SHARED(float, sums);
  const ConvPlace at = conv_place(p, p.inputs, K);
  const int64_t b = at.b, ci = at.channel + threadIdx.x * K, first = at.block * kConvBlock + threadIdx.y * kConvRows;
  const bool inside = ci < p.inputs;
  const int64_t stop = !inside || first >= p.time ? first : p.time - first < kConvRows ? p.time : first + kConvRows;
  for (int64_t g = 0; g < p.groups; ++g) {
    const int64_t c = inside ? conv_output(p, ci, g) : 0;
    float dw[kTaps + 1][K] = {};
    if (first < stop) {
      float w[kTaps][K], bias[K], window[kTaps][K], slope[kTaps][K] = {};
      conv_weights<T>(p, c, w, bias);
      ConvSpan s = conv_span(p, b, first), finished = s;
      // Step t makes the slope of row t, and from it and those before, dx of row t - (taps - 1).
      for (int64_t t = first; t < stop + p.taps - 1; ++t) {
        float dz[K] = {};
        if (t < p.time) {
          if (t == s.end) s = conv_span(p, b, t);
          if (t == first || t == s.start) conv_window<T>(p, b, s, t, ci, window);
          conv_load<K>(conv_x<T>(p, b, t, ci), window[0]);
          conv_load<K>(static_cast<const G*>(p.grad_y) + (b * p.time + t) * p.channels + c, dz);
          const int exist = conv_exist(p, s, t);
          if (p.silu) {
            float z[K];
            conv_sum(w, window, bias, exist, z);
            SQ_UNROLL
            for (int k = 0; k < K; ++k) dz[k] *= activate_grad<Activation::kSilu>(z[k]);
          }
          if (t < stop) {
            SQ_UNROLL
            for (int k = 0; k < K; ++k) dw[kTaps][k] += dz[k];
            SQ_UNROLL
            for (int j = 0; j < kTaps; ++j) {
              if (j < exist) {
                SQ_UNROLL
                for (int k = 0; k < K; ++k) dw[j][k] = fmaf(dz[k], window[j][k], dw[j][k]);
              }
            }
          }
          conv_shift(window);
        }
        conv_shift(slope);
        SQ_UNROLL
        for (int k = 0; k < K; ++k) slope[0][k] = dz[k];
        const int64_t u = t - (p.taps - 1);
        if (u < first) continue;
        if (u == finished.end) finished = conv_span(p, b, u);
        float* sum = sums + (((u - first) + threadIdx.y * kConvRows) * kWarp + threadIdx.x) * K;
        float dx[K];
        SQ_UNROLL
        for (int k = 0; k < K; ++k) dx[k] = g == 0 ? 0.0f : sum[k];
        SQ_UNROLL
        for (int j = 0; j < kTaps; ++j) {  // row u + j, whose slope came taps - 1 - j steps ago
          if (j < p.taps && u + j < finished.end) {
            SQ_UNROLL
            for (int k = 0; k < K; ++k) dx[k] = fmaf(w[j][k], conv_at(slope, p.taps - 1 - j, k), dx[k]);
          }
        }
        if (g < p.groups - 1) {
          SQ_UNROLL
          for (int k = 0; k < K; ++k) sum[k] = dx[k];
          continue;
        }
        const int64_t column = u - (finished.end - (p.taps - 1));
        if (p.grad_final != nullptr && column >= 0) {
          SQ_UNROLL
          for (int k = 0; k < K; ++k) {
            const int64_t offset = (finished.n * p.inputs + ci + k) * (p.taps - 1) + column;
            dx[k] += sq::to_float(sq::load_nc(static_cast<const T*>(p.grad_final) + offset));
          }
        }
        store_chunk<true>(static_cast<T*>(p.dx) + (b * p.time + u) * p.inputs + ci, K, dx);
      }
    }
    SQ_UNROLL
    for (int j = 0; j <= kTaps; ++j) {
      SQ_UNROLL
      for (int k = 0; k < K; ++k) {
        warps[((threadIdx.y * (kTaps + 1) + j) * kWarp + threadIdx.x) * K + k] = dw[j][k];
      }
    }
    __syncthreads();
    if (threadIdx.y == 0 && inside) {
      float* partial = p.partial + (b * ceil_div(p.time, kConvBlock) + at.block) * (p.taps + 1) * p.channels + c;
      for (int j = 0; j <= kTaps; ++j) {
        if (j >= p.taps && j < kTaps) continue;
        const int64_t row = j == kTaps ? p.taps : p.taps - 1 - j;
        SQ_UNROLL
        for (int k = 0; k < K; ++k) {
          float sum = 0.0f;
          SQ_UNROLL
          for (int y = 0; y < kConvWarps; ++y) sum += warps[((y * (kTaps + 1) + j) * kWarp + threadIdx.x) * K + k];
          sq::store(partial + row * p.channels + k, sum);
        }
      }
    }
    __syncthreads();
  }
}

/// dweight and dbias from the partial sums of `blocks` blocks, in their order.
template <class T>
__global__ void __launch_bounds__(kConvThreads) causal_conv1d_reduce_kernel(ConvParams p, int64_t blocks) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kConvThreads + threadIdx.x, rows = p.taps + 1;
  if (i >= rows * p.channels) return;
  const int64_t row = i / p.channels, c = i - row * p.channels;
  if (row == p.taps && p.dbias == nullptr) return;
  float sum = 0.0f;
  for (int64_t k = 0; k < blocks; ++k) sum += sq::load_nc(p.partial + k * rows * p.channels + i);
  T* out = row == p.taps ? static_cast<T*>(p.dbias) + c : static_cast<T*>(p.dweight) + c * p.taps + row;
  sq::store(out, sq::from_float<T>(sum));
}

/// One channel of one sequence per thread: the last taps - 1 inputs.
template <class T>
__global__ void __launch_bounds__(kConvThreads) causal_conv1d_final_kernel(ConvParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kConvThreads + threadIdx.x, past = p.taps - 1;
  if (i >= p.sequences * p.inputs) return;
  const int64_t n = i / p.inputs, c = i - n * p.inputs, b = p.cu_seqlens == nullptr ? n : 0;
  const ConvSpan s = conv_sequence(p, n);
  for (int64_t k = 0; k < past; ++k) {
    const int64_t t = s.end - past + k;
    T value = sq::from_float<T>(0.0f);
    if (t >= s.start) {
      value = sq::load_nc(conv_x<T>(p, b, t, c));
    } else if (p.state != nullptr) {
      value = sq::load_nc(static_cast<const T*>(p.state) + i * past + k + (s.end - s.start));
    }
    sq::store(static_cast<T*>(p.final_state) + i * past + k, value);
  }
}

/// dstate of one channel of one sequence per thread: from the first taps - 1 tokens, and straight through short
/// sequences.
template <class T, class G>
__global__ void __launch_bounds__(kConvThreads) causal_conv1d_dstate_kernel(ConvParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kConvThreads + threadIdx.x, past = p.taps - 1;
  if (i >= p.sequences * p.inputs) return;
  const int64_t n = i / p.inputs, ci = i - n * p.inputs, b = p.cu_seqlens == nullptr ? n : 0;
  const ConvSpan s = conv_sequence(p, n);
  const int64_t length = s.end - s.start;
  float sum[kConvMaxTaps] = {};
  for (int64_t g = 0; g < p.groups; ++g) {
    const int64_t c = conv_output(p, ci, g);
    float w[kConvMaxTaps][1], bias[1], window[kConvMaxTaps][1];
    conv_weights<T>(p, c, w, bias);
    SQ_UNROLL
    for (int r = 0; r < kConvMaxTaps - 1; ++r) {
      if (r >= past || r >= length) continue;
      const int64_t t = s.start + r;
      float dz = sq::to_float(sq::load_nc(static_cast<const G*>(p.grad_y) + (b * p.time + t) * p.channels + c));
      if (p.silu) {
        float z[1];
        conv_window<T>(p, b, s, t, ci, window);
        conv_load<1>(conv_x<T>(p, b, t, ci), window[0]);
        conv_sum(w, window, bias, p.taps, z);
        dz *= activate_grad<Activation::kSilu>(z[0]);
      }
      // Column k lies past - k tokens before the sequence, past - k + r before row r.
      SQ_UNROLL
      for (int j = r + 1; j < kConvMaxTaps; ++j) {
        if (j <= past) sum[j - r - 1] = fmaf(w[j][0], dz, sum[j - r - 1]);
      }
    }
  }
  SQ_UNROLL
  for (int back = 0; back < kConvMaxTaps - 1;
       ++back) {  // sum[back] is the gradient of the input back + 1 before the start
    const int64_t k = past - 1 - back;
    if (k < 0) continue;
    float total = sum[back];
    if (p.grad_final != nullptr && k >= length) {
      total += sq::to_float(sq::load_nc(static_cast<const T*>(p.grad_final) + i * past + k - length));
    }
    sq::store(static_cast<T*>(p.dstate) + i * past + k, sq::from_float<T>(total));
  }
}

/// One decoding step; one input channel of one row per thread, which reads its state before it writes there.
template <class T>
__global__ void __launch_bounds__(kConvThreads) causal_conv1d_update_kernel(ConvUpdateParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kConvThreads + threadIdx.x, past = p.taps - 1;
  if (i >= p.batch * p.inputs) return;
  const int64_t b = i / p.inputs, ci = i - b * p.inputs;
  const int64_t n = p.indices == nullptr ? b : sq::load_nc(p.indices + b);
  const bool live = n >= 0 && n < p.states, ring = p.seqlens != nullptr && p.length > 0;
  T* state = static_cast<T*>(p.state) + (live ? n : 0) * p.state_stride_n + ci * p.state_stride_c;
  const T* x = static_cast<const T*>(p.x) + b * p.tokens * p.inputs + ci;
  const int length = static_cast<int>(p.length);  // in 32 bits: a 64-bit division is a call that spills
  int position = ring ? sq::load_nc(p.seqlens + b) % length : 0;
  if (position < 0) position += length;
  float window[kConvMaxTaps];  // [j]: the input j tokens back
  SQ_UNROLL
  for (int j = 1; j < kConvMaxTaps; ++j) {
    window[j - 1] = 0.0f;
    if (live && j <= past) {
      int slot = (ring ? position : length) - j;
      if (slot < 0) slot += length;
      window[j - 1] = sq::to_float(sq::load(state + slot * p.state_stride_l));
    }
  }
  for (int64_t t = 0; t < p.tokens; ++t) {
    SQ_UNROLL
    for (int j = kConvMaxTaps - 1; j > 0; --j) window[j] = window[j - 1];
    window[0] = sq::to_float(sq::load_nc(x + t * p.inputs));
    for (int64_t g = 0; g < p.groups; ++g) {
      const int64_t c = conv_output(p, ci, g), out = (b * p.tokens + t) * p.channels + c;
      float z = p.bias == nullptr ? 0.0f : sq::to_float(sq::load_nc(static_cast<const T*>(p.bias) + c));
      SQ_UNROLL
      for (int j = kConvMaxTaps - 1; j >= 0; --j) {
        if (j <= past) {
          z = fmaf(sq::to_float(sq::load_nc(static_cast<const T*>(p.weight) + c * p.taps + past - j)), window[j], z);
        }
      }
      if (p.silu) z = activate<Activation::kSilu>(z);
      if (p.residual != nullptr) z += sq::to_float(sq::load_nc(static_cast<const T*>(p.residual) + out));
      sq::store(static_cast<T*>(p.y) + out, sq::from_float<T>(live ? z : 0.0f));
    }
  }
  if (!live) return;
  if (ring) {
    for (int64_t t = 0; t < p.tokens; ++t) {
      sq::store(state + position * p.state_stride_l, sq::load_nc(x + t * p.inputs));
      if (++position == length) position = 0;
    }
  } else {
    for (int64_t l = 0; l < p.length; ++l) {
      const int64_t from = l + p.tokens;
      const T value =
          from < p.length ? sq::load(state + from * p.state_stride_l) : sq::load_nc(x + (from - p.length) * p.inputs);
      sq::store(state + l * p.state_stride_l, value);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------- launches

/// Whether accesses of K elements are aligned in every row of every tensor of the call. Elements of grad_y are G.
template <int K, class T, class G = T>
bool conv_aligned(const ConvParams& p) {
  bool aligned = p.channels % K == 0 && p.inputs % K == 0 && p.x_stride_b % K == 0 && p.x_stride_t % K == 0;
  aligned = aligned && p.residual_stride_b % K == 0 && p.residual_stride_t % K == 0;
  aligned = aligned && (p.groups == 1 || p.head_dim % K == 0);
  for (const void* tensor : {p.x, p.residual, static_cast<const void*>(p.y), static_cast<const void*>(p.dx)}) {
    aligned = aligned && reinterpret_cast<uintptr_t>(tensor) % (K * sizeof(T)) == 0;
  }
  return aligned && reinterpret_cast<uintptr_t>(p.grad_y) % (K * sizeof(G)) == 0;
}

/// fn(constant of the taps): 2, 3 and 4 have kernels of their own.
template <class Fn>
void with_taps(int taps, Fn&& fn) {
  switch (taps) {
    case 2:
      return fn(std::integral_constant<int, 2>{});
    case 3:
      return fn(std::integral_constant<int, 3>{});
    case 4:
      return fn(std::integral_constant<int, 4>{});
    default:
      return fn(std::integral_constant<int, kConvMaxTaps>{});
  }
}

template <class T>
void causal_conv1d_final_state(const ConvParams& p, sq::stream_t stream) {
  if (p.final_state == nullptr || p.sequences * p.inputs == 0 || p.taps == 1) return;
  SQ_LAUNCH((causal_conv1d_final_kernel<T>), ceil_div(p.sequences * p.inputs, kConvThreads), kConvThreads, 0, stream,
            p);
}

template <class T>
void causal_conv1d_forward(const ConvParams& p, sq::stream_t stream) {
  causal_conv1d_final_state<T>(p, stream);
  if (p.batch * p.time * p.channels == 0) return;
  with_taps(p.taps, [&](auto taps) {
    constexpr int K = taps > 4 ? std::min(4, kVecElems<T>) : kVecElems<T>;
    const dim3 block(kWarp, kConvWarps);
    if (conv_aligned<K, T>(p)) {
      SQ_LAUNCH((causal_conv1d_fwd_kernel<T, K, taps>), conv_grid(p, p.channels, K), block, 0, stream, p);
    } else {
      SQ_LAUNCH((causal_conv1d_fwd_kernel<T, 1, taps>), conv_grid(p, p.channels, 1), block, 0, stream, p);
    }
  });
}

/// Elements of grad_y are G.
template <class T, class G>
void causal_conv1d_backward(const ConvParams& p, sq::stream_t stream) {
  const bool any = p.batch * p.time * p.channels > 0;
  if (any) {
    with_taps(p.taps, [&](auto taps) {
      constexpr int K = taps > 4 ? 2 : 4;
      const dim3 block(kWarp, kConvWarps);
      const auto shared = [&](int per_thread) {
        return p.groups == 1 ? size_t{0} : static_cast<size_t>(kConvBlock) * kWarp * per_thread * sizeof(float);
      };
      if (conv_aligned<K, T, G>(p)) {
        SQ_LAUNCH((causal_conv1d_bwd_kernel<T, G, K, taps>), conv_grid(p, p.inputs, K), block, shared(K), stream, p);
      } else {
        SQ_LAUNCH((causal_conv1d_bwd_kernel<T, G, 1, taps>), conv_grid(p, p.inputs, 1), block, shared(1), stream, p);
      }
    });
  }
  if (p.channels > 0) {
    SQ_LAUNCH((causal_conv1d_reduce_kernel<T>), ceil_div((p.taps + 1) * p.channels, kConvThreads), kConvThreads, 0,
              stream, p, any ? p.batch * p.blocks() : int64_t{0});
  }
  if (p.dstate != nullptr && p.sequences * p.inputs > 0 && p.taps > 1) {
    SQ_LAUNCH((causal_conv1d_dstate_kernel<T, G>), ceil_div(p.sequences * p.inputs, kConvThreads), kConvThreads, 0,
              stream, p);
  }
}

template <class T>
void causal_conv1d_step(const ConvUpdateParams& p, sq::stream_t stream) {
  if (p.batch * p.inputs * p.tokens == 0) return;
  SQ_LAUNCH((causal_conv1d_update_kernel<T>), ceil_div(p.batch * p.inputs, kConvThreads), kConvThreads, 0, stream, p);
}

}  // namespace subquad::cuda
