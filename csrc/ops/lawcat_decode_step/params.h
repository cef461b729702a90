// POD arguments of LAWCAT's decoding step.
#pragma once

#include <cstdint>

#include "ops/gated_linear_attention/params.h"

namespace subquad {

constexpr int64_t kDecodeMaxDim = 256;  // of d, of dv and of the 2 f features
constexpr int kDecodeMaxTaps = 8;

/// One token per row; row b uses places `state_indices[b]` of the pools (b without indices), a negative one is skipped.
/// All tensors are contiguous; `void*` have one element type, but u may be float. State head s is convolved from key
/// head s * k_heads / states, and reads value head s * v_heads / states, and so on; query head h reads state h * states
/// / q_heads. Nobody but the work on key head j touches the pools' parts of its states and queries.
struct LawcatDecodeStepParams {
  const void* q;                 // [batch, q_heads, d], before the convolution, like k
  const void* k;                 // [batch, k_heads, d]
  const void* v;                 // [batch, v_heads, dv]
  const void* u;                 // logits of the gates [batch, g_heads, 2 f], [batch, g_heads] or null
  const void* cq;                // taps [q_heads, d, taps]
  const void* ck;                // [states, d, taps]
  const void* cq_bias;           // [q_heads, d] or null
  const void* ck_bias;           // [states, d] or null
  const void* wphi;              // [maps, d, f]
  const void* wphi_k;            // [key_maps, d, f]
  void* conv_q;                  // [pool, q_heads, d, taps - 1]
  void* conv_k;                  // [pool, k_heads, d, taps - 1]
  float* s;                      // [pool, states, 2 f, dv]
  float* z;                      // [pool, states, 2 f] or null when not normalised
  const int64_t* state_indices;  // [batch] or null; values are not trusted
  void* o;                       // [batch, q_heads, dv]
  int64_t batch, pool, q_heads, k_heads, v_heads, g_heads, states, maps, key_maps, d, dv, f;
  int taps;
  GateKind gate;
  bool gate_is_float, silu;
  float tau, clamp_min, scale, eps, fm_eps;
};

}  // namespace subquad
