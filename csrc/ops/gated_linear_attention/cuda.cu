// Binding of gated_linear_attention_fwd and _step_: memory-safety checks, then the torch-free launches of
// gated_linear_attention.cuh.
#include "ops/gated_linear_attention/cuda.cuh"

#include <algorithm>
#include <tuple>

#include "cuda/binding.h"

namespace subquad::cuda {
namespace {

/// A tensor [B, T, H, D], or [B, T, H] with a width of 0, that fits q.
GlaTensor rows_of(const Tensor& x, const char* name, int64_t width, const Tensor& q) {
  check_same_device(x, name, q, "q");
  check_dims(x, name, width > 0 ? 4 : 3);
  STD_TORCH_CHECK(x.size(0) == q.size(0) && x.size(1) == q.size(1) && x.size(2) >= 1, name, ": expected shape [",
                  q.size(0), ", ", q.size(1), ", H", width > 0 ? ", D]" : "]");
  if (width > 0) {
    STD_TORCH_CHECK(x.size(3) == width && width <= kStepWidth && (x.stride(3) == 1 || width == 1), name,
                    ": expected a contiguous last dimension of ", width, " <= ", kStepWidth);
  }
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.size(2)};
}

const float* floats_of(const OptionalTensor& x, const char* name, std::initializer_list<int64_t> shape,
                       const Tensor& q) {
  if (!x.has_value()) return nullptr;
  check_same_device(*x, name, q, "q");
  check_contiguous(*x, name);
  check_shape(*x, name, shape);
  STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float, name, ": expected float32");
  return static_cast<const float*>(x->const_data_ptr());
}

const int64_t* indices_of(const OptionalTensor& x, const char* name, const Tensor& q) {
  if (!x.has_value()) return nullptr;
  check_same_device(*x, name, q, "q");
  check_contiguous(*x, name);
  check_dims(*x, name, 1);
  STD_TORCH_CHECK(x->scalar_type() == ScalarType::Long, name, ": expected int64");
  return static_cast<const int64_t*>(x->const_data_ptr());
}

bool gate_is_float(const Tensor& g, const Tensor& q) {
  STD_TORCH_CHECK(g.scalar_type() == ScalarType::Float || g.scalar_type() == q.scalar_type(),
                  "g: expected float32 or the dtype of q");
  return g.scalar_type() == ScalarType::Float;
}

void check_heads(int64_t states, int64_t q, int64_t k, int64_t v, int64_t g) {
  STD_TORCH_CHECK(states % k == 0 && states % v == 0 && (g == 0 || states % g == 0) && q % states == 0, "q: expected ",
                  states, " states, a multiple of the heads of k, v and g, and a divisor of those of q");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_linear_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                                                      const OptionalTensor& g, const OptionalTensor& s0,
                                                                      const OptionalTensor& z0,
                                                                      const OptionalTensor& cu_seqlens, double scale,
                                                                      double eps, bool normalize) {
  check_dims(q, "q", 4);
  check_dims(v, "v", 4);
  GatedLinearAttentionParams p{};
  const int64_t batch = q.size(0);
  p.tokens = q.size(1), p.dk = q.size(3), p.dv = v.size(3);
  p.q = rows_of(q, "q", p.dk, q), p.k = rows_of(k, "k", p.dk, q), p.v = rows_of(v, "v", p.dv, q);
  STD_TORCH_CHECK(p.dk >= 1 && p.dv >= 1, "q: expected head dimensions of at least 1");
  check_same_dtype(k, "k", q, "q");
  check_same_dtype(v, "v", q, "q");
  if (g.has_value()) {
    p.gate = g->dim() == 4 ? GateKind::kChannel : GateKind::kHead;
    p.gate_is_float = gate_is_float(*g, q);
    p.g = rows_of(*g, "g", p.gate == GateKind::kChannel ? p.dk : 0, q);
  }
  p.states = std::max({p.k.heads, p.v.heads, p.g.heads});
  check_heads(p.states, p.q.heads, p.k.heads, p.v.heads, p.g.heads);
  p.sequences = batch;
  p.cu_seqlens = indices_of(cu_seqlens, "cu_seqlens", q);
  if (p.cu_seqlens != nullptr) {
    STD_TORCH_CHECK(batch == 1 && cu_seqlens->numel() >= 1, "cu_seqlens: expected [N + 1] and a batch of 1");
    p.sequences = cu_seqlens->numel() - 1;
  }
  p.s0 = floats_of(s0, "initial_state", {p.sequences, p.states, p.dk, p.dv}, q);
  p.z0 = floats_of(z0, "initial_state", {p.sequences, p.states, p.dk}, q);
  p.scale = static_cast<float>(scale), p.eps = static_cast<float>(eps);

  const Tensor o = empty_on(q, {batch, p.tokens, p.q.heads, p.dv}, q.scalar_type());
  const Tensor den = empty_on(q, {normalize ? batch : 0, p.tokens, p.q.heads}, ScalarType::Float);
  const Tensor s = empty_on(q, {p.sequences, p.states, p.dk, p.dv}, ScalarType::Float);
  const Tensor z = empty_on(q, {normalize ? p.sequences : 0, p.states, p.dk}, ScalarType::Float);
  const LaunchScope scope(q, k, v, g, s0, z0, cu_seqlens, o, den, s, z);
  p.o = o.mutable_data_ptr(), p.s = static_cast<float*>(s.mutable_data_ptr());
  if (normalize) {
    p.den = static_cast<float*>(den.mutable_data_ptr());
    p.z = static_cast<float*>(z.mutable_data_ptr());
  }
  dispatch_dtype(q, "q", [&](auto element) { gated_linear_attention_forward<decltype(element)>(p, scope.stream()); });
  return {o, den, s, z};
}

