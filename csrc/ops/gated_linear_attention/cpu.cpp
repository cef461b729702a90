// subquad::gated_linear_attention_* on CPU tensors.
#include "ops/gated_linear_attention/cpu.h"

#include <algorithm>
#include <tuple>

#include "cpu/binding.h"
#include "cpu/isa.h"

namespace subquad::cpu {
namespace {


constexpr int64_t kMaxGroup = 4;  // states of a group stay in the cache

GatedLinearAttentionKernels kernels_for(const Tensor& q) {
  return SQ_DISPATCH_ISA(gated_linear_attention_kernels, dtype_of(q, "q"));
}

GlaTensor rows_of(const Tensor& x, const char* name, int64_t batch, int64_t tokens, int64_t width) {
  const bool has_width = width > 0;
  STD_TORCH_CHECK(x.dim() == (has_width ? 4 : 3) && x.size(0) == batch && x.size(1) == tokens && x.size(2) >= 1, name,
                  ": expected shape [", batch, ", ", tokens, ", H", has_width ? ", D]" : "]");
  if (has_width)
    STD_TORCH_CHECK(x.size(3) == width && width <= kGlaMaxDim && (x.stride(3) == 1 || width == 1), name,
                    ": expected a contiguous last dimension of ", width, " <= ", kGlaMaxDim);
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.size(2)};
}

const float* state_of(const OptionalTensor& x, const char* name, int64_t elements) {
  if (!x.has_value()) return nullptr;
  check_contiguous(*x, name);
  STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float && x->numel() == elements, name, ": expected ", elements,
                  " float32 elements");
  return static_cast<const float*>(x->const_data_ptr());
}

bool gate_is_float(const Tensor& g, const Tensor& q) {
  STD_TORCH_CHECK(g.scalar_type() == ScalarType::Float || g.scalar_type() == q.scalar_type(),
                  "g: expected float32 or the dtype of q");
  return g.scalar_type() == ScalarType::Float;
}

/// Everything but the results.
GatedLinearAttentionParams make_params(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& g,
                                       const OptionalTensor& s0, const OptionalTensor& z0,
                                       const OptionalTensor& cu_seqlens, double scale, double eps) {
  GatedLinearAttentionParams p{};
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q: expected q, k and v of shape [B, T, H, D]");
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type(), "k: expected the dtype of q");
  STD_TORCH_CHECK(v.scalar_type() == q.scalar_type(), "v: expected the dtype of q");
  const int64_t batch = q.size(0);
  p.tokens = q.size(1);
  p.dk = q.size(3);
  p.dv = v.size(3);
  p.q = rows_of(q, "q", batch, p.tokens, p.dk);
  p.k = rows_of(k, "k", batch, p.tokens, p.dk);
  p.v = rows_of(v, "v", batch, p.tokens, p.dv);
  p.states = std::max(p.k.heads, p.v.heads);
  if (g.has_value()) {
    p.gate = g->dim() == 4 ? GateKind::kChannel : GateKind::kHead;
    p.gate_is_float = gate_is_float(*g, q);
    p.g = rows_of(*g, "g", batch, p.tokens, p.gate == GateKind::kChannel ? p.dk : 0);
    p.states = std::max(p.states, p.g.heads);
    STD_TORCH_CHECK(p.states % p.g.heads == 0, "g: expected heads that divide the number of states");
  }
  STD_TORCH_CHECK(p.states % p.k.heads == 0, "k: expected heads that divide the number of states");
  STD_TORCH_CHECK(p.states % p.v.heads == 0, "v: expected heads that divide the number of states");
  STD_TORCH_CHECK(p.q.heads % p.states == 0, "q: expected a multiple of ", p.states, " heads");
  p.sequences = batch;
  if (cu_seqlens.has_value()) {
    check_contiguous(*cu_seqlens, "cu_seqlens");
    STD_TORCH_CHECK(cu_seqlens->scalar_type() == ScalarType::Long && cu_seqlens->numel() >= 1 && batch == 1,
                    "cu_seqlens: expected int64 [N + 1] and a batch of 1");
    p.cu_seqlens = static_cast<const int64_t*>(cu_seqlens->const_data_ptr());
    p.sequences = cu_seqlens->numel() - 1;
  }
  p.s0 = state_of(s0, "initial_state", p.sequences * p.states * p.dk * p.dv);
  p.z0 = state_of(z0, "initial_state", p.sequences * p.states * p.dk);
  p.group = std::clamp<int64_t>(p.sequences * p.states / torch::stable::get_num_threads(), 1, kMaxGroup);
  p.scale = static_cast<float>(scale);
  p.eps = static_cast<float>(eps);
  return p;
}

