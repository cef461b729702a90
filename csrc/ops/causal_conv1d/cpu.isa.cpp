// Causal depthwise convolution for one CPU instruction set; the forward walk is in causal_conv1d_rows.h.
#include "ops/causal_conv1d/cpu.h"

#include "common/activations.h"
#include "ops/causal_conv1d/cpu_rows.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using namespace conv;

template <class T>
void pack(const Params& p, float* packed) {
  const T *weight = static_cast<const T*>(p.weight), *bias = static_cast<const T*>(p.bias);
  for (int64_t c = 0; c < p.channels; ++c) {
    for (int64_t w = 0; w < p.taps; ++w) packed[w * p.channels + c] = to_float(weight[c * p.taps + w]);
    packed[p.taps * p.channels + c] = bias == nullptr ? 0.0f : to_float(bias[c]);
  }
}

// ------------------------------------------------------------------------------------------------------------ forward

template <class T>
void forward(const Params& p, const float* packed, float* scratch, int64_t b, int64_t t0, int64_t t1, int64_t c0,
             int64_t c1) {
  for (int64_t c = c0; c < c1;) {
    const int64_t left = p.head_dim - c % p.head_dim, n = p.groups == 1 || c1 - c < left ? c1 - c : left;
    T* y = static_cast<T*>(p.y) + (b * p.time + t0) * p.channels + c;
    forward_head<T>(p, packed, scratch, b, t0, t1, c, n, y, p.channels);
    c += n;
  }
}

// ----------------------------------------------------------------------------------------------------------- backward

/// Rows [t0, t1) of one sequence, and the rows after them that their dx depends on. Elements of grad_y are G.
template <class T, class G>
struct BackRows {
  const Params* p;
  Span s;
  const T* x;            // row t0, first channel
  const G* grad;         // row t0 of grad_y
  T* dx;                 // row t0
  float* sum;            // [t1 - t0, channels]: dx of earlier groups
  const float* history;  // [taps - 1, channels] or null
  const T* grad_final;   // first channel, or null: channels taps - 1 apart
  const float* weight;
  const float* bias;
  float* partial;  // oldest tap of the first channel
  int64_t t0, t1, channels;
  bool first_group, last_group;
};

struct Edge {
  static constexpr bool value = true;
};
struct Inner {
  static constexpr bool value = false;
};