const void* token_of(const Tensor& x, const char* name, int64_t dims, const Tensor& q) {
  check_dims(x, name, dims);
  check_contiguous(x, name);
  check_same_device(x, name, q, "q");
  STD_TORCH_CHECK(x.size(0) == q.size(0) && x.size(1) >= 1, name, ": expected ", q.size(0), " rows and some heads");
  STD_TORCH_CHECK(dims < 3 || (x.size(2) >= 1 && x.size(2) <= kStepWidth), name, ": expected a head dimension in [1, ",
                  kStepWidth, "]");
  return x.const_data_ptr();
}

Tensor gated_linear_attention_step_(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& g,
                                    const Tensor& state, const OptionalTensor& z, const OptionalTensor& state_indices,
                                    double scale, double eps) {
  GlaStepParams p{};
  p.q = token_of(q, "q", 3, q), p.k = token_of(k, "k", 3, q), p.v = token_of(v, "v", 3, q);
  check_same_dtype(k, "k", q, "q");
  check_same_dtype(v, "v", q, "q");
  p.batch = q.size(0), p.q_heads = q.size(1), p.dk = q.size(2);
  p.k_heads = k.size(1), p.v_heads = v.size(1), p.dv = v.size(2);
  STD_TORCH_CHECK(k.size(2) == p.dk, "k: expected a head dimension of ", p.dk, ", got ", k.size(2));
  check_dims(state, "state", 4);
  p.pool = state.size(0), p.states = state.size(1);
  if (g.has_value()) {
    p.gate = g->dim() == 3 ? GateKind::kChannel : GateKind::kHead;
    p.gate_is_float = gate_is_float(*g, q);
    p.g = token_of(*g, "g", p.gate == GateKind::kChannel ? 3 : 2, q);
    p.g_heads = g->size(1);
    STD_TORCH_CHECK(p.gate == GateKind::kHead || g->size(2) == p.dk, "g: expected a head dimension of ", p.dk);
  }
  STD_TORCH_CHECK(p.states >= 1, "state: expected at least one head");
  check_heads(p.states, p.q_heads, p.k_heads, p.v_heads, p.g_heads);
  p.s = const_cast<float*>(floats_of(state, "state", {p.pool, p.states, p.dk, p.dv}, q));
  p.z = const_cast<float*>(floats_of(z, "z", {p.pool, p.states, p.dk}, q));
  p.state_indices = indices_of(state_indices, "state_indices", q);
  STD_TORCH_CHECK(p.state_indices != nullptr ? state_indices->numel() == p.batch : p.pool == p.batch,
                  "state_indices: expected one per row of q, or as many states as rows");
  p.scale = static_cast<float>(scale), p.eps = static_cast<float>(eps);
  const Tensor o = empty_on(q, {p.batch, p.q_heads, p.dv}, q.scalar_type());
  const LaunchScope scope(q, k, v, g, state, z, state_indices, o);
  p.o = o.mutable_data_ptr();
  dispatch_dtype(q, "q", [&](auto element) { gated_linear_attention_step<decltype(element)>(p, scope.stream()); });
  return o;
}

}  // namespace
}  // namespace subquad::cuda

SQ_REGISTER_OPS(m) {
  m.impl("gated_linear_attention_fwd", TORCH_BOX(&subquad::cuda::gated_linear_attention_fwd));
  m.impl("gated_linear_attention_step_", TORCH_BOX(&subquad::cuda::gated_linear_attention_step_));
}
