// Arguments and results of gated_linear_attention_{fwd,bwd}, _local_fwd, _enter_ and _step_. `Device` has forward, step
// and, where the device has them, backward, local_forward and enter as run(params, dtype, tensors...), where the
// tensors are all that it touches, q first.
#pragma once

#include <algorithm>
#include <tuple>

#include "ops/gated_linear_attention/params.h"
#include "torch/checks.h"
#include "torch/unshared.h"

namespace subquad {

/// A tensor [B, T, H, D], or [B, T, H] with a width of 0, that fits q.
inline GlaTensor rows_of(const Tensor& x, const char* name, int64_t width, const Anchor& like_q, int64_t least = 1) {
  const Tensor& q = like_q.tensor;
  check_device(x, name, like_q);
  check_dims(x, name, width > 0 ? 4 : 3);
  STD_TORCH_CHECK(x.size(0) == q.size(0) && x.size(1) == q.size(1) && x.size(2) >= least, name, ": expected shape [",
                  q.size(0), ", ", q.size(1), ", H", width > 0 ? ", D]" : "]", ", got ", shape_text(x.sizes()));
  if (width > 0) {
    STD_TORCH_CHECK(x.size(3) == width && width <= kGlaMaxDim, name, ": expected a last dimension of ", width,
                    " <= ", kGlaMaxDim, ", got ", x.size(3));
    check_last_contiguous(x, name);
  }
  if (x.numel() == 0) return {nullptr, 0, 0, 0, x.size(2)};  // of which no address is made
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.size(2)};
}

/// Heads of q, k, v and g (0: there is none) beside the states.
inline void check_heads(int64_t states, int64_t q, int64_t k, int64_t v, int64_t g) {
  STD_TORCH_CHECK(states % k == 0 && states % v == 0 && (g == 0 || states % g == 0) && q % states == 0, "q: expected ",
                  states, " states, a multiple of the heads of k, v and g, and a divisor of those of q, got ",
                  shape_text(std::initializer_list<int64_t>{q, k, v, g}), " heads of q, k, v and g");
}

/// Gates, if there are any, of q's tokens.
inline void gates_of(GatedLinearAttentionParams& p, const OptionalTensor& g, const Anchor& like_q) {
  if (!g.has_value()) return;
  p.gate = g->dim() == 4 ? GateKind::kChannel : GateKind::kHead;
  p.gate_is_float = is_wide(*g, "g", like_q);
  p.g = rows_of(*g, "g", p.gate == GateKind::kChannel ? p.dk : 0, like_q);
}

/// Everything but the results. `least` heads of q.
inline GatedLinearAttentionParams gla_arguments(const Tensor& q, const Tensor& k, const Tensor& v,
                                                const OptionalTensor& g, const OptionalTensor& s0,
                                                const OptionalTensor& z0, const OptionalTensor& cu_seqlens,
                                                double scale, double eps, int64_t least) {
  const Anchor like_q{q, "q"};
  check_dims(q, "q", 4);
  check_dims(v, "v", 4);
  GatedLinearAttentionParams p{};
  p.tokens = q.size(1), p.dk = q.size(3), p.dv = v.size(3);
  STD_TORCH_CHECK(p.dk >= 1 && p.dv >= 1, "q: expected head dimensions of at least 1, got ", p.dk, " and ", p.dv);
  check_same_dtype(k, "k", like_q);
  check_same_dtype(v, "v", like_q);
  p.q = rows_of(q, "q", p.dk, like_q, least), p.k = rows_of(k, "k", p.dk, like_q), p.v = rows_of(v, "v", p.dv, like_q);
  gates_of(p, g, like_q);
  p.states = std::max({p.k.heads, p.v.heads, p.g.heads});
  check_heads(p.states, p.q.heads, p.k.heads, p.v.heads, p.g.heads);
  p.sequences = q.size(0);
  if (cu_seqlens.has_value()) {
    check_dims(*cu_seqlens, "cu_seqlens", 1);
    STD_TORCH_CHECK(p.sequences == 1 && cu_seqlens->numel() >= 1, "cu_seqlens: expected [N + 1] and a batch of 1, got ",
                    shape_text(cu_seqlens->sizes()), " and a batch of ", p.sequences);
    p.sequences = cu_seqlens->numel() - 1;
    p.cu_seqlens = int64_of(cu_seqlens, "cu_seqlens", {p.sequences + 1}, like_q);
  }
  p.s0 = floats_of(s0, "initial_state", {p.sequences, p.states, p.dk, p.dv}, like_q);
  p.z0 = floats_of(z0, "initial_state", {p.sequences, p.states, p.dk}, like_q);
  p.scale = static_cast<float>(scale), p.eps = static_cast<float>(eps);
  return p;
}

