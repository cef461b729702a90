// POD arguments of gated linear attention. All strides are in elements.
#pragma once

#include <cstdint>

namespace subquad {

constexpr int64_t kGlaMaxDim = 256;  // of K and of V

enum class GateKind : int { kNone, kHead, kChannel };

/// A tensor [B, T, H, D] (or [B, T, H]) whose last dimension is contiguous.
struct GlaTensor {
  const void* data;
  int64_t stride_b, stride_t, stride_h, heads;
};

/// Of the sequences that are continued (with cu_seqlens the first alone, else all): their results for a state of zeros
/// before them, from which those for another one can be had, for all is linear in it. Null unless asked for.
struct GlaLocal {
  float* sums;     // [B, T, Hq, V] numerators of the tokens within reach; o in float32
  float* decay;    // [N, states, K] product of the decays of all tokens
  int64_t* reach;  // [N, states] tokens from the first on whose decays are not all 0 yet; the others have their results
};

/// One call. q, k, v and o share one element type. State head s reads k head s * k.heads / states, and so on; query
/// head h reads state h * states / q.heads. Gates are natural logarithms of the decay.
struct GatedLinearAttentionParams {
  GlaTensor q, k, v, g;
  GateKind gate;
  bool gate_is_float;         // else of the element type of q
  const float* s0;            // [N, states, K, V] or null for zero
  const float* z0;            // [N, states, K] or null for zero
  const int64_t* cu_seqlens;  // [N + 1] or null; values are not trusted
  void* o;                    // [B, T, Hq, V]
  float* den;                 // [B, T, Hq] denominators without eps, or null when not normalised
  float* s;                   // [N, states, K, V] final states
  float* z;                   // [N, states, K] or null when not normalised
  int64_t sequences, tokens, states, dk, dv;
  int64_t group;   // CPU: neighbouring state heads that walk a sequence together
  int64_t shares;  // CPU: parts of a sequence for a thread each
  float scale, eps;
  GlaLocal local;
};

/// What the backward adds: gradients of the results in, gradients of the inputs out, all contiguous.
struct GatedLinearAttentionGrads {
  const void* grad_o;   // [B, T, Hq, V]
  const float* grad_s;  // [N, states, K, V]
  const float* grad_z;  // [N, states, K] or null when not normalised
  void *dq, *dk, *dv;   // as q, k, v
  void* dg;             // as g, or null
  float* ds0;           // [N, states, K, V] or null
  float* dz0;           // [N, states, K] or null
};

/// One token per row. Row b uses state `state_indices[b]` (b without indices); a negative one is skipped.
struct GlaStepParams {
  const void *q, *k, *v;  // [B, H, D] contiguous
  const void* g;          // [B, Hg, K], [B, Hg] or null
  GateKind gate;
  bool gate_is_float;
  float* s;                      // [P, states, K, V]
  float* z;                      // [P, states, K] or null when not normalised
  const int64_t* state_indices;  // [B] or null; values are not trusted
  void* o;                       // [B, Hq, V]
  int64_t batch, pool, q_heads, k_heads, v_heads, g_heads, states, dk, dv;
  float scale, eps;
};

}  // namespace subquad
