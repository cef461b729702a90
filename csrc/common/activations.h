// Activations of the CATS gate, their derivatives and the threshold test: the one definition shared by the CPU kernels
// (g++), the CUDA kernels (nvcc) and their emulated build. Everything is fp32 and free of torch.
#pragma once

#include <cmath>

#include "common/isa.h"

// The gate's exponential: on a CPU one that vectorises.
#if defined(SUBQUAD_ISA)
#include "common/exp.h"
#define SQ_EXPF vector_exp
#else
#define SQ_EXPF expf
#endif

namespace subquad {

// The codes are part of the op schemas: python/subquad/contract/ passes them as `int activation`.
enum class Activation : int { kSilu = 0, kGeluTanh = 1, kGelu = 2, kRelu = 3 };

constexpr int kActivationCount = 4;

SQ_ISA_BEGIN

// exp(-inf) = 0 and exp(inf) = inf make this exact at both ends: no clamping, and NaN passes through.
SQ_HD float sigmoid(float x) { return 1.0f / (1.0f + SQ_EXPF(-x)); }

namespace cats_detail {

constexpr float kSqrt2OverPi = 0.7978845608028654f;
constexpr float kSqrtHalf = 0.7071067811865476f;
constexpr float kInvSqrt2Pi = 0.3989422804014327f;
constexpr float kGeluCubic = 0.044715f;

}  // namespace cats_detail

/// act(x). silu(-inf) is NaN, as in torch; NaN stays NaN for every activation.
template <Activation kAct>
SQ_HD float activate(float x) {
  using namespace cats_detail;
  if constexpr (kAct == Activation::kSilu) {
    return x / (1.0f + SQ_EXPF(-x));
  } else if constexpr (kAct == Activation::kGeluTanh) {
    // (1 + tanh(y)) / 2 == sigmoid(2y), without the cancellation of 1 + tanh(y) for y << 0.
    const float inner = kSqrt2OverPi * (x + kGeluCubic * x * x * x);
    return x / (1.0f + SQ_EXPF(-2.0f * inner));
  } else if constexpr (kAct == Activation::kGelu) {
    // erfc instead of 1 + erf: keeps the relative accuracy of the negative tail.
    return 0.5f * x * erfcf(-x * kSqrtHalf);
  } else {
    return !(x <= 0.0f) ? x : 0.0f;
  }
}

/// d act(x) / dx. relu'(NaN) is 1, as in torch: the NaN itself arrives through the gate value.
template <Activation kAct>
SQ_HD float activate_grad(float x) {
  using namespace cats_detail;
  if constexpr (kAct == Activation::kSilu) {
    const float s = sigmoid(x);
    return s * (1.0f + x * (1.0f - s));
  } else if constexpr (kAct == Activation::kGeluTanh) {
    const float s = sigmoid(2.0f * kSqrt2OverPi * (x + kGeluCubic * x * x * x));
    const float slope = 2.0f * kSqrt2OverPi * (1.0f + 3.0f * kGeluCubic * x * x);
    return s * (1.0f + x * (1.0f - s) * slope);
  } else if constexpr (kAct == Activation::kGelu) {
    return 0.5f * erfcf(-x * kSqrtHalf) + x * kInvSqrt2Pi * SQ_EXPF(-0.5f * x * x);
  } else {
    return !(x <= 0.0f) ? 1.0f : 0.0f;
  }
}

/// Run-time choice; `act` is uniform over a kernel, so the branch costs nothing next to a memory access.
SQ_HD float activate(Activation act, float x) {
  switch (act) {
    case Activation::kSilu:
      return activate<Activation::kSilu>(x);
    case Activation::kGeluTanh:
      return activate<Activation::kGeluTanh>(x);
    case Activation::kGelu:
      return activate<Activation::kGelu>(x);
    default:
      return activate<Activation::kRelu>(x);
  }
}

SQ_HD float activate_grad(Activation act, float x) {
  switch (act) {
    case Activation::kSilu:
      return activate_grad<Activation::kSilu>(x);
    case Activation::kGeluTanh:
      return activate_grad<Activation::kGeluTanh>(x);
    case Activation::kGelu:
      return activate_grad<Activation::kGelu>(x);
    default:
      return activate_grad<Activation::kRelu>(x);
  }
}

/// The mask of CATS: dead iff |s| <= t (or |s| < t when inclusive), written as a negation so that a NaN gate is active.
SQ_HD bool is_active(float s, float threshold, bool inclusive) {
  const float magnitude = fabsf(s);
  return inclusive ? !(magnitude < threshold) : !(magnitude <= threshold);
}

SQ_ISA_END

}  // namespace subquad
