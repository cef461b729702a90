// Compiled once per instruction set.
#include "cpu/gated_linear_attention.h"

#include "cpu/gated_linear_backward.h"
#include "cpu/gated_linear_forward.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

int64_t groups(const GatedLinearAttentionParams& p) { return (p.states + p.group - 1) / p.group; }

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

template <class T>
float gate_of(const GlaStepParams& p, int64_t at) {
  const float gate = p.gate_is_float ? static_cast<const float*>(p.g)[at] : to_float(static_cast<const T*>(p.g)[at]);
  return expf(gate);
}

constexpr int64_t kStepColumns = 4 * kLanes;  // of the state, whose results stay in registers
constexpr int64_t kMaxKeys = 256;

/// S = a S + k v^T, o = q S for `columns` columns; one pass over the state serves all query heads two at a time.
template <int N>
void step_columns(float* state, int64_t stride, int64_t keys, const float* decay, const float* k, const float* q0,
                  const float* q1, const float* v, float* o0, float* o1) {
  Vec value[N], first[N], second[N];
  for (int n = 0; n < N; ++n) {
    value[n] = vec_load(v + n * kLanes);
    first[n] = second[n] = vec_zero();
  }
  for (int64_t c = 0; c < keys; ++c) {
    const Vec a = vec_set(decay[c]), key = vec_set(k[c]), x = vec_set(q0[c]), y = vec_set(q1[c]);
    for (int n = 0; n < N; ++n) {
      float* at = state + c * stride + n * kLanes;
      const Vec s = vec_fma(key, value[n], vec_mul(a, vec_load(at)));
      vec_store(at, s);
      first[n] = vec_fma(x, s, first[n]);
      second[n] = vec_fma(y, s, second[n]);
    }
  }
  for (int n = 0; n < N; ++n) {
    vec_store(o0 + n * kLanes, first[n]);
    vec_store(o1 + n * kLanes, second[n]);
  }
}

/// o = q S for the columns from `begin` on, one at a time: what the vectors left over, and further query heads.
inline void read_columns(const float* state, int64_t stride, int64_t keys, const float* q, int64_t begin, int64_t end,
                         float* o) {
  for (int64_t i = begin; i < end; ++i) o[i] = 0.0f;
  for (int64_t c = 0; c < keys; ++c)
    for (int64_t i = begin; i < end; ++i) o[i] += q[c] * state[c * stride + i];
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
  float decay[kMaxKeys], k[kMaxKeys], q[2][kMaxKeys], v[kMaxKeys], o[2][kMaxKeys];
  widen_row(static_cast<const T*>(p.k) + (b * p.k_heads + s * p.k_heads / p.states) * p.dk, p.dk, p.dk, k);
  widen_row(static_cast<const T*>(p.v) + (b * p.v_heads + s * p.v_heads / p.states) * p.dv, p.dv, p.dv, v);
  const int64_t gate_head = p.gate == GateKind::kNone ? 0 : b * p.g_heads + s * p.g_heads / p.states;
  const float whole = p.gate == GateKind::kHead ? gate_of<T>(p, gate_head) : 1.0f;
  for (int64_t c = 0; c < p.dk; ++c)
    decay[c] = p.gate == GateKind::kChannel ? gate_of<T>(p, gate_head * p.dk + c) : whole;
  float* state = p.s + (slot * p.states + s) * p.dk * p.dv;
  float* z = p.z == nullptr ? nullptr : p.z + (slot * p.states + s) * p.dk;
  for (int64_t c = 0; c < p.dk && z != nullptr; ++c) z[c] = decay[c] * z[c] + k[c];
  for (int64_t h = 0; h < per_state; h += 2) {
    const int64_t heads = smaller(2, per_state - h);
    float inverse[2] = {1.0f, 1.0f};
    for (int64_t r = 0; r < 2; ++r) {
      const T* row = static_cast<const T*>(p.q) + (b * p.q_heads + s * per_state + h + smaller(r, heads - 1)) * p.dk;
      float total = 0.0f;
      for (int64_t c = 0; c < p.dk; ++c) {
        q[r][c] = p.scale * to_float(row[c]);
        if (z != nullptr) total += q[r][c] * z[c];
      }
      if (z != nullptr) inverse[r] = 1.0f / (total + p.eps);
    }
    int64_t at = 0;
    if (h == 0) {
      for (; at + kStepColumns <= p.dv; at += kStepColumns)
        step_columns<4>(state + at, p.dv, p.dk, decay, k, q[0], q[1], v + at, o[0] + at, o[1] + at);
      for (; at + kLanes <= p.dv; at += kLanes)
        step_columns<1>(state + at, p.dv, p.dk, decay, k, q[0], q[1], v + at, o[0] + at, o[1] + at);
      for (int64_t c = 0; c < p.dk; ++c)
        for (int64_t i = at; i < p.dv; ++i) state[c * p.dv + i] = decay[c] * state[c * p.dv + i] + k[c] * v[i];
    }
    for (int64_t r = 0; r < heads; ++r) {
      read_columns(state, p.dv, p.dk, q[r], at, p.dv, o[r]);
      for (int64_t i = 0; i < p.dv; ++i) out[(h + r) * p.dv + i] = from_float<T>(o[r][i] * inverse[r]);
    }
  }
}

template <class T>
GatedLinearAttentionKernels kernels() {
  return {forward_items, forward_scratch<T>, forward<T>, backward_items, backward_scratch<T>, backward<T>, step<T>};
}

}  // namespace

GatedLinearAttentionKernels gated_linear_attention_kernels(DType dtype) {
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
