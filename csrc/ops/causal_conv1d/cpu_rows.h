// Rows of the causal depthwise convolution, for the kernels that make them. One instruction set. A vector of channels
// walks down a tile of rows with its last inputs in registers, so every input is loaded once; the next vector follows
// beside it, so that memory is read in as many forward streams as the tile has rows: few enough for the ways of a
// cache, since rows often lie a multiple of its size apart.
#pragma once

#include "common/half.h"
#include "common/integers.h"
#include "cpu/simd/vec.h"
#include "ops/causal_conv1d/cpu.h"

namespace subquad::cpu::SUBQUAD_ISA::conv {

using Params = CausalConv1dParams;

inline __attribute__((always_inline)) Vec silu(Vec x) { return x / (1.0f + vector_exp(-x)); }

inline __attribute__((always_inline)) Vec silu_grad(Vec x) {
  const Vec s = 1.0f / (1.0f + vector_exp(-x));
  return s * (1.0f + x * (1.0f - s));
}

/// The sequence that a token belongs to: its index, its first token and the token after its last.
struct Span {
  int64_t n, start, end;
};

inline Span span_of(const Params& p, int64_t b, int64_t t) {
  if (p.cu_seqlens == nullptr) return {b, 0, p.time};
  const int64_t n = clamp(p.sequence[t], 0, p.sequences - 1);
  return {n, clamp(p.cu_seqlens[n], 0, t), clamp(p.cu_seqlens[n + 1], t + 1, p.time)};
}

inline int64_t input_of(const Params& p, int64_t c) {
  const int64_t h = c / p.head_dim;
  return h / p.groups * p.head_dim + (c - h * p.head_dim);
}

template <class T>
const T* x_row(const Params& p, int64_t b, int64_t t, int64_t c) {
  return static_cast<const T*>(p.x) + b * p.x_stride_b + t * p.x_stride_t + c;
}

/// X at row t of a sequence, which may lie before its start if it has a state.
template <class T>
float input_at(const Params& p, int64_t b, const Span& s, int64_t t, int64_t c) {
  if (t >= s.start) return to_float(*x_row<T>(p, b, t, c));
  const T* state = static_cast<const T*>(p.state) + (s.n * p.inputs + c) * (p.taps - 1);
  return to_float(state[p.taps - 1 - (s.start - t)]);
}

/// Rows t - (taps - 1) .. t - 1 of channels [c, c + n), as floats, for a window that begins before its sequence.
template <class T>
void gather_history(const Params& p, int64_t b, const Span& s, int64_t t, int64_t c, int64_t n, float* out) {
  for (int64_t i = 0; i < p.taps - 1; ++i) {
    for (int64_t k = 0; k < n; ++k) out[i * n + k] = input_at<T>(p, b, s, t - (p.taps - 1) + i, c + k);
  }
}

/// Some rows of one sequence whose taps all exist. Elements of x are T, of the result Y.
template <class T, class Y>
struct Rows {
  const T* x;  // first row, first channel
  int64_t x_stride;
  const float* history;  // [taps - 1, channels], or null: the rows before x
  const T* residual;     // or null
  int64_t residual_stride;
  Y* y;
  int64_t y_stride;
  const float* weight;  // oldest tap of the first channel
  const float* bias;
  int64_t weight_stride;
  int64_t rows, channels;
};

/// Stores two vectors, one after the other.
template <class T>
inline __attribute__((always_inline)) void store_two(T* p, Vec a, Vec b) {
  vec_store(p, a);
  vec_store(p + kLanes, b);
}
#if defined(SQ_AVX512)
/// Rounded as `vec_store` does; the upper halves of both leave in one shuffle.
inline __attribute__((always_inline)) void store_two(BFloat16* p, Vec a, Vec b) {
  typedef uint16_t Halves __attribute__((vector_size(64)));
  constexpr Halves kUpper = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                             33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const auto rounded = [](Vec x) __attribute__((always_inline)) {
    const VecBits bits = same_bits<VecBits>(x), up = bits + 0x7fffu + (bits >> 16 & 1u);
    return same_bits<Halves>(x == x ? up : bits | 0x400000u);  // NaN stays NaN
  };
  const Halves both = __builtin_shuffle(rounded(a), rounded(b), kUpper);
  std::memcpy(p, &both, sizeof both);
}
#endif

/// Walks down kVecs vectors of channels, or `lanes` channels of one.
template <int kTaps, bool kSilu, int kVecs, bool kWhole, class T, class Y>
inline __attribute__((always_inline)) void convolve_lanes(const Rows<T, Y>& r, int64_t c, int64_t lanes) {
  const auto load = [lanes](const auto* p, int v)
                        __attribute__((always_inline)) { return vec_load_part<kWhole>(p + v * kLanes, lanes); };
  Vec w[kTaps][kVecs], window[kTaps][kVecs], bias[kVecs], z[kVecs];
  for (int v = 0; v < kVecs; ++v) {
    for (int i = 0; i < kTaps; ++i) w[i][v] = load(r.weight + i * r.weight_stride + c, v);
    bias[v] = load(r.bias + c, v);
    for (int i = 0; i < kTaps - 1; ++i) {
      window[i][v] = r.history != nullptr ? load(r.history + i * r.channels + c, v)
                                          : load(r.x + (i - (kTaps - 1)) * r.x_stride + c, v);
    }
  }
  const auto row = [&](int64_t t) __attribute__((always_inline)) {
    for (int v = 0; v < kVecs; ++v) {
      window[kTaps - 1][v] = load(r.x + t * r.x_stride + c, v);
      z[v] = bias[v];
      for (int i = 0; i < kTaps; ++i) z[v] = w[i][v] * window[i][v] + z[v];
      if constexpr (kSilu) z[v] = conv::silu(z[v]);
      if (r.residual != nullptr) z[v] += load(r.residual + t * r.residual_stride + c, v);
      for (int i = 0; i < kTaps - 1; ++i) window[i][v] = window[i + 1][v];
    }
    Y* y = r.y + t * r.y_stride + c;
    if constexpr (kVecs == 2) {
      store_two(y, z[0], z[1]);
    } else {
      vec_store_part<kWhole>(y, z[0], lanes);
    }
  };
  if constexpr (kWhole) {
#pragma GCC unroll 4
    for (int64_t t = 0; t < r.rows; ++t) row(t);
  } else {
    for (int64_t t = 0; t < r.rows; ++t) row(t);
  }
}

template <int kTaps, bool kSilu, class T, class Y>
void convolve(const Rows<T, Y>& r) {
  int64_t c = 0;
  if constexpr (kTaps <= 4) {  // as many as registers hold: a line of 16-bit elements at once
    for (; c + 2 * kLanes <= r.channels; c += 2 * kLanes) convolve_lanes<kTaps, kSilu, 2, true>(r, c, kLanes);
  }
  for (; c + kLanes <= r.channels; c += kLanes) convolve_lanes<kTaps, kSilu, 1, true>(r, c, kLanes);
  if (c < r.channels) convolve_lanes<kTaps, kSilu, 1, false>(r, c, r.channels - c);
}

#define SQ_BY_TAPS(taps, call) \
  switch (taps) {              \
    case 1:                    \
      return call(1);          \
    case 2:                    \
      return call(2);          \
    case 3:                    \
      return call(3);          \
    case 4:                    \
      return call(4);          \
    case 5:                    \
      return call(5);          \
    case 6:                    \
      return call(6);          \
    case 7:                    \
      return call(7);          \
    default:                   \
      return call(8);          \
  }

template <class T, class Y>
void convolve(const Rows<T, Y>& r, int taps, bool silu) {
#define SQ_CALL(n) (silu ? convolve<n, true>(r) : convolve<n, false>(r))
  SQ_BY_TAPS(taps, SQ_CALL)
#undef SQ_CALL
}

/// Rows [t0, t1) of n output channels from c on, which lie in one head, to y, whose rows are `y_stride` apart.
/// `scratch`: kConvMaxTaps * n floats, needed with a state only. `tile`: rows at once, at least kConvMaxTaps.
template <class T, class Y>
void forward_head(const Params& p, const float* packed, float* scratch, int64_t b, int64_t t0, int64_t t1, int64_t c,
                  int64_t n, Y* y, int64_t y_stride, int64_t tile = kConvRows) {
  const int64_t input = input_of(p, c);
  Rows<T, Y> r{};
  r.x_stride = p.x_stride_t;
  r.residual_stride = p.residual_stride_t;
  r.y_stride = y_stride;
  r.weight_stride = p.channels;
  r.bias = packed + p.taps * p.channels + c;
  r.channels = n;
  for (int64_t t = t0; t < t1; t += r.rows) {
    const Span s = span_of(p, b, t);
    const int64_t before = t - s.start, stop = t1 < s.end ? t1 : s.end;
    int taps = p.taps;
    r.history = nullptr;
    r.rows = stop - t < tile ? stop - t : tile;
    if (before < p.taps - 1) {
      if (p.state != nullptr) {
        gather_history<T>(p, b, s, t, input, n, scratch);
        r.history = scratch;
      } else {  // taps that do not exist are left out, one row at a time
        taps = static_cast<int>(before) + 1;
        r.rows = 1;
      }
    }
    r.x = x_row<T>(p, b, t, input);
    r.y = y + (t - t0) * y_stride;
    r.residual = p.residual == nullptr
                     ? nullptr
                     : static_cast<const T*>(p.residual) + b * p.residual_stride_b + t * p.residual_stride_t + c;
    r.weight = packed + (p.taps - taps) * p.channels + c;
    convolve<T>(r, taps, p.silu);
  }
}

}  // namespace subquad::cpu::SUBQUAD_ISA::conv