template <int kTaps, bool kSilu, bool kWhole, class T, class G>
inline __attribute__((always_inline)) void backward_lanes(const BackRows<T, G>& r, int64_t c, int64_t lanes) {
  const Params& p = *r.p;
  const Vec zero = vec_set(0.0f);
  Vec w[kTaps], window[kTaps], slope[kTaps], dw[kTaps], db = zero;
  for (int i = 0; i < kTaps; ++i) {
    w[i] = vec_load_part<kWhole>(r.weight + i * p.channels + c, lanes);
    slope[i] = dw[i] = window[i] = zero;
  }
  const Vec bias = vec_load_part<kWhole>(r.bias + c, lanes);
  for (int i = 0; i < kTaps - 1; ++i) {
    if (r.history != nullptr) {
      window[i] = vec_load_part<kWhole>(r.history + i * r.channels + c, lanes);
    } else if (r.t0 - (kTaps - 1) + i >= r.s.start) {
      window[i] = vec_load_part<kWhole>(r.x + (i - (kTaps - 1)) * p.x_stride_t + c, lanes);
    }
  }
  // Step t makes the slope of row t and, from it and those before, dx of row t - (kTaps - 1).
  const auto step = [&](int64_t t, auto edge) __attribute__((always_inline)) {
    constexpr bool kEdge = decltype(edge)::value;
    const int64_t i0 = t - r.t0;
    Vec dz = zero;
    if (!kEdge || t < r.s.end) {
      const int exist = !kEdge || p.state != nullptr || t - r.s.start >= kTaps ? kTaps : int(t - r.s.start) + 1;
      window[kTaps - 1] = vec_load_part<kWhole>(r.x + i0 * p.x_stride_t + c, lanes);
      dz = vec_load_part<kWhole>(r.grad + i0 * p.channels + c, lanes);
      if constexpr (kSilu) {
        Vec z = bias;
        for (int i = 0; i < kTaps; ++i) {
          if (!kEdge || kTaps - i <= exist) z = w[i] * window[i] + z;
        }
        dz *= silu_grad(z);
      }
      if (!kEdge || t < r.t1) {
        db += dz;
        for (int i = 0; i < kTaps; ++i) {
          if (!kEdge || kTaps - i <= exist) dw[i] = dz * window[i] + dw[i];
        }
      }
    }
    slope[kTaps - 1] = dz;
    const int64_t u = t - (kTaps - 1), j0 = u - r.t0;
    if (!kEdge || (u >= r.t0 && u < r.t1)) {
      Vec sum = r.first_group ? zero : vec_load_part<kWhole>(r.sum + j0 * r.channels + c, lanes);
      for (int j = 0; j < kTaps; ++j) {  // slope[j] belongs to row u + j
        if (!kEdge || j < r.s.end - u) sum = w[kTaps - 1 - j] * slope[j] + sum;
      }
      if (!r.last_group) {
        vec_store_part<kWhole>(r.sum + j0 * r.channels + c, sum, lanes);
      } else {
        const int64_t column = u - (r.s.end - (kTaps - 1));
        if (kEdge && r.grad_final != nullptr && column >= 0) {
          for (int64_t k = 0; k < lanes; ++k) sum[k] += to_float(r.grad_final[(c + k) * (kTaps - 1) + column]);
        }
        vec_store_part<kWhole>(r.dx + j0 * p.inputs + c, sum, lanes);
      }
    }
    for (int i = 0; i < kTaps - 1; ++i) window[i] = window[i + 1], slope[i] = slope[i + 1];
  };
  // Inside, all taps exist, and so do the row that is finished and those that it depends on. The last, partial vector
  // takes every row for one at an edge: half the code to compile.
  const int64_t last = r.t1 + kTaps - 1, from = r.t0 + kTaps - 1;
  for (int64_t t = r.t0; t < last; ++t) {
    if constexpr (kWhole) {
      for (; t >= from && t < r.t1; ++t) step(t, Inner{});
    }
    step(t, Edge{});
  }
  for (int i = 0; i <= kTaps; ++i) {
    float* sum = r.partial + i * p.channels + c;
    vec_store_part<kWhole>(sum, vec_load_part<kWhole>(sum, lanes) + (i < kTaps ? dw[i < kTaps ? i : 0] : db), lanes);
  }
}

template <int kTaps, bool kSilu, class T, class G>
void backward_rows(const BackRows<T, G>& r) {
  int64_t c = 0;
  for (; c + kLanes <= r.channels; c += kLanes) backward_lanes<kTaps, kSilu, true>(r, c, kLanes);
  if (c < r.channels) backward_lanes<kTaps, kSilu, false>(r, c, r.channels - c);
}

template <class T, class G>
void backward_rows(const BackRows<T, G>& r, int taps, bool silu) {
#define SQ_CALL(n) (silu ? backward_rows<n, true>(r) : backward_rows<n, false>(r))
  SQ_BY_TAPS(taps, SQ_CALL)
#undef SQ_CALL
}

template <class T, class G>
void backward(const Params& p, const float* packed, float* scratch, int64_t b, int64_t block, int64_t c0, int64_t c1) {
  const int64_t t0 = block * kConvBlock, t1 = t0 + kConvBlock < p.time ? t0 + kConvBlock : p.time, n = c1 - c0;
  const int64_t head = c0 / p.head_dim, inside = c0 - head * p.head_dim;
  float* partial = p.partial + (b * p.blocks() + block) * (p.taps + 1) * p.channels;
  BackRows<T, G> r{};
  r.p = &p;
  r.channels = n;
  r.sum = scratch;
  float* history = scratch + kConvTile * n;
  for (int64_t g = 0; g < p.groups; ++g) {
    const int64_t c = p.groups == 1 ? c0 : (head * p.groups + g) * p.head_dim + inside;
    for (int64_t i = 0; i <= p.taps; ++i) {
      for (int64_t k = 0; k < n; ++k) partial[i * p.channels + c + k] = 0.0f;
    }
  }
  for (int64_t t = t0; t < t1; t = r.t1) {
    r.s = span_of(p, b, t);
    r.t0 = t;
    r.t1 = t1 < r.s.end ? t1 : r.s.end;
    if (r.t1 - t > kConvTile) r.t1 = t + kConvTile;
    r.x = x_row<T>(p, b, t, c0);
    r.dx = static_cast<T*>(p.dx) + (b * p.time + t) * p.inputs + c0;
    r.grad_final = p.grad_final == nullptr
                       ? nullptr
                       : static_cast<const T*>(p.grad_final) + (r.s.n * p.inputs + c0) * (p.taps - 1);
    r.history = nullptr;
    if (p.state != nullptr && t - r.s.start < p.taps - 1) {
      gather_history<T>(p, b, r.s, t, c0, n, history);
      r.history = history;
    }
    for (int64_t g = 0; g < p.groups; ++g) {
      const int64_t c = p.groups == 1 ? c0 : (head * p.groups + g) * p.head_dim + inside;
      r.grad = static_cast<const G*>(p.grad_y) + (b * p.time + t) * p.channels + c;
      r.weight = packed + c;
      r.bias = packed + p.taps * p.channels + c;
      r.partial = partial + c;
      r.first_group = g == 0;
      r.last_group = g == p.groups - 1;
      backward_rows(r, p.taps, p.silu);
    }
  }
}

