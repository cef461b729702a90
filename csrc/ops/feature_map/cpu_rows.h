// A tile of rows times the matrix of its head, then the feature map on the rows of the result while they are in cache.
// One instruction set.
#pragma once

#include "common/exp.h"
#include "common/half.h"
#include "cpu/simd/arena.h"
#include "cpu/simd/tile.h"
#include "ops/feature_map/params.h"

namespace subquad::cpu::SUBQUAD_ISA::feature {

constexpr float kInf = __builtin_inff();

/// What a thread works in. Rows of x and dx are `ldx` floats apart, those of y, of the features and of the weight
/// `ldy`.
struct Scratch {
  float *x, *y, *positive, *negative, *grad_positive, *grad_negative;
  float *weight, *weight_t, *dx, *dweight;
  int64_t ldx, ldy;

  Scratch(const FeatureMapParams& p, bool backward, Arena& arena) {
    ldx = round_up(p.d, kLanes);
    ldy = round_up(p.f, kLanes);
    const auto take = [&](int64_t count) { return arena.take<float>(count); };
    x = take(kFeatureTile * ldx);
    y = p.weight == nullptr ? x : take(kFeatureTile * ldy);
    positive = take(ldy);
    negative = take(ldy);
    weight = take(p.weight == nullptr ? 0 : p.d * ldy);
    const bool products = backward && p.weight != nullptr;
    grad_positive = take(backward ? ldy : 0);
    grad_negative = take(backward ? ldy : 0);
    weight_t = take(products ? p.f * ldx : 0);
    dx = take(products ? kFeatureTile * ldx : 0);
    dweight = take(products ? ldx * ldy : 0);
  }
};

template <class T>
void load(const T* p, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(p[i]);
}

template <class T>
void store(const float* in, int64_t n, T* p) {
  for (int64_t i = 0; i < n; ++i) p[i] = from_float<T>(in[i]);
}

inline void fill(float* p, int64_t n, float value) {
  for (int64_t i = 0; i < n; ++i) p[i] = value;
}

/// Matrix number `index` as floats, rows `ldy` apart: where it is, if it is already so.
template <class T>
Block load_weight(const FeatureMapParams& p, int64_t index, const Scratch& s) {
  const T* weight = static_cast<const T*>(p.weight) + index * p.d * p.f;
  if constexpr (std::is_same_v<T, float>) {
    if (s.ldy == p.f) return {const_cast<float*>(weight), p.f};
  }
  for (int64_t k = 0; k < p.d; ++k) {
    load(weight + k * p.f, p.f, s.weight + k * s.ldy);
    zero_words(s.weight + k * s.ldy + p.f, s.ldy - p.f);
  }
  return {s.weight, s.ldy};
}

// ----------------------------------------------------------------------------------------------------------- one row

/// a[0:n] = exp(a - top), n a multiple of kLanes. Returns the sum.
inline float exponentials(float* a, int64_t n, float top) {
  Vec sum = vec_zero();
  for (int64_t k = 0; k < n; k += kLanes) {
    const Vec e = vec_exp2(vec_mul(vec_add(vec_load(a + k), vec_set(-top)), vec_set(kLog2e)));
    vec_store(a + k, e);
    sum = vec_add(sum, e);
  }
  return vec_sum(sum);
}

inline float largest(const float* a, int64_t n) {
  Vec top = vec_load(a);
  for (int64_t k = kLanes; k < n; k += kLanes) top = vec_max(top, vec_load(a + k));
  return vec_max_all(top);
}

inline void scale(float* a, int64_t n, float factor) {
  for (int64_t k = 0; k < n; ++k) a[k] *= factor;
}

inline void softmax(float* a, int64_t n) { scale(a, n, 1.0f / exponentials(a, n, largest(a, n))); }

inline void map_value(FeatureKind kind, float* a, int64_t n) {
  switch (kind) {
    case FeatureKind::kExp:
      for (int64_t i = 0; i < n; ++i) a[i] = vector_exp(a[i]);
      break;
    case FeatureKind::kRelu:
      for (int64_t i = 0; i < n; ++i) a[i] = a[i] <= 0.0f ? 0.0f : a[i];
      break;
    default:  // elu1
      for (int64_t i = 0; i < n; ++i) {
        const float e = vector_exp(a[i]), above = a[i] + 1.0f;
        a[i] = a[i] > 0.0f ? above : e;
      }
  }
}

/// The map of y and of -y, not clamped. Columns from f to ldy mean nothing, but are 0 where a sum runs over them.
inline void map_row(const FeatureMapParams& p, const float* y, const Scratch& s) {
  for (int64_t j = 0; j < p.f; ++j) s.positive[j] = y[j];
  for (int64_t j = 0; j < p.f; ++j) s.negative[j] = -y[j];
  fill(s.positive + p.f, s.ldy - p.f, -kInf);
  fill(s.negative + p.f, s.ldy - p.f, -kInf);
  if (p.kind == FeatureKind::kSoftmax) {
    softmax(s.positive, s.ldy);
    if (p.fullspace) softmax(s.negative, s.ldy);
  } else if (p.kind == FeatureKind::kHedgehog2) {
    const float up = largest(s.positive, s.ldy), down = largest(s.negative, s.ldy), top = up > down ? up : down;
    const float sum = exponentials(s.positive, s.ldy, top) + exponentials(s.negative, s.ldy, top);
    scale(s.positive, s.ldy, 1.0f / sum);
    scale(s.negative, s.ldy, 1.0f / sum);
  } else {
    map_value(p.kind, s.positive, p.f);
    if (p.fullspace) map_value(p.kind, s.negative, p.f);
  }
}

template <class T>
void store_clamped(const float* value, int64_t n, float eps, T* out) {
  for (int64_t j = 0; j < n; ++j) out[j] = from_float<T>(value[j] < eps ? eps : value[j]);
}

/// Features of the n rows in s.x, padded to a whole group of rows, which are tokens `row` on of one head.
template <class T>
void store_tile(const FeatureMapParams& p, const Scratch& s, Block weight, int64_t head, int64_t row, int64_t n) {
  if (p.weight != nullptr) {
    product<Floats>(round_up(n, kTileRows), s.ldy, p.d, {s.x, s.ldx, 1}, weight, {s.y, s.ldy}, false);
  }
  for (int64_t r = 0; r < n; ++r) {
    map_row(p, s.y + r * s.ldy, s);
    T* out = static_cast<T*>(p.out) + ((row + r) * p.heads + head) * p.features;
    store_clamped(s.positive, p.f, p.eps, out);
    if (p.fullspace) store_clamped(s.negative, p.f, p.eps, out + p.f);
  }
}

// ---------------------------------------------------------------------------------------------------------- backward

/// grad[0:n] = 0 where the clamp was active; returns sum of value * grad.
inline float mask_and_dot(const float* value, float eps, int64_t n, int64_t padded, float* grad) {
  for (int64_t j = 0; j < n; ++j) grad[j] = value[j] < eps ? 0.0f : grad[j];
  Vec sum = vec_zero();
  for (int64_t k = 0; k < padded; k += kLanes) sum = vec_fma(vec_load(value + k), vec_load(grad + k), sum);
  return vec_sum(sum);
}

/// d map / d y from the value of the map.
inline float slope(FeatureKind kind, float y, float value) {
  const float step = y <= 0.0f ? 0.0f : 1.0f;
  if (kind == FeatureKind::kRelu) return step;
  return kind == FeatureKind::kElu1 && y > 0.0f ? 1.0f : value;
}

/// y becomes its gradient.
inline void backward_row(const FeatureMapParams& p, float* y, const Scratch& s) {
  map_row(p, y, s);
  const bool joint = p.kind == FeatureKind::kHedgehog2;
  if (joint || p.kind == FeatureKind::kSoftmax) {
    float up = mask_and_dot(s.positive, p.eps, p.f, s.ldy, s.grad_positive), down = 0.0f;
    if (p.fullspace) down = mask_and_dot(s.negative, p.eps, p.f, s.ldy, s.grad_negative);
    if (joint) up = down = up + down;
    for (int64_t j = 0; j < p.f; ++j) y[j] = s.positive[j] * (s.grad_positive[j] - up);
    if (!p.fullspace) return;
    for (int64_t j = 0; j < p.f; ++j) y[j] -= s.negative[j] * (s.grad_negative[j] - down);
    return;
  }
  for (int64_t j = 0; j < p.f; ++j) {
    const float value = s.positive[j];
    const float up = value < p.eps ? 0.0f : s.grad_positive[j] * slope(p.kind, y[j], value);
    float down = 0.0f;
    if (p.fullspace) {
      const float other = s.negative[j];
      down = other < p.eps ? 0.0f : s.grad_negative[j] * slope(p.kind, -y[j], other);
    }
    y[j] = up - down;
  }
}

/// Before the tiles of one head: its matrix, also transposed, and no gradient of it. Returns the matrix, if any.
template <class T>
Block begin_backward(const FeatureMapParams& p, int64_t head, const Scratch& s) {
  zero_words(s.grad_positive, s.ldy);
  zero_words(s.grad_negative, s.ldy);
  if (p.weight == nullptr) return {};
  const Block weight = load_weight<T>(p, head / p.sharing, s);
  for (int64_t j = 0; j < p.f; ++j) {
    for (int64_t k = 0; k < p.d; ++k) s.weight_t[j * s.ldx + k] = weight.words[k * weight.stride + j];
    zero_words(s.weight_t + j * s.ldx + p.d, s.ldx - p.d);
  }
  zero_words(s.dweight, s.ldx * s.ldy);
  return weight;
}

/// Gradient of the n rows in s.x, which are tokens `row` on of one head, as rows s.ldx apart; that of the matrix is
/// added to s.dweight. Columns of s.x from d to ldx are zero.
template <class T>
const float* backward_tile(const FeatureMapParams& p, const Scratch& s, Block weight, int64_t head, int64_t row,
                           int64_t n) {
  const int64_t padded = round_up(n, kTileRows);
  if (p.weight != nullptr) product<Floats>(padded, s.ldy, p.d, {s.x, s.ldx, 1}, weight, {s.y, s.ldy}, false);
  for (int64_t r = 0; r < n; ++r) {
    const T* grad = static_cast<const T*>(p.grad_out) + ((row + r) * p.heads + head) * p.features;
    load(grad, p.f, s.grad_positive);
    if (p.fullspace) load(grad + p.f, p.f, s.grad_negative);
    backward_row(p, s.y + r * s.ldy, s);
  }
  if (p.weight == nullptr) return s.y;
  product<Floats>(padded, s.ldx, p.f, {s.y, s.ldy, 1}, {s.weight_t, s.ldx}, {s.dx, s.ldx}, false);
  product<Floats>(round_up(p.d, kTileRows), s.ldy, n, {s.x, 1, s.ldx}, {s.y, s.ldy}, {s.dweight, s.ldy}, true);
  return s.dx;
}

/// The matrix's gradient of one chunk.
inline void store_partial(const FeatureMapParams& p, const Scratch& s, int64_t head, int64_t chunk) {
  if (p.weight == nullptr) return;
  float* partial = p.partials + (chunk * p.heads + head) * p.d * p.f;
  for (int64_t k = 0; k < p.d; ++k) store(s.dweight + k * s.ldy, p.f, partial + k * p.f);
}

/// dweight of matrix `index` from the partial sums of its heads, in their order.
template <class T>
void reduce(const FeatureMapParams& p, int64_t index) {
  const int64_t size = p.d * p.f;
  T* out = static_cast<T*>(p.dweight) + index * size;
  float sum[256];
  for (int64_t first = 0; first < size; first += 256) {
    const int64_t n = size - first < 256 ? size - first : 256;
    zero_words(sum, n);
    for (int64_t head = index * p.sharing; head < (index + 1) * p.sharing; ++head) {
      for (int64_t c = 0; c < p.chunks; ++c) {
        const float* partial = p.partials + (c * p.heads + head) * size + first;
        for (int64_t i = 0; i < n; ++i) sum[i] += partial[i];
      }
    }
    store(sum, n, out + first);
  }
}

}  // namespace subquad::cpu::SUBQUAD_ISA::feature