/// o, den, s, z of a forward.
using GlaResults = std::tuple<Tensor, Tensor, Tensor, Tensor>;

inline GlaResults gla_results(GatedLinearAttentionParams& p, const Tensor& q, bool normalize) {
  const int64_t batch = q.size(0);
  const Tensor o = empty_on(q, {batch, p.tokens, p.q.heads, p.dv}, q.scalar_type());
  const Tensor den = empty_on(q, {normalize ? batch : 0, p.tokens, p.q.heads}, ScalarType::Float);
  const Tensor s = empty_on(q, {p.sequences, p.states, p.dk, p.dv}, ScalarType::Float);
  const Tensor z = empty_on(q, {normalize ? p.sequences : 0, p.states, p.dk}, ScalarType::Float);
  p.o = o.mutable_data_ptr(), p.s = floats_in(s);
  if (normalize) p.den = floats_in(den), p.z = floats_in(z);
  return {o, den, s, z};
}

template <class Device>
GlaResults gated_linear_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& g,
                                      const OptionalTensor& s0, const OptionalTensor& z0,
                                      const OptionalTensor& cu_seqlens, double scale, double eps, bool normalize) {
  GatedLinearAttentionParams p = gla_arguments(q, k, v, g, s0, z0, cu_seqlens, scale, eps, 0);
  const DType dtype = dtype_of(q, "q");
  const auto [o, den, s, z] = gla_results(p, q, normalize);
  Device::forward(p, dtype, q, k, v, g, s0, z0, cu_seqlens, o, den, s, z);
  return {o, den, s, z};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_linear_attention_local_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& g, const OptionalTensor& s0,
    const OptionalTensor& z0, const OptionalTensor& cu_seqlens, double scale, double eps, bool normalize) {
  GatedLinearAttentionParams p = gla_arguments(q, k, v, g, s0, z0, cu_seqlens, scale, eps, 0);
  const DType dtype = dtype_of(q, "q");
  const auto [o, den, s, z] = gla_results(p, q, normalize);
  const bool apart = q.scalar_type() != ScalarType::Float;
  const Tensor sums = empty_on(q, {apart ? q.size(0) : 0, p.tokens, p.q.heads, p.dv}, ScalarType::Float);
  const Tensor decay = empty_on(q, {p.sequences, p.states, p.dk}, ScalarType::Float);
  const Tensor reach = empty_on(q, {p.sequences, p.states}, ScalarType::Long);
  p.local = {floats_in(apart ? sums : o), floats_in(decay), static_cast<int64_t*>(reach.mutable_data_ptr())};
  Device::local_forward(p, dtype, q, k, v, g, s0, z0, cu_seqlens, o, den, s, z, sums, decay, reach);
  return {o, den, s, z, sums, decay, reach};
}

