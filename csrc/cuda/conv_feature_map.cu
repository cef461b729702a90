// Binding of conv_feature_map_fwd.
#include "conv_feature_map.cuh"

#include <tuple>

#include "causal_conv1d_binding.h"
#include "feature_map_binding.h"

namespace subquad::cuda {
namespace {

std::tuple<Tensor, Tensor> conv_feature_map_fwd(const Tensor& x, const Tensor& conv_weight, const Tensor& fm_weight,
                                                const OptionalTensor& conv_bias, const OptionalTensor& initial_state,
                                                const OptionalTensor& cu_seqlens, const OptionalTensor& sequence,
                                                int64_t groups, bool silu, int64_t kind, bool fullspace, double eps,
                                                bool output_final_state) {
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
  STD_TORCH_CHECK(maps > 0 ? map.heads % maps == 0 : map.heads == 0, "fm_weight: expected M to divide the ", map.heads,
                  " heads of conv_weight");
  map.weight = packed_pointer(fm_weight, "fm_weight", {maps, map.d, map.f}, x);
  p.sharing = map.heads / std::max<int64_t>(maps, 1);
  map.time = p.conv.time;
  map.rows = p.conv.batch * p.conv.time;
  set_map_kind(map, kind, fullspace, eps);

  const Tensor out = empty_on(x, {p.conv.batch, map.time, map.heads, map.features}, x.scalar_type());
  const Tensor final_state = output_final_state
                                 ? empty_on(x, {p.conv.sequences, p.conv.inputs, p.conv.taps - 1}, x.scalar_type())
                                 : empty_on(x, {0}, x.scalar_type());
  const LaunchScope scope(x, conv_weight, fm_weight, conv_bias, initial_state, cu_seqlens, sequence, out, final_state);
  map.out = out.mutable_data_ptr();
  if (output_final_state) p.conv.final_state = final_state.mutable_data_ptr();
  dispatch_dtype(x, "x", [&](auto element) { conv_feature_map_forward<decltype(element)>(p, scope.stream()); });
  return {out, final_state};
}

}  // namespace
}  // namespace subquad::cuda

SQ_REGISTER_OPS(m) { m.impl("conv_feature_map_fwd", TORCH_BOX(&subquad::cuda::conv_feature_map_fwd)); }
