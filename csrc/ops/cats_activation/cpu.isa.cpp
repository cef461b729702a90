// Thresholded activation and gated unit for one CPU instruction set: plain loops that the compiler vectorises.
#include "ops/cats_activation/cpu.h"

#include "common/activations.h"
#include "common/half.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

constexpr int64_t kTile = 256;  // columns widened at a time

template <class T>
void load(const void* base, int64_t offset, int64_t n, float* out) {
  const T* p = static_cast<const T*>(base) + offset;
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(p[i]);
}

template <class T>
void store(void* base, int64_t offset, int64_t n, const float* in) {
  T* p = static_cast<T*>(base) + offset;
  for (int64_t i = 0; i < n; ++i) p[i] = from_float<T>(in[i]);
}

void load_threshold(const CatsActivationParams& p, int64_t column, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = p.threshold[(column + i) * p.threshold_stride];
}

template <Activation kAct, bool kInclusive>
void forward_tile(const float* z, const float* u, const float* t, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    const float s = activate<kAct>(z[i]);
    const float value = s * u[i];
    out[i] = is_active(s, t[i], kInclusive) ? value : 0.0f;
  }
}

template <Activation kAct, bool kInclusive, bool kStraightThrough>
void backward_tile(const float* z, const float* u, const float* grad, const float* t, int64_t n, float* dz, float* du) {
  for (int64_t i = 0; i < n; ++i) {
    const float s = activate<kAct>(z[i]);
    const bool active = is_active(s, t[i], kInclusive);
    const float slope = grad[i] * u[i] * activate_grad<kAct>(z[i]);
    const float product = grad[i] * s;
    dz[i] = kStraightThrough || active ? slope : 0.0f;
    du[i] = active ? product : 0.0f;
  }
}

template <Activation kAct>
void forward_any(const CatsActivationParams& p, const float* z, const float* u, const float* t, int64_t n, float* out) {
  p.inclusive ? forward_tile<kAct, true>(z, u, t, n, out) : forward_tile<kAct, false>(z, u, t, n, out);
}

template <Activation kAct>
void backward_any(const CatsActivationParams& p, const float* z, const float* u, const float* grad, const float* t,
                  int64_t n, float* dz, float* du) {
  if (p.straight_through) {
    p.inclusive ? backward_tile<kAct, true, true>(z, u, grad, t, n, dz, du)
                : backward_tile<kAct, false, true>(z, u, grad, t, n, dz, du);
  } else {
    p.inclusive ? backward_tile<kAct, true, false>(z, u, grad, t, n, dz, du)
                : backward_tile<kAct, false, false>(z, u, grad, t, n, dz, du);
  }
}

#define SQ_BY_ACTIVATION(function, ...)             \
  switch (p.activation) {                           \
    case Activation::kSilu:                         \
      function<Activation::kSilu>(__VA_ARGS__);     \
      break;                                        \
    case Activation::kGeluTanh:                     \
      function<Activation::kGeluTanh>(__VA_ARGS__); \
      break;                                        \
    case Activation::kGelu:                         \
      function<Activation::kGelu>(__VA_ARGS__);     \
      break;                                        \
    case Activation::kRelu:                         \
      function<Activation::kRelu>(__VA_ARGS__);     \
      break;                                        \
  }

struct Tile {
  float z[kTile], u[kTile], grad[kTile], t[kTile];
};

template <class Z, class U>
void fill(const CatsActivationParams& p, int64_t row, int64_t column, int64_t n, Tile& tile) {
  load<Z>(p.z, row * p.cols + column, n, tile.z);
  load_threshold(p, column, n, tile.t);
  if (p.u != nullptr) {
    load<U>(p.u, row * p.cols + column, n, tile.u);
  } else {
    for (int64_t i = 0; i < n; ++i) tile.u[i] = 1.0f;
  }
}

template <class Z, class U>
void forward(const CatsActivationParams& p, int64_t begin, int64_t end) {
  Tile tile;
  float out[kTile];
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t column = 0; column < p.cols; column += kTile) {
      const int64_t n = p.cols - column < kTile ? p.cols - column : kTile;
      fill<Z, U>(p, row, column, n, tile);
      SQ_BY_ACTIVATION(forward_any, p, tile.z, tile.u, tile.t, n, out)
      store<U>(p.out, row * p.cols + column, n, out);
    }
  }
}

template <class Z, class U>
void backward(const CatsActivationParams& p, int64_t begin, int64_t end) {
  Tile tile;
  float dz[kTile], du[kTile];
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t column = 0; column < p.cols; column += kTile) {
      const int64_t n = p.cols - column < kTile ? p.cols - column : kTile, offset = row * p.cols + column;
      fill<Z, U>(p, row, column, n, tile);
      load<U>(p.grad, offset, n, tile.grad);
      SQ_BY_ACTIVATION(backward_any, p, tile.z, tile.u, tile.grad, tile.t, n, dz, du)
      store<Z>(p.dz, offset, n, dz);
      if (p.du != nullptr) store<U>(p.du, offset, n, du);
    }
  }
}

}  // namespace

CatsActivationKernels cats_activation_kernels(DType z, DType u) {
  return by_dtype<BFloat16, Half>(u, [z]<class U>(U) -> CatsActivationKernels {
    if (z == DType::kFloat) return {forward<float, U>, backward<float, U>};
    return {forward<U, U>, backward<U, U>};
  });
}

}  // namespace subquad::cpu::SUBQUAD_ISA