template <class Device>
void gated_linear_attention_enter_(const Tensor& o, const Tensor& den, const Tensor& sums, const Tensor& reach,
                                   const Tensor& q, const OptionalTensor& g, const Tensor& s0, const OptionalTensor& z0,
                                   double scale, double eps) {
  const Anchor like_q{q, "q"};
  check_dims(q, "q", 4);
  check_dims(s0, "s0", 4);
  GatedLinearAttentionParams p{};
  p.sequences = q.size(0), p.tokens = q.size(1), p.states = s0.size(1), p.dk = q.size(3), p.dv = s0.size(3);
  STD_TORCH_CHECK(p.dv >= 1 && p.dv <= kGlaMaxDim, "s0: expected a last dimension in [1, ", kGlaMaxDim, "], got ",
                  p.dv);
  p.q = rows_of(q, "q", p.dk, like_q);
  gates_of(p, g, like_q);
  STD_TORCH_CHECK(p.states >= 1, "s0: expected at least one head, got none");
  check_heads(p.states, p.q.heads, p.states, p.states, p.g.heads);
  p.s0 = floats_of(s0, "s0", {p.sequences, p.states, p.dk, p.dv}, like_q);
  p.z0 = floats_of(z0, "z0", {p.sequences, p.states, p.dk}, like_q);
  p.scale = static_cast<float>(scale), p.eps = static_cast<float>(eps);
  const DType dtype = dtype_of(q, "q");
  p.o = const_cast<void*>(data_of(o, "o", {p.sequences, p.tokens, p.q.heads, p.dv}, like_q));
  const int64_t normalised = z0.has_value() ? p.sequences : 0;
  float* const totals = const_cast<float*>(floats_of(den, "den", {normalised, p.tokens, p.q.heads}, like_q));
  if (z0.has_value()) p.den = totals;
  const bool apart = q.scalar_type() != ScalarType::Float;
  float* const numerators =
      const_cast<float*>(floats_of(sums, "sums", {apart ? p.sequences : 0, p.tokens, p.q.heads, p.dv}, like_q));
  p.local.sums = apart ? numerators : static_cast<float*>(p.o);
  p.local.reach = const_cast<int64_t*>(int64_of(reach, "reach", {p.sequences, p.states}, like_q));
  Device::enter(p, dtype, q, o, den, sums, reach, g, s0, z0);
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_linear_attention_bwd(
    const Tensor& grad_o, const Tensor& grad_s, const OptionalTensor& grad_z, const Tensor& den, const Tensor& q,
    const Tensor& k, const Tensor& v, const OptionalTensor& g, const OptionalTensor& s0, const OptionalTensor& z0,
    const OptionalTensor& cu_seqlens, double scale, double eps, bool normalize) {
  const Anchor like_q{q, "q"};
  GatedLinearAttentionParams p = gla_arguments(q, k, v, g, s0, z0, cu_seqlens, scale, eps, 1);
  const DType dtype = dtype_of(q, "q");
  const int64_t batch = q.size(0);
  GatedLinearAttentionGrads grads{};
  grads.grad_o = data_of(grad_o, "grad_o", {batch, p.tokens, p.q.heads, p.dv}, like_q);
  grads.grad_s = floats_of(grad_s, "grad_s", {p.sequences, p.states, p.dk, p.dv}, like_q);
  STD_TORCH_CHECK(grad_z.has_value() == normalize, "grad_z: expected together with normalize, got one of them");
  grads.grad_z = floats_of(grad_z, "grad_z", {p.sequences, p.states, p.dk}, like_q);
  const float* totals = floats_of(den, "den", {normalize ? batch : 0, p.tokens, p.q.heads}, like_q);
  if (normalize) p.den = const_cast<float*>(totals);
  const ScalarType gate = g.has_value() ? g->scalar_type() : ScalarType::Float;
  const Tensor dq = empty_on(q, {batch, p.tokens, p.q.heads, p.dk}, q.scalar_type());
  const Tensor dk = empty_on(q, {batch, p.tokens, p.k.heads, p.dk}, q.scalar_type());
  const Tensor dv = empty_on(q, {batch, p.tokens, p.v.heads, p.dv}, q.scalar_type());
  const Tensor dg = p.gate == GateKind::kChannel
                        ? empty_on(q, {batch, p.tokens, p.g.heads, p.dk}, gate)
                        : empty_if(p.gate == GateKind::kHead, q, {batch, p.tokens, p.g.heads}, gate);
  const Tensor ds0 = empty_on(q, {s0.has_value() ? p.sequences : 0, p.states, p.dk, p.dv}, ScalarType::Float);
  const Tensor dz0 = empty_on(q, {z0.has_value() ? p.sequences : 0, p.states, p.dk}, ScalarType::Float);
  grads.dq = dq.mutable_data_ptr(), grads.dk = dk.mutable_data_ptr(), grads.dv = dv.mutable_data_ptr();
  grads.dg = dg.mutable_data_ptr();
  if (s0.has_value()) grads.ds0 = floats_in(ds0);
  if (z0.has_value()) grads.dz0 = floats_in(dz0);
  Device::backward(p, grads, dtype, q, k, v, g, s0, z0, cu_seqlens, grad_o, grad_s, grad_z, den, dq, dk, dv, dg, ds0,
                   dz0);
  return {dq, dk, dv, dg, ds0, dz0};
}

/// q, k, v or g of one token.
inline const void* token_of(const Tensor& x, const char* name, int64_t dims, const Anchor& like_q) {
  check_dims(x, name, dims);
  check_contiguous(x, name);
  check_device(x, name, like_q);
  STD_TORCH_CHECK(x.size(0) == like_q.tensor.size(0) && x.size(1) >= 1, name, ": expected ", like_q.tensor.size(0),
                  " rows and some heads, got ", shape_text(x.sizes()));
  STD_TORCH_CHECK(dims < 3 || (x.size(2) >= 1 && x.size(2) <= kGlaMaxDim), name, ": expected a head dimension in [1, ",
                  kGlaMaxDim, "], got ", shape_text(x.sizes()));
  return x.const_data_ptr();
}

template <class Device>
Tensor gated_linear_attention_step_(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& g,
                                    const Tensor& state, const OptionalTensor& z, const OptionalTensor& state_indices,
                                    double scale, double eps) {
  const Anchor like_q{q, "q"};
  GlaStepParams p{};
  p.q = token_of(q, "q", 3, like_q), p.k = token_of(k, "k", 3, like_q), p.v = token_of(v, "v", 3, like_q);
  check_same_dtype(k, "k", like_q);
  check_same_dtype(v, "v", like_q);
  p.batch = q.size(0), p.q_heads = q.size(1), p.dk = q.size(2);
  p.k_heads = k.size(1), p.v_heads = v.size(1), p.dv = v.size(2);
  STD_TORCH_CHECK(k.size(2) == p.dk, "k: expected a head dimension of ", p.dk, ", got ", k.size(2));
  check_dims(state, "state", 4);
  p.pool = state.size(0), p.states = state.size(1);
  if (g.has_value()) {
    p.gate = g->dim() == 3 ? GateKind::kChannel : GateKind::kHead;
    p.gate_is_float = is_wide(*g, "g", like_q);
    p.g = token_of(*g, "g", p.gate == GateKind::kChannel ? 3 : 2, like_q);
    p.g_heads = g->size(1);
    STD_TORCH_CHECK(p.gate == GateKind::kHead || g->size(2) == p.dk, "g: expected a head dimension of ", p.dk, ", got ",
                    shape_text(g->sizes()));
  }
  const int64_t states = std::max({p.k_heads, p.v_heads, p.g_heads});
  STD_TORCH_CHECK(p.states == states, "state: expected ", states, " heads, the largest of k, v and g, got ", p.states);
  check_heads(p.states, p.q_heads, p.k_heads, p.v_heads, p.g_heads);
  p.s = const_cast<float*>(floats_of(state, "state", {p.pool, p.states, p.dk, p.dv}, like_q));
  p.z = const_cast<float*>(floats_of(z, "z", {p.pool, p.states, p.dk}, like_q));
  p.state_indices = int64_of(state_indices, "state_indices", {p.batch}, like_q);
  STD_TORCH_CHECK(state_indices.has_value() || p.pool == p.batch, "state: expected one per row of q, ", p.batch,
                  ", got ", p.pool);
  p.scale = finite(scale, "scale"), p.eps = finite(eps, "eps");
  check_unshared({{state, "state"}, {z, "z"}},
                 {{q, "q"}, {k, "k"}, {v, "v"}, {g, "g"}, {state_indices, "state_indices"}});
  const DType dtype = dtype_of(q, "q");
  const Tensor o = empty_on(q, {p.batch, p.q_heads, p.dv}, q.scalar_type());
  p.o = o.mutable_data_ptr();
  Device::step(p, dtype, q, k, v, g, state, z, state_indices, o);
  return o;
}

}  // namespace subquad
