// subquad::conv_feature_map_{fwd,bwd} on CPU tensors.
#include "ops/conv_feature_map/cpu.h"

#include "ops/causal_conv1d/cpu_run.h"
#include "ops/conv_feature_map/arguments.h"
#include "torch/register.h"

namespace subquad::cpu {
namespace {

constexpr int64_t kItemRows = 256;
constexpr int64_t kSmallWork = 1 << 16;  // multiplications below which threads do not pay

bool is_small(const FeatureMapParams& map) { return map.rows * map.heads * map.d * map.f < kSmallWork; }

struct Cpu {
  static void forward(const ConvFeatureMapParams& p, DType dtype, const Tensor& x, const auto&...) {
    const FeatureMapParams& map = p.map;
    const CausalConv1dKernels conv = conv_kernels(dtype);
    const int64_t elements = map.rows * map.heads * map.features;
    if (elements > 0) {
      const ConvFeatureMapKernels kernels = SQ_DISPATCH_ISA(conv_feature_map_kernels, dtype);
      const Tensor weights = empty_on(x, {packed_size(p.conv)}, ScalarType::Float);
      float* packed = floats_in(weights);
      conv.pack(p.conv, packed);
      advise_huge_pages(map.out, elements * static_cast<int64_t>(x.element_size()));
      const int64_t blocks = ceil_div(map.time, kItemRows), items = p.conv.batch * blocks * map.heads;
      parallel_items_with_scratch(items, is_small(map), kernels.scratch_bytes(p, false), [&](int64_t i, void* scratch) {
        const int64_t t0 = i / map.heads % blocks * kItemRows, t1 = smaller(map.time, t0 + kItemRows);
        kernels.forward(p, packed, i / map.heads / blocks, t0, t1, i % map.heads, scratch);
      });
    }
    conv_final_states(p.conv, conv);
  }

  static void backward(const ConvFeatureMapParams& p, DType dtype, const Tensor& x, const auto&...) {
    const FeatureMapParams& map = p.map;
    const ConvFeatureMapKernels kernels = SQ_DISPATCH_ISA(conv_feature_map_kernels, dtype);
    const CausalConv1dKernels conv = conv_kernels(dtype, true);
    const Tensor weights = empty_on(x, {packed_size(p.conv)}, ScalarType::Float);
    float* packed = floats_in(weights);
    conv.pack(p.conv, packed);
    advise_huge_pages(p.dy, map.rows * map.heads * map.d * kFloatBytes);
    parallel_items_with_scratch(
        map.chunks * map.heads, is_small(map), kernels.scratch_bytes(p, true),
        [&](int64_t i, void* scratch) { kernels.backward(p, packed, i / map.heads, i % map.heads, scratch); });
    const int64_t maps = map.heads / larger(map.sharing, 1);
    parallel_items(maps, is_small(map), [&](int64_t index) { kernels.reduce(p, index); });
    conv_backward(p.conv, conv, packed, static_cast<int64_t>(x.element_size()));
  }
};

}  // namespace

SQ_REGISTER_OPS(m) {
  m.impl("conv_feature_map_fwd", TORCH_BOX(&conv_feature_map_fwd<Cpu>));
  m.impl("conv_feature_map_bwd", TORCH_BOX(&conv_feature_map_bwd<Cpu>));
}

}  // namespace subquad::cpu
