// Binding of lawcat_decode_step_: memory-safety checks, then the torch-free launch of lawcat_decode_step.cuh.
#include "ops/lawcat_decode_step/cuda.cuh"

#include "cuda/binding.h"

namespace subquad::cuda {
namespace {

using Shape = std::initializer_list<int64_t>;

const void* tensor_of(const Tensor& x, const char* name, Shape shape, ScalarType dtype, const Tensor& q0) {
  check_same_device(x, name, q0, "q0");
  check_contiguous(x, name);
  check_shape(x, name, shape);
  STD_TORCH_CHECK(x.scalar_type() == dtype, name, ": expected the dtype of q0, or float32 where it holds sums");
  return x.const_data_ptr();
}

const void* tensor_of(const OptionalTensor& x, const char* name, Shape shape, ScalarType dtype, const Tensor& q0) {
  return x.has_value() ? tensor_of(*x, name, shape, dtype, q0) : nullptr;
}

Tensor lawcat_decode_step_(const Tensor& q0, const Tensor& k0, const Tensor& v, const OptionalTensor& u,
                           const Tensor& cq, const Tensor& ck, const OptionalTensor& cq_bias,
                           const OptionalTensor& ck_bias, const Tensor& wphi, const Tensor& wphi_k,
                           const Tensor& conv_q, const Tensor& conv_k, const Tensor& state, const OptionalTensor& z,
                           const OptionalTensor& state_indices, bool silu, double tau, double clamp_min, double scale,
                           double eps, double fm_eps) {
  LawcatDecodeStepParams p{};
  STD_TORCH_CHECK(q0.dim() == 3 && k0.dim() == 3 && v.dim() == 3, "q0: expected q0, k0 and v of shape [B, H, D]");
  STD_TORCH_CHECK(cq.dim() == 2 && ck.dim() == 2 && wphi.dim() == 3 && wphi_k.dim() == 3 && state.dim() == 4,
                  "cq: expected cq and ck [H d, W], wphi [H, d, f] and state [P, H, 2f, V]");
  const ScalarType dtype = q0.scalar_type(), wide = ScalarType::Float;
  p.batch = q0.size(0), p.q_heads = q0.size(1), p.d = q0.size(2), p.k_heads = k0.size(1);
  p.v_heads = v.size(1), p.dv = v.size(2), p.taps = static_cast<int>(cq.size(1));
  p.maps = wphi.size(0), p.key_maps = wphi_k.size(0), p.f = wphi.size(2);
  p.pool = state.size(0), p.states = state.size(1);
  const int64_t keys = 2 * p.f;
  STD_TORCH_CHECK(p.taps >= 1 && p.taps <= kDecodeMaxTaps, "cq: expected 1 to ", kDecodeMaxTaps, " taps");
  STD_TORCH_CHECK(
      p.d >= 1 && p.dv >= 1 && p.f >= 1 && p.d <= kDecodeMaxDim && p.dv <= kDecodeMaxDim && keys <= kDecodeMaxDim,
      "q0: expected head dimensions and features in 1..", kDecodeMaxDim);
  STD_TORCH_CHECK(p.k_heads >= 1 && p.v_heads >= 1 && p.states >= 1 && p.maps >= 1 && p.key_maps >= 1 &&
                      p.states % p.k_heads == 0 && p.states % p.v_heads == 0 && p.q_heads % p.states == 0 &&
                      p.q_heads % p.maps == 0 && p.states % p.key_maps == 0,
                  "state: expected a number of heads that those of k0, v and wphi_k divide, and that divides q0's");
  p.q = tensor_of(q0, "q0", {p.batch, p.q_heads, p.d}, dtype, q0);
  p.k = tensor_of(k0, "k0", {p.batch, p.k_heads, p.d}, dtype, q0);
  p.v = tensor_of(v, "v", {p.batch, p.v_heads, p.dv}, dtype, q0);
  if (u.has_value()) {
    STD_TORCH_CHECK(u->dim() == 2 || u->dim() == 3, "u: expected shape [B, H, 2f] or [B, H]");
    p.gate = u->dim() == 3 ? GateKind::kChannel : GateKind::kHead;
    p.gate_is_float = u->scalar_type() == wide;
    p.g_heads = u->size(1);
    STD_TORCH_CHECK(p.g_heads >= 1 && p.states % p.g_heads == 0, "u: expected heads that divide the states");
    const ScalarType own = p.gate_is_float ? wide : dtype;
    p.u = p.gate == GateKind::kChannel ? tensor_of(*u, "u", {p.batch, p.g_heads, keys}, own, q0)
                                       : tensor_of(*u, "u", {p.batch, p.g_heads}, own, q0);
  }
  p.cq = tensor_of(cq, "cq", {p.q_heads * p.d, p.taps}, dtype, q0);
  p.ck = tensor_of(ck, "ck", {p.states * p.d, p.taps}, dtype, q0);
  p.cq_bias = tensor_of(cq_bias, "cq_bias", {p.q_heads * p.d}, dtype, q0);
  p.ck_bias = tensor_of(ck_bias, "ck_bias", {p.states * p.d}, dtype, q0);
  p.wphi = tensor_of(wphi, "wphi", {p.maps, p.d, p.f}, dtype, q0);
  p.wphi_k = tensor_of(wphi_k, "wphi_k", {p.key_maps, p.d, p.f}, dtype, q0);
  p.conv_q = const_cast<void*>(tensor_of(conv_q, "conv_q", {p.pool, p.q_heads * p.d, p.taps - 1}, dtype, q0));
  p.conv_k = const_cast<void*>(tensor_of(conv_k, "conv_k", {p.pool, p.k_heads * p.d, p.taps - 1}, dtype, q0));
  p.s = static_cast<float*>(const_cast<void*>(tensor_of(state, "state", {p.pool, p.states, keys, p.dv}, wide, q0)));
  p.z = static_cast<float*>(const_cast<void*>(tensor_of(z, "z", {p.pool, p.states, keys}, wide, q0)));
  p.state_indices =
      static_cast<const int64_t*>(tensor_of(state_indices, "state_indices", {p.batch}, ScalarType::Long, q0));
  STD_TORCH_CHECK(p.state_indices != nullptr || p.pool == p.batch, "state: expected one per row of q0");
  p.silu = silu;
  p.tau = static_cast<float>(tau), p.clamp_min = static_cast<float>(clamp_min), p.scale = static_cast<float>(scale);
  p.eps = static_cast<float>(eps), p.fm_eps = static_cast<float>(fm_eps);
  const Tensor o = empty_on(q0, {p.batch, p.q_heads, p.dv}, dtype);
  const LaunchScope scope(q0, k0, v, u, cq, ck, cq_bias, ck_bias, wphi, wphi_k, conv_q, conv_k, state, z, state_indices,
                          o);
  p.o = o.mutable_data_ptr();
  dispatch_dtype(q0, "q0", [&](auto element) { lawcat_decode_step<decltype(element)>(p, scope.stream()); });
  return o;
}

}  // namespace
}  // namespace subquad::cuda

SQ_REGISTER_OPS(m) { m.impl("lawcat_decode_step_", TORCH_BOX(&subquad::cuda::lawcat_decode_step_)); }
