// Arguments and results of conv_feature_map_{fwd,bwd}. `Device` has forward and backward as run(params, dtype,
// tensors...), where the tensors are all that it touches, x first.
#pragma once

#include "ops/causal_conv1d/arguments.h"
#include "ops/conv_feature_map/params.h"
#include "ops/feature_map/arguments.h"

namespace subquad {

inline ConvFeatureMapParams conv_feature_map_arguments(const Tensor& x, const Tensor& conv_weight,
                                                       const Tensor& fm_weight, const OptionalTensor& conv_bias,
                                                       const OptionalTensor& initial_state,
                                                       const OptionalTensor& cu_seqlens, const OptionalTensor& sequence,
                                                       int64_t groups, bool silu, int64_t kind, bool fullspace,
                                                       double eps) {
  check_dims(fm_weight, "fm_weight", 3);
  ConvFeatureMapParams p{};
  FeatureMapParams& map = p.map;
  const int64_t maps = fm_weight.size(0);
  map.d = fm_weight.size(1);
  map.f = fm_weight.size(2);
  STD_TORCH_CHECK(smaller(map.d, map.f) >= 1 && larger(map.d, map.f) <= kFeatureMaxDim,
                  "fm_weight: expected shape [M, d, f] with d and f in 1..", kFeatureMaxDim, ", got ",
                  shape_text(fm_weight.sizes()));
  p.conv = conv_arguments(x, conv_weight, conv_bias, initial_state, cu_seqlens, sequence, groups, map.d, silu,
                          {"conv_weight", "conv_bias"});
  map.heads = p.conv.channels / map.d;
  STD_TORCH_CHECK(maps > 0 ? map.heads % maps == 0 && map.heads >= maps : map.heads == 0,
                  "fm_weight: expected M to divide the ", map.heads, " heads of conv_weight, got ", maps);
  map.weight = data_of(fm_weight, "fm_weight", {maps, map.d, map.f}, {x, "x"});
  map.sharing = map.heads / larger(maps, 1);
  set_map_rows(map, p.conv.batch, p.conv.time);
  set_map_kind(map, kind, fullspace, eps);
  return p;
}

template <class Device>
std::tuple<Tensor, Tensor> conv_feature_map_fwd(const Tensor& x, const Tensor& conv_weight, const Tensor& fm_weight,
                                                const OptionalTensor& conv_bias, const OptionalTensor& initial_state,
                                                const OptionalTensor& cu_seqlens, const OptionalTensor& sequence,
                                                int64_t groups, bool silu, int64_t kind, bool fullspace, double eps,
                                                bool output_final_state) {
  ConvFeatureMapParams p = conv_feature_map_arguments(x, conv_weight, fm_weight, conv_bias, initial_state, cu_seqlens,
                                                      sequence, groups, silu, kind, fullspace, eps);
  const DType dtype = dtype_of(x, "x");
  const Tensor out = empty_on(x, {p.conv.batch, p.map.time, p.map.heads, p.map.features}, x.scalar_type());
  p.map.out = out.mutable_data_ptr();
  const Tensor final_state = conv_final_state(p.conv, x, output_final_state);
  Device::forward(p, dtype, x, conv_weight, fm_weight, conv_bias, initial_state, cu_seqlens, sequence, out,
                  final_state);
  return {out, final_state};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_feature_map_bwd(
    const Tensor& grad_phi, const OptionalTensor& grad_final, const Tensor& x, const Tensor& conv_weight,
    const Tensor& fm_weight, const OptionalTensor& conv_bias, const OptionalTensor& initial_state,
    const OptionalTensor& cu_seqlens, const OptionalTensor& sequence, int64_t groups, bool silu, int64_t kind,
    bool fullspace, double eps) {
  ConvFeatureMapParams p = conv_feature_map_arguments(x, conv_weight, fm_weight, conv_bias, initial_state, cu_seqlens,
                                                      sequence, groups, silu, kind, fullspace, eps);
  FeatureMapParams& map = p.map;
  map.grad_out = data_of(grad_phi, "grad_phi", {p.conv.batch, map.time, map.heads, map.features}, {x, "x"});
  const DType dtype = dtype_of(x, "x");
  const Tensor dmaps = empty_on(x, {fm_weight.size(0), map.d, map.f}, x.scalar_type());
  const Tensor dy = empty_on(x, {p.conv.batch, map.time, map.heads, map.d}, ScalarType::Float);
  const Tensor partials = empty_on(x, {map.chunks, map.heads, map.d, map.f}, ScalarType::Float);
  const ConvGradients grads(p.conv, grad_final, x, conv_bias.has_value(), initial_state.has_value());
  map.dweight = dmaps.mutable_data_ptr();
  map.partials = floats_in(partials);
  p.dy = floats_in(dy);
  p.conv.grad_y = p.dy;
  Device::backward(p, dtype, x, conv_weight, fm_weight, conv_bias, initial_state, cu_seqlens, sequence, grad_phi,
                   grad_final, dmaps, dy, partials, grads.dx, grads.dweight, grads.dbias, grads.dstate, grads.partial);
  return {grads.dx, grads.dweight, dmaps, grads.dbias, grads.dstate};
}

}  // namespace subquad
