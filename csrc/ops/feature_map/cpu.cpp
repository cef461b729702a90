// subquad::feature_map_{fwd,bwd} on CPU tensors.
#include "ops/feature_map/cpu.h"

#include <algorithm>
#include <tuple>

#include "cpu/isa.h"
#include "ops/feature_map/cpu_binding.h"

namespace subquad::cpu {
namespace {

constexpr int64_t kItemRows = 256;       // of the forward pass
constexpr int64_t kSmallWork = 1 << 16;  // multiplications below which threads do not pay

FeatureMapParams make_params(const Tensor& x, const OptionalTensor& weight, int64_t kind, bool fullspace, double eps) {
  STD_TORCH_CHECK(x.dim() == 4, "x: expected shape [B, T, H, d]");
  FeatureMapParams p{};
  p.rows = x.size(0) * x.size(1);
  p.time = x.size(1);
  p.heads = x.size(2);
  p.sharing = 1;
  p.d = p.f = x.size(3);
  STD_TORCH_CHECK(p.d >= 1 && p.d <= kFeatureMaxDim, "x: expected a head dimension in 1..", kFeatureMaxDim);
  STD_TORCH_CHECK(p.d == 1 || x.stride(3) == 1, "x: expected a contiguous last dimension");
  if (weight.has_value()) {
    const Tensor& w = *weight;
    STD_TORCH_CHECK(w.scalar_type() == x.scalar_type(), "weight: expected the dtype of x");
    STD_TORCH_CHECK(w.dim() == 3 && w.size(0) == p.heads && w.size(1) == p.d, "weight: expected shape [", p.heads, ", ",
                    p.d, ", f]");
    p.f = w.size(2);
    STD_TORCH_CHECK(p.f >= 1 && p.f <= kFeatureMaxDim, "weight: expected a feature dimension in 1..", kFeatureMaxDim);
    check_contiguous(w, "weight");
    p.weight = w.const_data_ptr();
  }
  set_map_kind(p, kind, fullspace, eps);
  p.x = x.const_data_ptr();
  p.x_batch = x.stride(0);
  p.x_time = x.stride(1);
  p.x_head = x.stride(2);
  p.chunk = feature_map_chunk(p.rows);
  p.chunks = (p.rows + p.chunk - 1) / p.chunk;
  return p;
}

FeatureMapKernels kernels_for(const Tensor& x) { return SQ_DISPATCH_ISA(feature_map_kernels, dtype_of(x, "x")); }

Tensor feature_map_fwd(const Tensor& x, const OptionalTensor& weight, int64_t kind, bool fullspace, double eps) {
  FeatureMapParams p = make_params(x, weight, kind, fullspace, eps);
  const FeatureMapKernels kernels = kernels_for(x);
  Tensor out = empty({x.size(0), p.time, p.heads, p.features}, x.scalar_type());
  p.out = out.mutable_data_ptr();
  const int64_t blocks = (p.rows + kItemRows - 1) / kItemRows, items = blocks * p.heads;
  const bool small = p.rows * p.heads * p.d * p.f < kSmallWork;
  parallel_items_with_scratch(items, small, kernels.scratch_bytes(p, false), [&](int64_t i, void* scratch) {
    const int64_t begin = i / p.heads * kItemRows;
    kernels.forward(p, i % p.heads, begin, std::min(p.rows, begin + kItemRows), scratch);
  });
  return out;
}

std::tuple<Tensor, Tensor> feature_map_bwd(const Tensor& grad_out, const Tensor& x, const OptionalTensor& weight,
                                           int64_t kind, bool fullspace, double eps) {
  FeatureMapParams p = make_params(x, weight, kind, fullspace, eps);
  const FeatureMapKernels kernels = kernels_for(x);
  STD_TORCH_CHECK(grad_out.scalar_type() == x.scalar_type(), "grad_out: expected the dtype of x");
  STD_TORCH_CHECK(grad_out.dim() == 4 && grad_out.size(0) == x.size(0) && grad_out.size(1) == p.time &&
                      grad_out.size(2) == p.heads && grad_out.size(3) == p.features,
                  "grad_out: expected shape [", x.size(0), ", ", p.time, ", ", p.heads, ", ", p.features, "]");
  check_contiguous(grad_out, "grad_out");
  Tensor dx = empty({x.size(0), p.time, p.heads, p.d}, x.scalar_type());
  const bool weighted = weight.has_value();
  Tensor dweight = weighted ? empty({p.heads, p.d, p.f}, x.scalar_type()) : empty({0}, x.scalar_type());
  Tensor partials = weighted ? empty({p.chunks, p.heads, p.d, p.f}, ScalarType::Float) : empty({0}, ScalarType::Float);
  p.grad_out = grad_out.const_data_ptr();
  p.dx = dx.mutable_data_ptr();
  p.dweight = dweight.mutable_data_ptr();
  p.partials = static_cast<float*>(partials.mutable_data_ptr());
  const int64_t items = p.chunks * p.heads;
  const bool small = p.rows * p.heads * p.d * p.f < kSmallWork;
  parallel_items_with_scratch(items, small, kernels.scratch_bytes(p, true), [&](int64_t i, void* scratch) {
    kernels.backward(p, i % p.heads, i / p.heads, scratch);
  });
  if (weighted) parallel_items(p.heads, small, [&](int64_t head) { kernels.reduce(p, head); });
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(subquad, CPU, m) {
  m.impl("feature_map_fwd", TORCH_BOX(&feature_map_fwd));
  m.impl("feature_map_bwd", TORCH_BOX(&feature_map_bwd));
}

}  // namespace subquad::cpu
