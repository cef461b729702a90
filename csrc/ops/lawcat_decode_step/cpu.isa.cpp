// LAWCAT's decoding step for one CPU instruction set: convolution and feature map of a head in registers and stack,
// then one pass over its state.
#include "ops/lawcat_decode_step/cpu.h"

#include <string.h>

#include "common/exp.h"
#include "ops/gated_linear_attention/cpu_step.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using namespace gla;

static_assert(kDecodeMaxDim == kStepWidth);
constexpr float kInf = __builtin_inff();

/// x[0 .. d) = act(bias + taps of [past, token]) of one head.
template <class T, int kTaps>
void convolve(int64_t d, int taps, const T* token, const T* weight, const T* bias, bool silu, const T* past, float* x) {
  const int64_t w = kTaps > 0 ? kTaps : taps;
  // Tensors are read in order and widened; what is strided then is in the nearest cache.
  float filter[kStepWidth * kDecodeMaxTaps], before[kStepWidth * (kDecodeMaxTaps - 1)], now[kStepWidth];
  widen_token(weight, d * w, filter);
  widen_token(past, d * (w - 1), before);
  widen_token(token, d, now);
  if (bias != nullptr) {
    widen_token(bias, d, x);
  } else {
    for (int64_t c = 0; c < d; ++c) x[c] = 0.0f;
  }
  for (int64_t c = 0; c < d; ++c) {
    float sum = x[c];
    for (int64_t j = 0; j < w - 1; ++j) sum += filter[c * w + j] * before[c * (w - 1) + j];
    x[c] = sum + filter[c * w + w - 1] * now[c];
  }
  if (!silu) return;
  for (int64_t c = 0; c < d; ++c) x[c] = x[c] / (1.0f + vector_exp(-x[c]));
}

/// The token enters the past of one head: everything moves on by one, and each channel's last tap is new.
template <class T>
void shift(int64_t d, int64_t past_taps, const T* token, T* past) {
  if (past_taps == 0) return;
  memmove(past, past + 1, static_cast<size_t>(d * past_taps - 1) * sizeof(T));
  for (int64_t c = 0; c < d; ++c) past[c * past_taps + past_taps - 1] = token[c];
}

/// y[first .. first + kVecs vectors) of x W; the last vector may stand for fewer than kLanes columns.
template <class T, int kVecs, bool kWhole>
void project_columns(const float* x, const T* weight, int64_t d, int64_t f, int64_t first, float* y) {
  Vec even[kVecs] = {}, odd[kVecs] = {};  // one chain of additions would wait for itself
  const auto add = [&](int64_t c, Vec(&sums)[kVecs]) {
    const Vec value = vec_set(x[c]);
    for (int n = 0; n < kVecs; ++n)
      sums[n] += value * vec_load_part<kWhole>(weight + c * f + first + n * kLanes, f - first - n * kLanes);
  };
  int64_t c = 0;
  for (; c + 2 <= d; c += 2) add(c, even), add(c + 1, odd);
  if (c < d) add(c, even);
  for (int n = 0; n < kVecs; ++n) vec_store(y + first + n * kLanes, even[n] + odd[n]);
}

/// out = max(softmax(y), eps); y has -inf from f up to a whole vector.
void softmax(float* y, int64_t f, float eps, float* out) {
  Vec top = vec_load(y);
  for (int64_t i = kLanes; i < f; i += kLanes) {
    const Vec a = vec_load(y + i);
    top = a > top ? a : top;
  }
  float largest = top[0];
  for (int i = 1; i < kLanes; ++i) largest = top[i] > largest ? top[i] : largest;
  Vec sum{};
  for (int64_t i = 0; i < f; i += kLanes) {
    const Vec e = vector_exp(vec_load(y + i) - largest);
    vec_store(y + i, e);
    sum += e;
  }
  const float inverse = 1.0f / vec_sum(sum);
  for (int64_t j = 0; j < f; ++j) {
    const float value = y[j] * inverse;
    out[j] = value < eps ? eps : value;
  }
}

/// phi[0 .. 2 f) of one head.
template <class T>
void map_features(const float* x, const T* weight, int64_t d, int64_t f, float eps, float* phi) {
  constexpr int kVecs = 4;
  float up[kStepWidth], down[kStepWidth];
  int64_t i = 0;
  for (; i + kVecs * kLanes <= f; i += kVecs * kLanes) project_columns<T, kVecs, true>(x, weight, d, f, i, up);
  for (; i + kLanes <= f; i += kLanes) project_columns<T, 1, true>(x, weight, d, f, i, up);
  if (i < f) project_columns<T, 1, false>(x, weight, d, f, i, up);
  for (int64_t j = 0; j < f; ++j) down[j] = -up[j];
  for (int64_t j = f; j % kLanes != 0; ++j) up[j] = down[j] = -kInf;
  softmax(up, f, eps, phi);
  softmax(down, f, eps, phi + f);
}

/// log(1 + e) for e in [0, 1]: twice the series of atanh at e / (2 + e) <= 1 / 3.
inline float log1p_of(float e) {
  const float t = e / (2.0f + e), x = t * t;
  float sum = 2.0f / 13.0f;
  sum = sum * x + 2.0f / 11.0f;
  sum = sum * x + 2.0f / 9.0f;
  sum = sum * x + 2.0f / 7.0f;
  sum = sum * x + 2.0f / 5.0f;
  sum = sum * x + 2.0f / 3.0f;
  return (sum * x + 2.0f) * t;
}

