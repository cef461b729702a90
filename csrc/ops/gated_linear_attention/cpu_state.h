// The state of one head on its way through a sequence. One instruction set.
#pragma once

#include "ops/gated_linear_attention/cpu_chunk.h"

namespace subquad::cpu::SUBQUAD_ISA::gla {

/// S [K, V] and z [K], padded, with the decay that is pending for both and the product of those that went by, [K] each.
struct State {
  static int64_t words(const Sizes& size) { return size.k * (size.v + 3); }

  State() = default;
  State(float* memory, const Sizes& size)
      : s(memory), z(s + size.k * size.v), pending(z + size.k), decay(pending + size.k) {}

  /// From state `at` of the call, zeros where there is none.
  void begin(const GatedLinearAttentionParams& p, const Sizes& size, int64_t at) const {
    zero_words(s, size.k * size.v);
    zero_words(z, size.k);
    for (int64_t c = 0; c < p.dk && p.s0 != nullptr; ++c)
      std::memcpy(s + c * size.v, p.s0 + (at * p.dk + c) * p.dv, static_cast<size_t>(p.dv) * sizeof(float));
    if (p.z0 != nullptr) std::memcpy(z, p.z0 + at * p.dk, static_cast<size_t>(p.dk) * sizeof(float));
    for (int64_t c = 0; c < size.k; ++c) pending[c] = decay[c] = 1.0f;
  }

  /// Times the decay that is pending, then times `next`: a product of two decays near 1 is always rounded to one side.
  void move_to(const float* next, const GatedLinearAttentionParams& p, const Sizes& size) const {
    for (int64_t c = 0; c < p.dk; ++c) {
      const float then = next == nullptr ? 1.0f : next[c];
      z[c] = z[c] * pending[c] * then, decay[c] = decay[c] * pending[c] * then;
      const Vec f = vec_set(pending[c]), g = vec_set(then);
      float* row = s + c * size.v;
      for (int64_t i = 0; i < size.v; i += kLanes) vec_store(row + i, vec_mul(vec_mul(vec_load(row + i), f), g));
    }
  }

  float *s = nullptr, *z = nullptr, *pending = nullptr, *decay = nullptr;
};

}  // namespace subquad::cpu::SUBQUAD_ISA::gla