/// A few tokens: waking other threads would take as long as the work.
bool is_small(const GatedLinearAttentionParams& p) {
  constexpr int64_t kSmallProducts = 1 << 18;
  return p.q.heads * p.sequences * p.tokens * p.dk * p.dv < kSmallProducts;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_linear_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                                                      const OptionalTensor& g, const OptionalTensor& s0,
                                                                      const OptionalTensor& z0,
                                                                      const OptionalTensor& cu_seqlens, double scale,
                                                                      double eps, bool normalize) {
  GatedLinearAttentionParams p = make_params(q, k, v, g, s0, z0, cu_seqlens, scale, eps);
  Tensor o = empty({q.size(0), p.tokens, p.q.heads, p.dv}, q.scalar_type());
  Tensor den = empty({normalize ? q.size(0) : 0, p.tokens, p.q.heads}, ScalarType::Float);
  Tensor s = empty({p.sequences, p.states, p.dk, p.dv}, ScalarType::Float);
  Tensor z = empty({normalize ? p.sequences : 0, p.states, p.dk}, ScalarType::Float);
  advise_huge_pages(o);
  p.o = o.mutable_data_ptr();
  p.s = static_cast<float*>(s.mutable_data_ptr());
  if (normalize) {
    p.den = static_cast<float*>(den.mutable_data_ptr());
    p.z = static_cast<float*>(z.mutable_data_ptr());
  }
  const GatedLinearAttentionKernels kernels = kernels_for(q);
  parallel_items_with_scratch(kernels.forward_items(p), is_small(p), kernels.forward_scratch(p),
                              [&](int64_t item, void* scratch) { kernels.forward(p, item, scratch); });
  return {o, den, s, z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_linear_attention_bwd(
    const Tensor& grad_o, const Tensor& grad_s, const OptionalTensor& grad_z, const Tensor& den, const Tensor& q,
    const Tensor& k, const Tensor& v, const OptionalTensor& g, const OptionalTensor& s0, const OptionalTensor& z0,
    const OptionalTensor& cu_seqlens, double scale, double eps, bool normalize) {
  GatedLinearAttentionParams p = make_params(q, k, v, g, s0, z0, cu_seqlens, scale, eps);
  const int64_t batch = q.size(0), rows = batch * p.tokens * p.q.heads;
  check_contiguous(grad_o, "grad_o");
  check_contiguous(den, "den");
  STD_TORCH_CHECK(grad_o.scalar_type() == q.scalar_type() && grad_o.numel() == rows * p.dv,
                  "grad_o: expected dtype and shape of the forward's result");
  STD_TORCH_CHECK(den.scalar_type() == ScalarType::Float && den.numel() == (normalize ? rows : 0),
                  "den: expected dtype and shape of the forward's result");
  STD_TORCH_CHECK(grad_z.has_value() == normalize, "grad_z: expected together with normalize");
  GatedLinearAttentionGrads grads{};
  grads.grad_o = grad_o.const_data_ptr();
  grads.grad_s = state_of(grad_s, "grad_s", p.sequences * p.states * p.dk * p.dv);
  grads.grad_z = state_of(grad_z, "grad_z", p.sequences * p.states * p.dk);
  Tensor dq = empty({batch, p.tokens, p.q.heads, p.dk}, q.scalar_type());
  Tensor dk = empty({batch, p.tokens, p.k.heads, p.dk}, q.scalar_type());
  Tensor dv = empty({batch, p.tokens, p.v.heads, p.dv}, q.scalar_type());
  Tensor dg = empty({0}, ScalarType::Float);
  if (p.gate == GateKind::kChannel) dg = empty({batch, p.tokens, p.g.heads, p.dk}, g->scalar_type());
  if (p.gate == GateKind::kHead) dg = empty({batch, p.tokens, p.g.heads}, g->scalar_type());
  Tensor ds0 = empty({s0.has_value() ? p.sequences : 0, p.states, p.dk, p.dv}, ScalarType::Float);
  Tensor dz0 = empty({z0.has_value() ? p.sequences : 0, p.states, p.dk}, ScalarType::Float);
  for (const Tensor* x : {&dq, &dk, &dv, &dg}) advise_huge_pages(*x);
  grads.dq = dq.mutable_data_ptr();
  grads.dk = dk.mutable_data_ptr();
  grads.dv = dv.mutable_data_ptr();
  grads.dg = dg.mutable_data_ptr();
  if (s0.has_value()) grads.ds0 = static_cast<float*>(ds0.mutable_data_ptr());
  if (z0.has_value()) grads.dz0 = static_cast<float*>(dz0.mutable_data_ptr());
  if (normalize) p.den = const_cast<float*>(static_cast<const float*>(den.const_data_ptr()));
  const GatedLinearAttentionKernels kernels = kernels_for(q);
  parallel_items_with_scratch(kernels.backward_items(p), is_small(p), kernels.backward_scratch(p),
                              [&](int64_t item, void* scratch) { kernels.backward(p, grads, item, scratch); });
  return {dq, dk, dv, dg, ds0, dz0};
}

Tensor gated_linear_attention_step_(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& g,
                                    Tensor& state, const OptionalTensor& z, const OptionalTensor& state_indices,
                                    double scale, double eps) {
  GlaStepParams p{};
  for (const auto& [x, name] : {std::pair{&q, "q"}, {&k, "k"}, {&v, "v"}}) {
    check_contiguous(*x, name);
    STD_TORCH_CHECK(x->dim() == 3 && x->size(0) == q.size(0) && x->scalar_type() == q.scalar_type() &&
                        x->size(1) >= 1 && x->size(2) >= 1 && x->size(2) <= kGlaMaxDim,
                    name, ": expected shape [B, H, D <= ", kGlaMaxDim, "] and the dtype of q");
  }
  check_contiguous(state, "state");
  STD_TORCH_CHECK(state.dim() == 4 && state.scalar_type() == ScalarType::Float, "state: expected float32 [P, H, K, V]");
  p.batch = q.size(0);
  p.q_heads = q.size(1), p.k_heads = k.size(1), p.v_heads = v.size(1);
  p.dk = q.size(2), p.dv = v.size(2);
  p.pool = state.size(0), p.states = state.size(1);
  STD_TORCH_CHECK(k.size(2) == p.dk && state.size(2) == p.dk && state.size(3) == p.dv,
                  "state: expected shape [P, H, K, V] of k and v");
  if (g.has_value()) {
    check_contiguous(*g, "g");
    p.gate = g->dim() == 3 ? GateKind::kChannel : GateKind::kHead;
    p.gate_is_float = gate_is_float(*g, q);
    p.g_heads = g->size(1);
    STD_TORCH_CHECK(g->size(0) == p.batch && (p.gate == GateKind::kHead || g->size(2) == p.dk) && p.g_heads >= 1 &&
                        p.states % p.g_heads == 0,
                    "g: expected shape [B, H, K] or [B, H]");
    p.g = g->const_data_ptr();
  }
  STD_TORCH_CHECK(p.states >= 1 && p.states % p.k_heads == 0 && p.states % p.v_heads == 0 && p.q_heads % p.states == 0,
                  "state: expected a number of heads that those of k and v divide, and that divides those of q");
  if (z.has_value()) {
    check_contiguous(*z, "z");
    STD_TORCH_CHECK(z->scalar_type() == ScalarType::Float && z->numel() == p.pool * p.states * p.dk,
                    "z: expected float32 [P, H, K]");
    p.z = const_cast<float*>(static_cast<const float*>(z->const_data_ptr()));
  }
  if (state_indices.has_value()) {
    check_contiguous(*state_indices, "state_indices");
    STD_TORCH_CHECK(state_indices->scalar_type() == ScalarType::Long && state_indices->numel() == p.batch,
                    "state_indices: expected int64 [B]");
    p.state_indices = static_cast<const int64_t*>(state_indices->const_data_ptr());
  } else {
    STD_TORCH_CHECK(p.pool == p.batch, "state: expected one per row of q");
  }
  Tensor o = empty({p.batch, p.q_heads, p.dv}, q.scalar_type());
  p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.v = v.const_data_ptr();
  p.s = static_cast<float*>(state.mutable_data_ptr());
  p.o = o.mutable_data_ptr();
  p.scale = static_cast<float>(scale);
  p.eps = static_cast<float>(eps);
  constexpr int64_t kSmallState = 1 << 16;
  const GatedLinearAttentionKernels kernels = kernels_for(q);
  const int64_t items = p.batch * p.states;
  parallel_items(items, items * p.dk * p.dv < kSmallState, [&](int64_t item) { kernels.step(p, item); });
  return o;
}

STABLE_TORCH_LIBRARY_IMPL(subquad, CPU, m) {
  m.impl("gated_linear_attention_fwd", TORCH_BOX(&gated_linear_attention_fwd));
  m.impl("gated_linear_attention_bwd", TORCH_BOX(&gated_linear_attention_bwd));
  m.impl("gated_linear_attention_step_", TORCH_BOX(&gated_linear_attention_step_));
}

}  // namespace
}  // namespace subquad::cpu