/// decay[0 .. n) = exp(max(logsigmoid(u) / tau, clamp_min)).
template <class U>
void decays(const U* u, int64_t n, float tau, float clamp_min, float* decay) {
  widen_token(u, n, decay);
  for (int64_t c = 0; c < n; ++c) {
    const float x = decay[c], size = x < 0.0f ? -x : x;
    const float g = ((x > 0.0f ? 0.0f : x) - log1p_of(vector_exp(-size))) / tau;
    decay[c] = vector_exp(g < clamp_min ? clamp_min : g);
  }
}

template <class T, int kTaps>
void step(const LawcatDecodeStepParams& p, int64_t item) {
  const int64_t b = item % p.batch, head = item / p.batch, slot = p.state_indices == nullptr ? b : p.state_indices[b];
  const int64_t per_head = p.states / p.k_heads, per_state = p.q_heads / p.states, keys = 2 * p.f;
  T* const out = static_cast<T*>(p.o) + b * p.q_heads * p.dv;
  if (slot < 0 || slot >= p.pool) {
    const int64_t n = per_head * per_state * p.dv;
    for (int64_t i = head * n; i < (head + 1) * n; ++i) out[i] = from_float<T>(0.0f);
    return;
  }
  const int64_t past = p.d * (p.taps - 1), filter = p.d * p.taps, map = p.d * p.f;
  const auto at = [](const void* base, int64_t offset) {
    return base == nullptr ? nullptr : static_cast<const T*>(base) + offset;
  };
  T* const conv_k = static_cast<T*>(p.conv_k) + (slot * p.k_heads + head) * past;
  T* const conv_q = static_cast<T*>(p.conv_q) + slot * p.q_heads * past;
  float x[kStepWidth], k[kStepWidth], v[kStepWidth], decay[kStepWidth];
  float q[kStepHeads * kStepWidth], o[kStepHeads * kStepWidth];
  int64_t gate = -1;  // whose decays are there
  for (int64_t c = 0; p.gate == GateKind::kNone && c < keys; ++c) decay[c] = 1.0f;
  for (int64_t s = head * per_head; s < (head + 1) * per_head; ++s) {
    const T *token = at(p.k, (b * p.k_heads + head) * p.d), *filters = at(p.ck, s * filter);
    const T* bias = at(p.ck_bias, s * p.d);
    float* const state = p.s + (slot * p.states + s) * keys * p.dv;
    float* const z = p.z == nullptr ? nullptr : p.z + (slot * p.states + s) * keys;
    fetch(state, keys * p.dv * 4);
    if (z != nullptr) fetch(z, keys * 4);
    fetch(conv_q + s * per_state * past, past * static_cast<int64_t>(sizeof(T)));
    convolve<T, kTaps>(p.d, p.taps, token, filters, bias, p.silu, conv_k, x);
    map_features(x, at(p.wphi_k, s * p.key_maps / p.states * map), p.d, p.f, p.fm_eps, k);
    if (const int64_t own = b * p.g_heads + s * p.g_heads / p.states; p.gate != GateKind::kNone && own != gate) {
      gate = own;
      const int64_t n = p.gate == GateKind::kChannel ? keys : 1;
      if (p.gate_is_float) {
        decays(static_cast<const float*>(p.u) + gate * n, n, p.tau, p.clamp_min, decay);
      } else {
        decays(at(p.u, gate * n), n, p.tau, p.clamp_min, decay);
      }
      for (int64_t c = n; c < keys; ++c) decay[c] = decay[0];
    }
    widen_token(at(p.v, (b * p.v_heads + s * p.v_heads / p.states) * p.dv), p.dv, v);
    for (int64_t c = 0; c < keys && z != nullptr; ++c) z[c] = decay[c] * z[c] + k[c];
    const StepToken through{state, keys, p.dv, p.dv, decay, k, v, q, o};
    for (int64_t first = 0; first < per_state; first += kStepHeads) {
      const int64_t left = per_state - first, heads = left < kStepHeads ? left : kStepHeads;
      float inverse[kStepHeads];
      for (int64_t r = 0; r < heads; ++r) {
        const int64_t h = s * per_state + first + r;
        const T* query = at(p.q, (b * p.q_heads + h) * p.d);
        convolve<T, kTaps>(p.d, p.taps, query, at(p.cq, h * filter), at(p.cq_bias, h * p.d), p.silu, conv_q + h * past,
                           x);
        shift(p.d, p.taps - 1, query, conv_q + h * past);
        float* row = q + r * kStepWidth;
        map_features(x, at(p.wphi, h * p.maps / p.q_heads * map), p.d, p.f, p.fm_eps, row);
        for (int64_t c = 0; c < keys; ++c) row[c] *= p.scale;
        inverse[r] = z == nullptr ? 1.0f : 1.0f / (dot_token(row, z, keys) + p.eps);
      }
      step_state(through, heads, first == 0);
      for (int64_t r = 0; r < heads; ++r) {
        T* row = out + (s * per_state + first + r) * p.dv;
        for (int64_t i = 0; i < p.dv; ++i) row[i] = from_float<T>(o[r * kStepWidth + i] * inverse[r]);
      }
    }
  }
  shift(p.d, p.taps - 1, at(p.k, (b * p.k_heads + head) * p.d), conv_k);
}

template <class T>
void run(const LawcatDecodeStepParams& p, int64_t item) {
  p.taps == 4 ? step<T, 4>(p, item) : step<T, 0>(p, item);
}

}  // namespace

LawcatDecodeStepKernel lawcat_decode_step_kernel(DType dtype) {
  return by_dtype<BFloat16, Half>(dtype, []<class T>(T) -> LawcatDecodeStepKernel { return run<T>; });
}

}  // namespace subquad::cpu::SUBQUAD_ISA
