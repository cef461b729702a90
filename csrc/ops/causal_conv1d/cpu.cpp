// subquad::causal_conv1d_* on CPU tensors.
#include "ops/causal_conv1d/cpu.h"

#include "ops/causal_conv1d/arguments.h"
#include "ops/causal_conv1d/cpu_run.h"
#include "torch/register.h"

namespace subquad::cpu {
namespace {

struct Cpu {
  static void forward(const CausalConv1dParams& p, DType dtype, const Tensor& x, const auto&...) {
    const CausalConv1dKernels kernels = conv_kernels(dtype);
    const int64_t elements = p.batch * p.time * p.channels;
    if (elements > 0) {
      const Tensor weights = empty_on(x, {packed_size(p)}, ScalarType::Float);
      float* packed = floats_in(weights);
      kernels.pack(p, packed);
      advise_huge_pages(p.y, elements * static_cast<int64_t>(x.element_size()));
      const int64_t rows = p.blocks(), slices = ceil_div(p.channels, kConvChannels), items = p.batch * rows * slices;
      const int64_t bytes = p.state == nullptr ? 0 : kConvMaxTaps * std::min(kConvChannels, p.channels) * kFloatBytes;
      parallel_items_with_scratch(items, elements < kConvSmall, bytes, [&](int64_t i, void* scratch) {
        const int64_t slice = i % slices, t0 = i / slices % rows * kConvBlock, b = i / slices / rows;
        kernels.forward(p, packed, static_cast<float*>(scratch), b, t0, std::min(p.time, t0 + kConvBlock),
                        slice * kConvChannels, std::min(p.channels, (slice + 1) * kConvChannels));
      });
    }
    conv_final_states(p, kernels);
  }

  static void backward(const CausalConv1dParams& p, DType dtype, const Tensor& x, const auto&...) {
    const CausalConv1dKernels kernels = conv_kernels(dtype);
    const Tensor weights = empty_on(x, {packed_size(p)}, ScalarType::Float);
    float* packed = floats_in(weights);
    kernels.pack(p, packed);
    conv_backward(p, kernels, packed, static_cast<int64_t>(x.element_size()));
  }

  static void update(const CausalConv1dUpdateParams& p, DType dtype, const auto&...) {
    const int64_t elements = p.batch * p.tokens * p.channels;
    if (elements == 0) return;
    const CausalConv1dKernels kernels = conv_kernels(dtype);
    constexpr int64_t kSlice = 512;
    const int64_t slices = ceil_div(p.inputs, kSlice);
    parallel_items(p.batch * slices, elements < kConvSmall / 2, [&](int64_t i) {
      const int64_t c0 = i % slices * kSlice;
      kernels.update(p, i / slices, c0, std::min(p.inputs, c0 + kSlice));
    });
  }
};

}  // namespace

SQ_REGISTER_OPS(m) {
  m.impl("causal_conv1d_fwd", TORCH_BOX(&causal_conv1d_fwd<Cpu>));
  m.impl("causal_conv1d_bwd", TORCH_BOX(&causal_conv1d_bwd<Cpu>));
  m.impl("causal_conv1d_update_", TORCH_BOX(&causal_conv1d_update_<Cpu>));
}

}  // namespace subquad::cpu
