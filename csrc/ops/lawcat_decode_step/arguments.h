// Arguments and result of lawcat_decode_step_. `Device` has run(params, dtype, tensors...), where the tensors are all
// that it touches, q0 first.
#pragma once

#include "ops/lawcat_decode_step/params.h"
#include "torch/checks.h"
#include "torch/unshared.h"

namespace subquad {

template <class Device>
Tensor lawcat_decode_step_(const Tensor& q0, const Tensor& k0, const Tensor& v, const OptionalTensor& u,
                           const Tensor& cq, const Tensor& ck, const OptionalTensor& cq_bias,
                           const OptionalTensor& ck_bias, const Tensor& wphi, const Tensor& wphi_k,
                           const Tensor& conv_q, const Tensor& conv_k, const Tensor& state, const OptionalTensor& z,
                           const OptionalTensor& state_indices, bool silu, double tau, double clamp_min, double scale,
                           double eps, double fm_eps) {
  const Anchor like_q{q0, "q0"};
  check_dims(q0, "q0", 3);
  check_dims(k0, "k0", 3);
  check_dims(v, "v", 3);
  check_dims(wphi, "wphi", 3);
  check_dims(wphi_k, "wphi_k", 3);
  check_dims(state, "state", 4);
  LawcatDecodeStepParams p{};
  p.batch = q0.size(0), p.q_heads = q0.size(1), p.d = q0.size(2), p.k_heads = k0.size(1);
  p.v_heads = v.size(1), p.dv = v.size(2), p.maps = wphi.size(0), p.key_maps = wphi_k.size(0), p.f = wphi.size(2);
  p.pool = state.size(0), p.states = state.size(1);
  const int64_t keys = 2 * p.f;
  const int64_t taps = taps_of(cq, "cq");
  STD_TORCH_CHECK(taps >= 1 && taps <= kDecodeMaxTaps, "cq: expected 1 to ", kDecodeMaxTaps, " taps, got ", taps);
  p.taps = static_cast<int>(taps);
  STD_TORCH_CHECK(
      p.d >= 1 && p.dv >= 1 && p.f >= 1 && p.d <= kDecodeMaxDim && p.dv <= kDecodeMaxDim && keys <= kDecodeMaxDim,
      "q0: expected head dimensions and features in 1..", kDecodeMaxDim, ", got ", p.d, ", ", p.dv, " and ", keys);
  STD_TORCH_CHECK(
      p.q_heads >= 1 && p.k_heads >= 1 && p.v_heads >= 1 && p.states >= 1 && p.maps >= 1 && p.key_maps >= 1 &&
          p.states % p.k_heads == 0 && p.states % p.v_heads == 0 && p.q_heads % p.states == 0 &&
          p.q_heads % p.maps == 0 && p.states % p.key_maps == 0,
      "state: expected a number of heads that those of k0, v and wphi_k divide, and that divides q0's, got ", p.states);
  p.q = data_of(q0, "q0", {p.batch, p.q_heads, p.d}, like_q);
  p.k = data_of(k0, "k0", {p.batch, p.k_heads, p.d}, like_q);
  p.v = data_of(v, "v", {p.batch, p.v_heads, p.dv}, like_q);
  if (u.has_value()) {
    STD_TORCH_CHECK(u->dim() == 2 || u->dim() == 3, "u: expected shape [B, H, 2f] or [B, H], got ",
                    shape_text(u->sizes()));
    p.gate = u->dim() == 3 ? GateKind::kChannel : GateKind::kHead;
    p.gate_is_float = is_wide(*u, "u", like_q);
    p.g_heads = u->size(1);
    STD_TORCH_CHECK(p.g_heads >= 1 && p.states % p.g_heads == 0, "u: expected heads that divide the ", p.states,
                    " states, got ", p.g_heads);
    p.u = p.gate == GateKind::kChannel ? data_of(*u, "u", {p.batch, p.g_heads, keys}, u->scalar_type(), like_q)
                                       : data_of(*u, "u", {p.batch, p.g_heads}, u->scalar_type(), like_q);
  }
  p.cq = taps_in(cq, "cq", p.q_heads * p.d, taps, like_q);
  p.ck = taps_in(ck, "ck", p.states * p.d, taps, like_q);
  p.cq_bias = data_of(cq_bias, "cq_bias", {p.q_heads * p.d}, like_q);
  p.ck_bias = data_of(ck_bias, "ck_bias", {p.states * p.d}, like_q);
  p.wphi = data_of(wphi, "wphi", {p.maps, p.d, p.f}, like_q);
  p.wphi_k = data_of(wphi_k, "wphi_k", {p.key_maps, p.d, p.f}, like_q);
  p.conv_q = const_cast<void*>(data_of(conv_q, "conv_q", {p.pool, p.q_heads * p.d, p.taps - 1}, like_q));
  p.conv_k = const_cast<void*>(data_of(conv_k, "conv_k", {p.pool, p.k_heads * p.d, p.taps - 1}, like_q));
  p.s = const_cast<float*>(floats_of(state, "state", {p.pool, p.states, keys, p.dv}, like_q));
  p.z = const_cast<float*>(floats_of(z, "z", {p.pool, p.states, keys}, like_q));
  p.state_indices = int64_of(state_indices, "state_indices", {p.batch}, like_q);
  STD_TORCH_CHECK(state_indices.has_value() || p.pool == p.batch, "state: expected one per row of q0, ", p.batch,
                  ", got ", p.pool);
  p.silu = silu;
  p.tau = finite(tau, "tau"), p.scale = finite(scale, "scale"), p.eps = finite(eps, "eps");
  p.fm_eps = finite(fm_eps, "fm_eps"), p.clamp_min = static_cast<float>(clamp_min);
  STD_TORCH_CHECK(tau > 0, "tau: expected a number above 0, got ", tau);
  STD_TORCH_CHECK(fm_eps >= 0, "fm_eps: expected a number that is not negative, got ", fm_eps);
  check_unshared({{conv_q, "conv_q"}, {conv_k, "conv_k"}, {state, "state"}, {z, "z"}},
                 {{q0, "q0"},
                  {k0, "k0"},
                  {v, "v"},
                  {u, "u"},
                  {cq, "cq"},
                  {ck, "ck"},
                  {cq_bias, "cq_bias"},
                  {ck_bias, "ck_bias"},
                  {wphi, "wphi"},
                  {wphi_k, "wphi_k"},
                  {state_indices, "state_indices"}});
  const DType dtype = dtype_of(q0, "q0");
  const Tensor o = empty_on(q0, {p.batch, p.q_heads, p.dv}, q0.scalar_type());
  p.o = o.mutable_data_ptr();
  Device::run(p, dtype, q0, k0, v, u, cq, ck, cq_bias, ck_bias, wphi, wphi_k, conv_q, conv_k, state, z, state_indices,
              o);
  return o;
}

}  // namespace subquad