template <class T>
void reduce(const Params& p, int64_t c0, int64_t c1) {
  const int64_t blocks = p.batch * p.blocks();
  for (int64_t c = c0; c < c1; c += kLanes) {
    const int64_t lanes = c1 - c < kLanes ? c1 - c : kLanes;
    for (int64_t i = 0; i <= p.taps; ++i) {
      if (i == p.taps && p.dbias == nullptr) break;
      Vec sum = vec_set(0.0f);
      for (int64_t k = 0; k < blocks; ++k) {
        sum += vec_load_part<false>(p.partial + (k * (p.taps + 1) + i) * p.channels + c, lanes);
      }
      for (int64_t k = 0; k < lanes; ++k) {
        T* out = i == p.taps ? static_cast<T*>(p.dbias) + c + k : static_cast<T*>(p.dweight) + (c + k) * p.taps + i;
        *out = from_float<T>(sum[k]);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- states

Span sequence_of(const Params& p, int64_t n) {
  if (p.cu_seqlens == nullptr) return {n, 0, p.time};
  const int64_t start = clamp(p.cu_seqlens[n], 0, p.time);
  return {n, start, clamp(p.cu_seqlens[n + 1], start, p.time)};
}

template <class T>
void final_state(const Params& p, int64_t n) {
  const Span s = sequence_of(p, n);
  const int64_t past = p.taps - 1, b = p.cu_seqlens == nullptr ? n : 0;
  const T* state = static_cast<const T*>(p.state);
  T* out = static_cast<T*>(p.final_state) + n * p.inputs * past;
  for (int64_t c = 0; c < p.inputs; ++c) {
    for (int64_t k = 0; k < past; ++k) {
      const int64_t t = s.end - past + k;
      const int64_t slot = k + (s.end - s.start);
      out[c * past + k] = t >= s.start       ? *x_row<T>(p, b, t, c)
                          : state != nullptr ? state[(n * p.inputs + c) * past + slot]
                                             : from_float<T>(0.0f);
    }
  }
}

template <class T, class G>
void state_grad(const Params& p, const float* packed, int64_t n) {
  const Span s = sequence_of(p, n);
  const int64_t past = p.taps - 1, b = p.cu_seqlens == nullptr ? n : 0, length = s.end - s.start;
  const G* grad = static_cast<const G*>(p.grad_y);
  const T* grad_final = static_cast<const T*>(p.grad_final);
  T* out = static_cast<T*>(p.dstate) + n * p.inputs * past;
  const int64_t rows = length < past ? length : past;
  for (int64_t ci = 0; ci < p.inputs; ++ci) {
    float sum[kConvMaxTaps] = {};
    const int64_t h = ci / p.head_dim, e = ci - h * p.head_dim;
    for (int64_t g = 0; g < p.groups; ++g) {
      const int64_t c = p.groups == 1 ? ci : (h * p.groups + g) * p.head_dim + e;
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t t = s.start + i;
        float dz = to_float(grad[(b * p.time + t) * p.channels + c]);
        if (p.silu) {
          float z = packed[p.taps * p.channels + c];
          for (int64_t w = 0; w < p.taps; ++w) {
            z = packed[w * p.channels + c] * input_at<T>(p, b, s, t - past + w, ci) + z;
          }
          dz *= activate_grad<Activation::kSilu>(z);
        }
        for (int64_t k = i; k < past; ++k) sum[k] = packed[(k - i) * p.channels + c] * dz + sum[k];
      }
    }
    for (int64_t k = 0; k < past; ++k) {
      if (grad_final != nullptr && k >= length) sum[k] += to_float(grad_final[(n * p.inputs + ci) * past + k - length]);
      out[ci * past + k] = from_float<T>(sum[k]);
    }
  }
}

// ---------------------------------------------------------------------------------------------------- a decoding step

using Update = CausalConv1dUpdateParams;

/// The state of one row of the batch: element l of channel k at k * stride_c + l * stride_l.
template <class T>
struct State {
  T* data;
  int64_t stride_c, stride_l, length, position;
  bool ring;

  /// Where the input lies that came `back` tokens before the next.
  int64_t slot(int64_t back) const { return ring ? (position + length - back) % length : length - back; }
};

/// The taps of channels [c, c + n) as rows of n floats, the bias below them.
template <int kTaps, class T>
void pack_taps(const Update& p, int64_t c, int64_t n, float* packed) {
  const T *weight = static_cast<const T*>(p.weight) + c * kTaps, *bias = static_cast<const T*>(p.bias);
#pragma GCC ivdep
  for (int64_t k = 0; k < n; ++k) {
    for (int w = 0; w < kTaps; ++w) packed[w * n + k] = to_float(weight[k * kTaps + w]);
  }
  for (int64_t k = 0; k < n; ++k) packed[kTaps * n + k] = bias == nullptr ? 0.0f : to_float(bias[c + k]);
}

/// Rows of inputs before the new ones, oldest first. A dense state of just these is read and written in vectors.
template <int kPast, class T>
struct Past {
  T rows[kPast][kConvUpdateChannels];

  static bool dense(const State<T>& s) {
    return !s.ring && s.length == kPast && s.stride_c == kPast && (s.stride_l == 1 || kPast == 1);
  }

  void read(const State<T>& s, int64_t n) {
    if (dense(s)) {
#pragma GCC ivdep
      for (int64_t k = 0; k < n; ++k) {
        for (int i = 0; i < kPast; ++i) rows[i][k] = s.data[k * kPast + i];
      }
      return;
    }
    for (int i = 0; i < kPast; ++i) {
      const T* from = s.data + s.slot(kPast - i) * s.stride_l;
      for (int64_t k = 0; k < n; ++k) rows[i][k] = from[k * s.stride_c];
    }
  }

  /// The row that came `back` tokens before token t, of which x has `stride` elements each.
  const T* row(const T* x, int64_t stride, int64_t t, int64_t back) const {
    return t >= back ? x + (t - back) * stride : rows[kPast - (back - t)];
  }

  /// A dense state after `tokens` more.
  void shift(const State<T>& s, const T* x, int64_t stride, int64_t tokens, int64_t n) const {
    const T* from[kPast];
    for (int i = 0; i < kPast; ++i) from[i] = row(x, stride, tokens, kPast - i);
#pragma GCC ivdep
    for (int64_t k = 0; k < n; ++k) {
      for (int i = 0; i < kPast; ++i) s.data[k * kPast + i] = from[i][k];
    }
  }
};
template <class T>
struct Past<0, T> {
  static bool dense(const State<T>& s) { return s.length == 0; }
  void read(const State<T>&, int64_t) {}
  const T* row(const T* x, int64_t stride, int64_t t, int64_t) const { return x + t * stride; }
  void shift(const State<T>&, const T*, int64_t, int64_t, int64_t) const {}
};

/// Any state after `tokens` more.
template <class T>
void advance(const State<T>& s, const T* x, int64_t stride, int64_t tokens, int64_t n) {
  for (int64_t k = 0; k < n; ++k) {
    T* data = s.data + k * s.stride_c;
    if (s.ring) {
      for (int64_t t = 0; t < tokens; ++t) data[(s.position + t) % s.length * s.stride_l] = x[t * stride + k];
    } else {
      for (int64_t l = 0; l < s.length; ++l) {
        const int64_t from = l + tokens;
        data[l * s.stride_l] = from < s.length ? data[from * s.stride_l] : x[(from - s.length) * stride + k];
      }
    }
  }
}

template <int kTaps, bool kWhole, class T>
inline __attribute__((always_inline)) void update_lanes(const T* const* rows, const float* packed, int64_t n, bool silu,
                                                        const T* residual, T* y, int64_t k, int64_t lanes) {
  Vec z = vec_load_part<kWhole>(packed + kTaps * n + k, lanes);
  for (int w = 0; w < kTaps; ++w) {
    z = vec_load_part<kWhole>(packed + w * n + k, lanes) * vec_load_part<kWhole>(rows[w] + k, lanes) + z;
  }
  if (silu) z = conv::silu(z);
  if (residual != nullptr) z += vec_load_part<kWhole>(residual + k, lanes);
  vec_store_part<kWhole>(y + k, z, lanes);
}

template <int kTaps, class T>
void update(const Update& p, float* packed, int64_t b0, int64_t b1, int64_t c0, int64_t n) {
  constexpr int kPast = kTaps - 1;
  const int64_t head = c0 / p.head_dim, first = head * p.groups * p.head_dim + (c0 - head * p.head_dim);
  for (int64_t g = 0; g < p.groups; ++g) {
    pack_taps<kTaps, T>(p, first + g * p.head_dim, n, packed + g * (kTaps + 1) * n);
  }
  Past<kPast, T> past;
  for (int64_t b = b0; b < b1; ++b) {
    const int64_t index = p.indices == nullptr ? b : p.indices[b];
    const bool live = index >= 0 && index < p.states;
    const T* x = static_cast<const T*>(p.x) + b * p.tokens * p.inputs + c0;
    T* data = static_cast<T*>(p.state) + (live ? index : 0) * p.state_stride_n + c0 * p.state_stride_c;
    State<T> s{data, p.state_stride_c, p.state_stride_l, p.length, 0, p.seqlens != nullptr && p.length > 0};
    if (s.ring) s.position = p.seqlens[b] % s.length;
    if (s.position < 0) s.position += s.length;
    if (live) past.read(s, n);
    for (int64_t t = 0; t < p.tokens; ++t) {
      const T* rows[kTaps];
      for (int w = 0; w < kTaps; ++w) rows[w] = past.row(x, p.inputs, t, kPast - w);
      for (int64_t g = 0; g < p.groups; ++g) {
        const int64_t out = (b * p.tokens + t) * p.channels + first + g * p.head_dim;
        const T* residual = p.residual == nullptr ? nullptr : static_cast<const T*>(p.residual) + out;
        const float* taps = packed + g * (kTaps + 1) * n;
        T* y = static_cast<T*>(p.y) + out;
        int64_t k = 0;
        if (!live) {
          for (; k < n; ++k) y[k] = from_float<T>(0.0f);
        }
        for (; k + kLanes <= n; k += kLanes) update_lanes<kTaps, true>(rows, taps, n, p.silu, residual, y, k, kLanes);
        if (k < n) update_lanes<kTaps, false>(rows, taps, n, p.silu, residual, y, k, n - k);
      }
    }
    if (live && past.dense(s)) {
      past.shift(s, x, p.inputs, p.tokens, n);
    } else if (live) {
      advance(s, x, p.inputs, p.tokens, n);
    }
  }
}

template <class T>
void update(const Update& p, float* scratch, int64_t b0, int64_t b1, int64_t c0, int64_t c1) {
#define SQ_CALL(taps) update<taps, T>(p, scratch, b0, b1, c0, c1 - c0)
  SQ_BY_TAPS(p.taps, SQ_CALL)
#undef SQ_CALL
}

template <class T, class G>
CausalConv1dKernels kernels() {
  return {pack<T>, forward<T>, backward<T, G>, reduce<T>, final_state<T>, state_grad<T, G>, update<T>};
}

}  // namespace

CausalConv1dKernels causal_conv1d_kernels(DType dtype, bool wide_gradient) {
  return by_dtype<BFloat16, Half>(dtype,
                                  [=]<class T>(T) { return wide_gradient ? kernels<T, float>() : kernels<T, T>(); });
}

}  // namespace subquad::cpu::SUBQUAD_ISA
