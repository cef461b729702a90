// Binding of feature_map_{fwd,bwd}.
#include "ops/feature_map/cuda.cuh"

#include <tuple>

#include "ops/feature_map/cuda_binding.h"

namespace subquad::cuda {
namespace {

FeatureMapParams make_params(const Tensor& x, const OptionalTensor& weight, int64_t kind, bool fullspace, double eps) {
  check_dims(x, "x", 4);
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
    check_dims(w, "weight", 3);
    p.f = w.size(2);
    check_shape(w, "weight", {p.heads, p.d, p.f});
    STD_TORCH_CHECK(p.f >= 1 && p.f <= kFeatureMaxDim, "weight: expected a feature dimension in 1..", kFeatureMaxDim);
    check_same_dtype(w, "weight", x, "x");
    check_same_device(w, "weight", x, "x");
    check_contiguous(w, "weight");
    p.weight = w.const_data_ptr();
  }
  set_map_kind(p, kind, fullspace, eps);
  p.x = x.const_data_ptr();
  p.x_batch = x.stride(0);
  p.x_time = x.stride(1);
  p.x_head = x.stride(2);
  p.chunk = feature_map_chunk(p.rows);
  p.chunks = ceil_div(p.rows, p.chunk);
  return p;
}

Tensor feature_map_fwd(const Tensor& x, const OptionalTensor& weight, int64_t kind, bool fullspace, double eps) {
  FeatureMapParams p = make_params(x, weight, kind, fullspace, eps);
  const Tensor out = empty_on(x, {x.size(0), p.time, p.heads, p.features}, x.scalar_type());
  const LaunchScope scope(x, weight, out);
  p.out = out.mutable_data_ptr();
  dispatch_dtype(x, "x", [&](auto element) { feature_map_forward<decltype(element)>(p, scope.stream()); });
  return out;
}

std::tuple<Tensor, Tensor> feature_map_bwd(const Tensor& grad_out, const Tensor& x, const OptionalTensor& weight,
                                           int64_t kind, bool fullspace, double eps) {
  FeatureMapParams p = make_params(x, weight, kind, fullspace, eps);
  check_shape(grad_out, "grad_out", {x.size(0), p.time, p.heads, p.features});
  check_same_dtype(grad_out, "grad_out", x, "x");
  check_same_device(grad_out, "grad_out", x, "x");
  check_contiguous(grad_out, "grad_out");
  const bool weighted = weight.has_value();
  const Tensor dx = empty_on(x, {x.size(0), p.time, p.heads, p.d}, x.scalar_type());
  const Tensor dweight =
      weighted ? empty_on(x, {p.heads, p.d, p.f}, x.scalar_type()) : empty_on(x, {0}, x.scalar_type());
  const Tensor partials =
      weighted ? empty_on(x, {p.chunks, p.heads, p.d, p.f}, ScalarType::Float) : empty_on(x, {0}, ScalarType::Float);
  const LaunchScope scope(x, weight, grad_out, dx, dweight, partials);
  p.grad_out = grad_out.const_data_ptr();
  p.dx = dx.mutable_data_ptr();
  p.dweight = dweight.mutable_data_ptr();
  p.partials = static_cast<float*>(partials.mutable_data_ptr());
  dispatch_dtype(x, "x", [&](auto element) { feature_map_backward<decltype(element)>(p, scope.stream()); });
  return {dx, dweight};
}

}  // namespace
}  // namespace subquad::cuda

SQ_REGISTER_OPS(m) {
  m.impl("feature_map_fwd", TORCH_BOX(&subquad::cuda::feature_map_fwd));
  m.impl("feature_map_bwd", TORCH_BOX(&subquad::cuda::feature_map_bwd));
}
