// Arguments and results of feature_map_{fwd,bwd}. `Device` has forward and backward as run(params, dtype, tensors...),
// where the tensors are all that it touches, x first.
#pragma once

#include <tuple>

#include "common/integers.h"
#include "ops/feature_map/params.h"
#include "torch/checks.h"

namespace subquad {

/// The options of the map; p.f is known.
inline void set_map_kind(FeatureMapParams& p, int64_t kind, bool fullspace, double eps) {
  STD_TORCH_CHECK(kind >= 0 && kind < kFeatureKindCount, "kind: expected a code in [0, ", kFeatureKindCount, "), got ",
                  kind);
  p.kind = static_cast<FeatureKind>(kind);
  STD_TORCH_CHECK(fullspace || p.kind != FeatureKind::kHedgehog2, "fullspace: expected true with this kind, got false");
  p.fullspace = fullspace;
  p.features = fullspace ? 2 * p.f : p.f;
  p.eps = p.kind == FeatureKind::kElu1 ? -__builtin_inff() : static_cast<float>(eps);
}

/// Rows of all tokens, cut into partial sums.
inline void set_map_rows(FeatureMapParams& p, int64_t batch, int64_t time) {
  p.time = time;
  p.rows = batch * time;
  p.chunk = feature_map_chunk(p.rows);
  p.chunks = ceil_div(p.rows, p.chunk);
}

inline FeatureMapParams feature_map_arguments(const Tensor& x, const OptionalTensor& weight, int64_t kind,
                                              bool fullspace, double eps) {
  const Anchor like_x{x, "x"};
  check_dims(x, "x", 4);
  FeatureMapParams p{};
  set_map_rows(p, x.size(0), x.size(1));
  p.heads = x.size(2);
  p.sharing = 1;
  p.d = p.f = x.size(3);
  STD_TORCH_CHECK(p.d >= 1 && p.d <= kFeatureMaxDim, "x: expected a head dimension in 1..", kFeatureMaxDim, ", got ",
                  p.d);
  check_last_contiguous(x, "x");
  if (weight.has_value()) {
    check_dims(*weight, "weight", 3);
    p.f = weight->size(2);
    STD_TORCH_CHECK(p.f >= 1 && p.f <= kFeatureMaxDim, "weight: expected a feature dimension in 1..", kFeatureMaxDim,
                    ", got ", p.f);
    p.weight = data_of(*weight, "weight", {p.heads, p.d, p.f}, like_x);
  }
  set_map_kind(p, kind, fullspace, eps);
  p.x = x.const_data_ptr();
  p.x_batch = x.stride(0);
  p.x_time = x.stride(1);
  p.x_head = x.stride(2);
  return p;
}

template <class Device>
Tensor feature_map_fwd(const Tensor& x, const OptionalTensor& weight, int64_t kind, bool fullspace, double eps) {
  FeatureMapParams p = feature_map_arguments(x, weight, kind, fullspace, eps);
  const DType dtype = dtype_of(x, "x");
  const Tensor out = empty_on(x, {x.size(0), p.time, p.heads, p.features}, x.scalar_type());
  p.out = out.mutable_data_ptr();
  Device::forward(p, dtype, x, weight, out);
  return out;
}

template <class Device>
std::tuple<Tensor, Tensor> feature_map_bwd(const Tensor& grad_out, const Tensor& x, const OptionalTensor& weight,
                                           int64_t kind, bool fullspace, double eps) {
  FeatureMapParams p = feature_map_arguments(x, weight, kind, fullspace, eps);
  const DType dtype = dtype_of(x, "x");
  p.grad_out = data_of(grad_out, "grad_out", {x.size(0), p.time, p.heads, p.features}, {x, "x"});
  const bool weighted = weight.has_value();
  const Tensor dx = empty_on(x, {x.size(0), p.time, p.heads, p.d}, x.scalar_type());
  const Tensor dweight = empty_if(weighted, x, {p.heads, p.d, p.f}, x.scalar_type());
  const Tensor partials = empty_if(weighted, x, {p.chunks, p.heads, p.d, p.f}, ScalarType::Float);
  p.dx = dx.mutable_data_ptr();
  p.dweight = dweight.mutable_data_ptr();
  p.partials = floats_in(partials);
  Device::backward(p, dtype, x, weight, grad_out, dx, dweight, partials);
  return {dx, dweight};
}

}  // namespace subquad
