// Compiled once per instruction set.
#include "ops/gated_linear_attention/cpu.h"

#include "common/exp.h"
#include "ops/gated_linear_attention/cpu_backward.h"
#include "ops/gated_linear_attention/cpu_forward.h"
#include "ops/gated_linear_attention/cpu_step.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using namespace gla;

int64_t groups(const GatedLinearAttentionParams& p) { return ceil_div(p.states, p.group); }

int64_t forward_items(const GatedLinearAttentionParams& p) { return p.sequences * groups(p); }

template <class T>
int64_t forward_scratch(const GatedLinearAttentionParams& p) {
  return GlaForward<T>(p, Arena(nullptr)).bytes();
}

template <class T>
void forward(const GatedLinearAttentionParams& p, int64_t item, void* scratch) {
  const int64_t count = groups(p), first = item % count * p.group;
  GlaForward<T>(p, Arena(scratch)).run(item / count, first, smaller(first + p.group, p.states));
}

int64_t backward_items(const GatedLinearAttentionParams& p) { return p.sequences * gla_units(p); }

template <class T>
int64_t backward_scratch(const GatedLinearAttentionParams& p) {
  return GlaBackward<T>(p, GatedLinearAttentionGrads{}, Arena(nullptr)).bytes();
}

template <class T>
void backward(const GatedLinearAttentionParams& p, const GatedLinearAttentionGrads& grads, int64_t item,
              void* scratch) {
  const int64_t units = gla_units(p);
  GlaBackward<T>(p, grads, Arena(scratch)).run(item / units, item % units);
}

/// e^g of n gates from `at` on.
template <class T>
void decays_of(const GlaStepParams& p, int64_t at, int64_t n, float* decay) {
  if (p.gate_is_float) {
    widen_token(static_cast<const float*>(p.g) + at, n, decay);
  } else {
    widen_token(static_cast<const T*>(p.g) + at, n, decay);
  }
  for (int64_t c = 0; c < n; ++c) decay[c] = vector_exp(decay[c]);
}

template <class T>
void step(const GlaStepParams& p, int64_t item) {
  const int64_t b = item / p.states, s = item % p.states, per_state = p.q_heads / p.states;
  const int64_t slot = p.state_indices == nullptr ? b : p.state_indices[b];
  T* out = static_cast<T*>(p.o) + (b * p.q_heads + s * per_state) * p.dv;
  if (slot < 0 || slot >= p.pool) {
    for (int64_t i = 0; i < per_state * p.dv; ++i) out[i] = from_float<T>(0.0f);
    return;
  }
  float* const state = p.s + (slot * p.states + s) * p.dk * p.dv;
  fetch(state, p.dk * p.dv * 4);
  float decay[kStepWidth], k[kStepWidth], v[kStepWidth], q[kStepHeads * kStepWidth], o[kStepHeads * kStepWidth];
  widen_token(static_cast<const T*>(p.k) + (b * p.k_heads + s * p.k_heads / p.states) * p.dk, p.dk, k);
  widen_token(static_cast<const T*>(p.v) + (b * p.v_heads + s * p.v_heads / p.states) * p.dv, p.dv, v);
  if (p.gate == GateKind::kNone) {
    for (int64_t c = 0; c < p.dk; ++c) decay[c] = 1.0f;
  } else {
    const int64_t head = b * p.g_heads + s * p.g_heads / p.states, n = p.gate == GateKind::kChannel ? p.dk : 1;
    decays_of<T>(p, head * n, n, decay);
    for (int64_t c = n; c < p.dk; ++c) decay[c] = decay[0];
  }
  float* z = p.z == nullptr ? nullptr : p.z + (slot * p.states + s) * p.dk;
  for (int64_t c = 0; c < p.dk && z != nullptr; ++c) z[c] = decay[c] * z[c] + k[c];
  const StepToken token{state, p.dk, p.dv, decay, k, v, q, o};
  for (int64_t h = 0; h < per_state; h += kStepHeads) {
    const int64_t heads = smaller(kStepHeads, per_state - h);
    for (int64_t r = 0; r < heads; ++r) {
      float* row = q + r * kStepWidth;
      widen_token(static_cast<const T*>(p.q) + (b * p.q_heads + s * per_state + h + r) * p.dk, p.dk, row);
      for (int64_t c = 0; c < p.dk; ++c) row[c] *= p.scale;
    }
    step_state(token, heads, h == 0);
    for (int64_t r = 0; r < heads; ++r) {
      const float inverse = z == nullptr ? 1.0f : 1.0f / (dot_token(q + r * kStepWidth, z, p.dk) + p.eps);
      for (int64_t i = 0; i < p.dv; ++i) out[(h + r) * p.dv + i] = from_float<T>(o[r * kStepWidth + i] * inverse);
    }
  }
}

template <class T>
GatedLinearAttentionKernels kernels() {
  return {forward_items, forward_scratch<T>, forward<T>, backward_items, backward_scratch<T>, backward<T>, step<T>};
}

}  // namespace

GatedLinearAttentionKernels gated_linear_attention_kernels(DType dtype) {
  return by_dtype<BFloat16, Half>(dtype, []<class T>(T) -> GatedLinearAttentionKernels { return kernels<T>(); });
}

}  // namespace subquad::cpu::SUBQUAD_ISA
