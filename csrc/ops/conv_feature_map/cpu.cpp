// subquad::conv_feature_map_fwd on CPU tensors.
#include "ops/conv_feature_map/cpu.h"

#include <algorithm>
#include <tuple>

#include "cpu/isa.h"
#include "ops/causal_conv1d/cpu_binding.h"
#include "ops/feature_map/cpu_binding.h"

namespace subquad::cpu {
namespace {

constexpr int64_t kItemRows = 256;
constexpr int64_t kSmallWork = 1 << 16;  // multiplications below which threads do not pay

ConvFeatureMapParams make_params(const Tensor& x, const Tensor& conv_weight, const Tensor& fm_weight,
                                 const OptionalTensor& conv_bias, const OptionalTensor& initial_state,
                                 const OptionalTensor& cu_seqlens, const OptionalTensor& sequence, int64_t groups,
                                 bool silu, int64_t kind, bool fullspace, double eps) {
  STD_TORCH_CHECK(fm_weight.dim() == 3, "fm_weight: expected shape [M, d, f]");
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
  check_packed(fm_weight, "fm_weight", {maps, map.d, map.f}, x);
  map.sharing = map.heads / std::max<int64_t>(maps, 1);
  map.weight = fm_weight.const_data_ptr();
  map.time = p.conv.time;
  map.rows = p.conv.batch * p.conv.time;
  map.chunk = feature_map_chunk(map.rows);
  map.chunks = ceil_div(map.rows, map.chunk);
  set_map_kind(map, kind, fullspace, eps);
  return p;
}

ConvFeatureMapKernels kernels_for(const Tensor& x) {
  return SQ_DISPATCH_ISA(conv_feature_map_kernels, dtype_of(x, "x"));
}

bool is_small(const FeatureMapParams& map) { return map.rows * map.heads * map.d * map.f < kSmallWork; }

std::tuple<Tensor, Tensor> conv_feature_map_fwd(const Tensor& x, const Tensor& conv_weight, const Tensor& fm_weight,
                                                const OptionalTensor& conv_bias, const OptionalTensor& initial_state,
                                                const OptionalTensor& cu_seqlens, const OptionalTensor& sequence,
                                                int64_t groups, bool silu, int64_t kind, bool fullspace, double eps,
                                                bool output_final_state) {
  ConvFeatureMapParams p = make_params(x, conv_weight, fm_weight, conv_bias, initial_state, cu_seqlens, sequence,
                                       groups, silu, kind, fullspace, eps);
  FeatureMapParams& map = p.map;
  Tensor out = empty({p.conv.batch, map.time, map.heads, map.features}, x.scalar_type());
  Tensor final_state = output_final_state ? empty({p.conv.sequences, p.conv.inputs, p.conv.taps - 1}, x.scalar_type())
                                          : empty({0}, x.scalar_type());
  const ConvFeatureMapKernels kernels = kernels_for(x);
  const CausalConv1dKernels conv = conv_kernels(x);
  if (out.numel() > 0) {
    const Tensor weights = packed_weights(p.conv, conv);
    const auto* packed = static_cast<const float*>(weights.const_data_ptr());
    advise_huge_pages(out);
    map.out = out.mutable_data_ptr();
    const int64_t blocks = ceil_div(map.time, kItemRows), items = p.conv.batch * blocks * map.heads;
    parallel_items_with_scratch(items, is_small(map), kernels.scratch_bytes(p, false), [&](int64_t i, void* scratch) {
      const int64_t t0 = i / map.heads % blocks * kItemRows, t1 = std::min(map.time, t0 + kItemRows);
      kernels.forward(p, packed, i / map.heads / blocks, t0, t1, i % map.heads, scratch);
    });
  }
  if (final_state.numel() > 0) {
    p.conv.final_state = final_state.mutable_data_ptr();
    parallel_items(p.conv.sequences, final_state.numel() < kSmall, [&](int64_t n) { conv.final_state(p.conv, n); });
  }
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
  check_packed(grad_phi, "grad_phi", {p.conv.batch, map.time, map.heads, map.features}, x);
  set_grad_final(p.conv, grad_final, x);
  const int64_t maps = fm_weight.size(0);
  Tensor dmaps = empty({maps, map.d, map.f}, x.scalar_type());
  const Tensor dy = empty({p.conv.batch, map.time, map.heads, map.d}, ScalarType::Float);
  const Tensor partials = empty({map.chunks, map.heads, map.d, map.f}, ScalarType::Float);
  const ConvFeatureMapKernels kernels = kernels_for(x);
  const CausalConv1dKernels conv = conv_kernels(x, true);
  const Tensor weights = packed_weights(p.conv, conv);
  const auto* packed = static_cast<const float*>(weights.const_data_ptr());
  advise_huge_pages(dy);
  map.grad_out = grad_phi.const_data_ptr();
  map.dweight = dmaps.mutable_data_ptr();
  map.partials = static_cast<float*>(partials.mutable_data_ptr());
  p.dy = static_cast<float*>(dy.mutable_data_ptr());
  p.conv.grad_y = p.dy;
  parallel_items_with_scratch(
      map.chunks * map.heads, is_small(map), kernels.scratch_bytes(p, true),
      [&](int64_t i, void* scratch) { kernels.backward(p, packed, i / map.heads, i % map.heads, scratch); });
  parallel_items(maps, is_small(map), [&](int64_t index) { kernels.reduce(p, index); });
  const auto [dx, dconv, dbias, dstate] =
      conv_backward(p.conv, conv, weights, x.scalar_type(), conv_bias.has_value(), initial_state.has_value());
  return {dx, dconv, dmaps, dbias, dstate};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(subquad, CPU, m) {
  m.impl("conv_feature_map_fwd", TORCH_BOX(&conv_feature_map_fwd));
  m.impl("conv_feature_map_bwd", TORCH_BOX(&conv_feature_map_bwd));
}

}  // namespace subquad::cpu
