// Binding of conv_feature_map_fwd.
#include "ops/conv_feature_map/cuda.cuh"

#include <tuple>

#include "ops/causal_conv1d/cuda_binding.h"
#include "ops/feature_map/cuda_binding.h"

namespace subquad::cuda {
namespace {

ConvFeatureMapParams make_params(const Tensor& x, const Tensor& conv_weight, const Tensor& fm_weight,
                                 const OptionalTensor& conv_bias, const OptionalTensor& initial_state,
                                 const OptionalTensor& cu_seqlens, const OptionalTensor& sequence, int64_t groups,
                                 bool silu, int64_t kind, bool fullspace, double eps) {
  check_dims(fm_weight, "fm_weight", 3);
  ConvFeatureMapParams p{};
  FeatureMapParams& map = p.map;
  const int64_t maps = fm_weight.size(0);
  map.d = fm_weight.size(1);
  map.f = fm_weight.size(2);
  STD_TORCH_CHECK(std::min(map.d, map.f) >= 1 && std::max(map.d, map.f) <= kFeatureMaxDim,
                  "fm_weight: expected shape [M, d, f] with d and f in 1..", kFeatureMaxDim);
  p.conv = conv_arguments(x, conv_weight, conv_bias, initial_state, cu_seqlens, sequence, groups, map.d, silu,
                          {"conv_weight", "conv_bias"});
  map.heads = p.conv.channels / map.d;
  STD_TORCH_CHECK(maps > 0 ? map.heads % maps == 0 && map.heads >= maps : map.heads == 0,
                  "fm_weight: expected M to divide the ", map.heads, " heads of conv_weight");
  map.weight = packed_pointer(fm_weight, "fm_weight", {maps, map.d, map.f}, x);
  map.sharing = map.heads / std::max<int64_t>(maps, 1);
  map.time = p.conv.time;
  map.rows = p.conv.batch * p.conv.time;
  map.chunk = feature_map_chunk(map.rows);
  map.chunks = ceil_div(map.rows, map.chunk);
  set_map_kind(map, kind, fullspace, eps);
  return p;
}

std::tuple<Tensor, Tensor> conv_feature_map_fwd(const Tensor& x, const Tensor& conv_weight, const Tensor& fm_weight,
                                                const OptionalTensor& conv_bias, const OptionalTensor& initial_state,
                                                const OptionalTensor& cu_seqlens, const OptionalTensor& sequence,
                                                int64_t groups, bool silu, int64_t kind, bool fullspace, double eps,
                                                bool output_final_state) {
  ConvFeatureMapParams p = make_params(x, conv_weight, fm_weight, conv_bias, initial_state, cu_seqlens, sequence,
                                       groups, silu, kind, fullspace, eps);
  const Tensor out = empty_on(x, {p.conv.batch, p.map.time, p.map.heads, p.map.features}, x.scalar_type());
  const Tensor final_state = output_final_state
                                 ? empty_on(x, {p.conv.sequences, p.conv.inputs, p.conv.taps - 1}, x.scalar_type())
                                 : empty_on(x, {0}, x.scalar_type());
  const LaunchScope scope(x, conv_weight, fm_weight, conv_bias, initial_state, cu_seqlens, sequence, out, final_state);
  p.map.out = out.mutable_data_ptr();
  if (output_final_state) p.conv.final_state = final_state.mutable_data_ptr();
  dispatch_dtype(x, "x", [&](auto element) { conv_feature_map_forward<decltype(element)>(p, scope.stream()); });
  return {out, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_feature_map_bwd(
    const Tensor& grad_phi, const OptionalTensor& grad_final, const Tensor& x, const Tensor& conv_weight,
    const Tensor& fm_weight, const OptionalTensor& conv_bias, const OptionalTensor& initial_state,
    const OptionalTensor& cu_seqlens, const OptionalTensor& sequence, int64_t groups, bool silu, int64_t kind,
    bool fullspace, double eps) {
  ConvFeatureMapParams p = make_params(x, conv_weight, fm_weight, conv_bias, initial_state, cu_seqlens, sequence,
                                       groups, silu, kind, fullspace, eps);
  FeatureMapParams& map = p.map;
  map.grad_out = packed_pointer(grad_phi, "grad_phi", {p.conv.batch, map.time, map.heads, map.features}, x);
  const Tensor dmaps = empty_contiguous_like(fm_weight);
  const Tensor dy = empty_on(x, {p.conv.batch, map.time, map.heads, map.d}, ScalarType::Float);
  const Tensor partials = empty_on(x, {map.chunks, map.heads, map.d, map.f}, ScalarType::Float);
  const ConvGradients grads(p.conv, grad_final, x, conv_bias.has_value(), initial_state.has_value());
  const LaunchScope scope(x, conv_weight, fm_weight, conv_bias, initial_state, cu_seqlens, sequence, grad_phi,
                          grad_final, dmaps, dy, partials, grads.dx, grads.dweight, grads.dbias, grads.dstate,
                          grads.partial);
  map.dweight = dmaps.mutable_data_ptr();
  map.partials = static_cast<float*>(partials.mutable_data_ptr());
  p.dy = static_cast<float*>(dy.mutable_data_ptr());
  p.conv.grad_y = p.dy;
  dispatch_dtype(x, "x", [&](auto element) { conv_feature_map_backward<decltype(element)>(p, scope.stream()); });
  return {grads.dx, grads.dweight, dmaps, grads.dbias, grads.dstate};
}

}  // namespace
}  // namespace subquad::cuda

SQ_REGISTER_OPS(m) {
  m.impl("conv_feature_map_fwd", TORCH_BOX(&subquad::cuda::conv_feature_map_fwd));
  m.impl("conv_feature_map_bwd", TORCH_BOX(&subquad::cuda::conv_feature_map_bwd));
}
