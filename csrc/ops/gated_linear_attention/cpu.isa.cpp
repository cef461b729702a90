// Compiled once per instruction set.
#include "ops/gated_linear_attention/cpu.h"

#include "common/exp.h"
#include "ops/gated_linear_attention/cpu_backward.h"
#include "ops/gated_linear_attention/cpu_enter.h"
#include "ops/gated_linear_attention/cpu_forward.h"
#include "ops/gated_linear_attention/cpu_step.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using namespace gla;

int64_t groups(const GatedLinearAttentionParams& p) { return ceil_div(p.states, p.group); }

int64_t forward_items(const GatedLinearAttentionParams& p) { return p.sequences * groups(p) * p.shares; }

template <class T>
int64_t forward_scratch(const GatedLinearAttentionParams& p) {
  return GlaForward<T>(p, Arena(nullptr)).bytes();
}

template <class T>
void forward(const GatedLinearAttentionParams& p, int64_t item, void* scratch) {
  const int64_t count = groups(p), own = item / p.shares, first = own % count * p.group;
  GlaForward<T>(p, Arena(scratch)).run(own / count, first, smaller(first + p.group, p.states), item % p.shares);
}

int64_t enter_items(const GatedLinearAttentionParams& p) { return p.sequences * groups(p); }

template <class T>
int64_t enter_scratch(const GatedLinearAttentionParams& p) {
  return GlaEnter<T>(p, Arena(nullptr)).bytes();
}

template <class T>
void enter(const GatedLinearAttentionParams& p, int64_t item, void* scratch) {
  const int64_t count = groups(p), first = item % count * p.group;
  GlaEnter<T>(p, Arena(scratch)).run(item / count, first, smaller(first + p.group, p.states));
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

/// A row of q, k, v or g in floats.
template <class T>
void widen_gates(const GlaStepParams& p, int64_t at, int64_t n, float* out) {
  if (p.gate_is_float) {
    widen_token(static_cast<const float*>(p.g) + at, n, out);
  } else {
    widen_token(static_cast<const T*>(p.g) + at, n, out);
  }
}

/// State head s of row b, and what its token brings.
template <class T>
class StepRow {
 public:
  StepRow(const GlaStepParams& p, int64_t item) : b(item / p.states), s(item % p.states), p_(p) {
    slot = p.state_indices == nullptr ? b : p.state_indices[b];
    per_state = p.q_heads / p.states;
    head = b * p.q_heads + s * per_state;
    skipped = slot < 0 || slot >= p.pool;
  }

  void keys() {
    widen_token(static_cast<const T*>(p_.k) + (b * p_.k_heads + s * p_.k_heads / p_.states) * p_.dk, p_.dk, k);
    if (p_.gate == GateKind::kNone) {
      for (int64_t c = 0; c < p_.dk; ++c) decay[c] = 1.0f;
      return;
    }
    const int64_t gate = b * p_.g_heads + s * p_.g_heads / p_.states, n = p_.gate == GateKind::kChannel ? p_.dk : 1;
    widen_gates<T>(p_, gate * n, n, decay);
    for (int64_t c = 0; c < n; ++c) decay[c] = vector_exp(decay[c]);
    for (int64_t c = n; c < p_.dk; ++c) decay[c] = decay[0];
  }

  void values() {
    widen_token(static_cast<const T*>(p_.v) + (b * p_.v_heads + s * p_.v_heads / p_.states) * p_.dv, p_.dv, v);
  }

  void query(int64_t h, float* q) const {
    widen_token(static_cast<const T*>(p_.q) + (head + h) * p_.dk, p_.dk, q);
    for (int64_t c = 0; c < p_.dk; ++c) q[c] *= p_.scale;
  }

  /// z after the token, or null where nothing is normalised.
  float* z() const { return p_.z == nullptr ? nullptr : p_.z + (slot * p_.states + s) * p_.dk; }
  void move_z() const {
    float* z = this->z();
    for (int64_t c = 0; c < p_.dk && z != nullptr; ++c) z[c] = decay[c] * z[c] + k[c];
  }
  float inverse(const float* q) const { return z() == nullptr ? 1.0f : 1.0f / (dot_token(q, z(), p_.dk) + p_.eps); }

  int64_t b, s, slot, per_state, head;
  bool skipped;
  float decay[kStepWidth], k[kStepWidth], v[kStepWidth];

 private:
  const GlaStepParams& p_;
};

template <class T>
void step_totals(const GlaStepParams& p, int64_t item, float* inverses) {
  StepRow<T> row(p, item);
  if (row.skipped || p.z == nullptr) return;
  float q[kStepWidth];
  row.keys();
  row.move_z();
  for (int64_t h = 0; h < row.per_state; ++h) {
    row.query(h, q);
    inverses[row.head + h] = row.inverse(q);
  }
}

template <class T>
void step(const GlaStepParams& p, int64_t item, int64_t first, int64_t count, const float* inverses) {
  StepRow<T> row(p, item);
  T* out = static_cast<T*>(p.o) + row.head * p.dv + first;
  if (row.skipped) {
    for (int64_t h = 0; h < row.per_state; ++h)
      for (int64_t i = 0; i < count; ++i) out[h * p.dv + i] = from_float<T>(0.0f);
    return;
  }
  float* const state = p.s + (row.slot * p.states + row.s) * p.dk * p.dv + first;
  fetch(state, p.dk * p.dv * 4);
  row.keys();
  row.values();
  if (inverses == nullptr) row.move_z();
  float q[kStepHeads * kStepWidth], o[kStepHeads * kStepWidth];
  const StepToken token{state, p.dk, count, p.dv, row.decay, row.k, row.v + first, q, o};
  for (int64_t h = 0; h < row.per_state; h += kStepHeads) {
    const int64_t heads = smaller(kStepHeads, row.per_state - h);
    for (int64_t r = 0; r < heads; ++r) row.query(h + r, q + r * kStepWidth);
    step_state(token, heads, h == 0);
    for (int64_t r = 0; r < heads; ++r) {
      const bool known = inverses != nullptr && p.z != nullptr;
      const float inverse = known ? inverses[row.head + h + r] : row.inverse(q + r * kStepWidth);
      for (int64_t i = 0; i < count; ++i) out[(h + r) * p.dv + i] = from_float<T>(o[r * kStepWidth + i] * inverse);
    }
  }
}

template <class T>
GatedLinearAttentionKernels kernels() {
  return {forward_items,  forward_scratch<T>,  forward<T>,  enter_items,    enter_scratch<T>, enter<T>,
          backward_items, backward_scratch<T>, backward<T>, step_totals<T>, step<T>};
}

}  // namespace

GatedLinearAttentionKernels gated_linear_attention_kernels(DType dtype) {
  return by_dtype<BFloat16, Half>(dtype, []<class T>(T) -> GatedLinearAttentionKernels { return kernels<T>(); });
}

}  // namespace subquad::cpu::SUBQUAD_ISA
