// subquad::feature_map_{fwd,bwd} on CPU tensors.
#include "ops/feature_map/cpu.h"

#include "cpu/threads.h"
#include "ops/feature_map/arguments.h"
#include "torch/register.h"

namespace subquad::cpu {
namespace {

constexpr int64_t kItemRows = 256;       // of the forward pass
constexpr int64_t kSmallWork = 1 << 16;  // multiplications below which threads do not pay

bool is_small(const FeatureMapParams& p) { return p.rows * p.heads * p.d * p.f < kSmallWork; }

struct Cpu {
  static void forward(const FeatureMapParams& p, DType dtype, const auto&...) {
    const FeatureMapKernels kernels = SQ_DISPATCH_ISA(feature_map_kernels, dtype);
    const int64_t items = ceil_div(p.rows, kItemRows) * p.heads;
    parallel_items_with_scratch(items, is_small(p), kernels.scratch_bytes(p, false), [&](int64_t i, void* scratch) {
      const int64_t begin = i / p.heads * kItemRows;
      kernels.forward(p, i % p.heads, begin, smaller(p.rows, begin + kItemRows), scratch);
    });
  }

  static void backward(const FeatureMapParams& p, DType dtype, const auto&...) {
    const FeatureMapKernels kernels = SQ_DISPATCH_ISA(feature_map_kernels, dtype);
    parallel_items_with_scratch(
        p.chunks * p.heads, is_small(p), kernels.scratch_bytes(p, true),
        [&](int64_t i, void* scratch) { kernels.backward(p, i % p.heads, i / p.heads, scratch); });
    if (p.weight == nullptr) return;
    parallel_items(p.heads, is_small(p), [&](int64_t head) { kernels.reduce(p, head); });
  }
};

}  // namespace

SQ_REGISTER_OPS(m) {
  m.impl("feature_map_fwd", TORCH_BOX(&feature_map_fwd<Cpu>));
  m.impl("feature_map_bwd", TORCH_BOX(&feature_map_bwd<Cpu>));
}

}  // namespace subquad::cpu
