// Feature maps of linear attention for one CPU instruction set; the forward tile is in feature_map_rows.h.
#include "cpu/feature_map.h"

#include "cpu/feature_map_rows.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using namespace feature;

int64_t scratch_bytes(const FeatureMapParams& p, bool backward) {
  return Scratch(p, backward, nullptr).floats * static_cast<int64_t>(sizeof(float));
}

/// Rows [begin, begin + n) of one head as floats, padded with zeros to `ldx` columns and to a whole group of rows.
template <class T>
void load_rows(const FeatureMapParams& p, int64_t head, int64_t begin, int64_t n, const Scratch& s) {
  for (int64_t r = 0; r < n; ++r) {
    const int64_t batch = (begin + r) / p.time, t = (begin + r) % p.time;
    load(static_cast<const T*>(p.x) + batch * p.x_batch + t * p.x_time + head * p.x_head, p.d, s.x + r * s.ldx);
    zero_words(s.x + r * s.ldx + p.d, s.ldx - p.d);
  }
  zero_words(s.x + n * s.ldx, (round_up(n, kTileRows) - n) * s.ldx);
}

/// grad[0:n] = 0 where the clamp was active; returns sum of value * grad.
float mask_and_dot(const float* value, float eps, int64_t n, int64_t padded, float* grad) {
  for (int64_t j = 0; j < n; ++j) grad[j] = value[j] < eps ? 0.0f : grad[j];
  Vec sum = vec_zero();
  for (int64_t k = 0; k < padded; k += kLanes) sum = vec_fma(vec_load(value + k), vec_load(grad + k), sum);
  return vec_sum(sum);
}

/// d map / d y from the value of the map.
float slope(FeatureKind kind, float y, float value) {
  const float step = y <= 0.0f ? 0.0f : 1.0f;
  if (kind == FeatureKind::kRelu) return step;
  return kind == FeatureKind::kElu1 && y > 0.0f ? 1.0f : value;
}

/// y becomes its gradient.
void backward_row(const FeatureMapParams& p, float* y, const Scratch& s) {
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

// ----------------------------------------------------------------------------------------------------------- kernels

template <class T>
void forward(const FeatureMapParams& p, int64_t head, int64_t begin, int64_t end, void* memory) {
  const Scratch s(p, false, memory);
  Block weight{};
  if (p.weight != nullptr) weight = load_weight<T>(p, head, s);
  for (int64_t row = begin; row < end; row += kFeatureTile) {
    const int64_t n = end - row < kFeatureTile ? end - row : kFeatureTile;
    load_rows<T>(p, head, row, n, s);
    store_tile<T>(p, s, weight, head, row, n);
  }
}

template <class T>
void backward(const FeatureMapParams& p, int64_t head, int64_t chunk, void* memory) {
  const Scratch s(p, true, memory);
  Block weight{};
  if (p.weight != nullptr) {
    weight = load_weight<T>(p, head, s);
    for (int64_t j = 0; j < p.f; ++j) {
      for (int64_t k = 0; k < p.d; ++k) s.weight_t[j * s.ldx + k] = weight.words[k * weight.stride + j];
      zero_words(s.weight_t + j * s.ldx + p.d, s.ldx - p.d);
    }
    zero_words(s.dweight, s.ldx * s.ldy);
  }
  zero_words(s.grad_positive, s.ldy);
  zero_words(s.grad_negative, s.ldy);
  const int64_t begin = chunk * p.chunk, end = p.rows - begin < p.chunk ? p.rows : begin + p.chunk;
  for (int64_t row = begin; row < end; row += kFeatureTile) {
    const int64_t n = end - row < kFeatureTile ? end - row : kFeatureTile, padded = round_up(n, kTileRows);
    load_rows<T>(p, head, row, n, s);
    if (p.weight != nullptr) product<Floats>(padded, s.ldy, p.d, {s.x, s.ldx, 1}, weight, {s.y, s.ldy}, false);
    for (int64_t r = 0; r < n; ++r) {
      const T* grad = static_cast<const T*>(p.grad_out) + ((row + r) * p.heads + head) * p.features;
      load(grad, p.f, s.grad_positive);
      if (p.fullspace) load(grad + p.f, p.f, s.grad_negative);
      backward_row(p, s.y + r * s.ldy, s);
    }
    const float* dx = s.y;
    if (p.weight != nullptr) {
      product<Floats>(padded, s.ldx, p.f, {s.y, s.ldy, 1}, {s.weight_t, s.ldx}, {s.dx, s.ldx}, false);
      product<Floats>(round_up(p.d, kTileRows), s.ldy, n, {s.x, 1, s.ldx}, {s.y, s.ldy}, {s.dweight, s.ldy}, true);
      dx = s.dx;
    }
    for (int64_t r = 0; r < n; ++r) {
      store(dx + r * s.ldx, p.d, static_cast<T*>(p.dx) + ((row + r) * p.heads + head) * p.d);
    }
  }
  if (p.weight == nullptr) return;
  float* partial = p.partials + (chunk * p.heads + head) * p.d * p.f;
  for (int64_t k = 0; k < p.d; ++k) store(s.dweight + k * s.ldy, p.f, partial + k * p.f);
}

template <class T>
void reduce(const FeatureMapParams& p, int64_t head) {
  const int64_t size = p.d * p.f;
  T* out = static_cast<T*>(p.dweight) + head * size;
  float sum[256];
  for (int64_t first = 0; first < size; first += 256) {
    const int64_t n = size - first < 256 ? size - first : 256;
    zero_words(sum, n);
    for (int64_t c = 0; c < p.chunks; ++c) {
      const float* partial = p.partials + (c * p.heads + head) * size + first;
      for (int64_t i = 0; i < n; ++i) sum[i] += partial[i];
    }
    store(sum, n, out + first);
  }
}

template <class T>
FeatureMapKernels kernels() {
  return {scratch_bytes, forward<T>, backward<T>, reduce<T>};
}

}  // namespace

FeatureMapKernels feature_map_kernels(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return kernels<BFloat16>();
    case DType::kHalf:
      return kernels<Half>();
    default:
      return kernels<float>();
  }
}

}  // namespace subquad::cpu::SUBQUAD_ISA
