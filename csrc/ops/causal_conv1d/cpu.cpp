// subquad::causal_conv1d_* on CPU tensors.
#include "ops/causal_conv1d/cpu.h"

#include "ops/causal_conv1d/arguments.h"
#include "ops/causal_conv1d/cpu_run.h"
#include "torch/register.h"

namespace subquad::cpu {
namespace {

constexpr int64_t kUpdateRows = 16;  // that share the taps of a slice of channels

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
    const int64_t width = p.groups == 1 ? p.inputs : p.head_dim, heads = p.inputs / width;
    const int64_t slices = ceil_div(width, kConvUpdateChannels), rows = ceil_div(p.batch, kUpdateRows);
    const int64_t bytes = p.groups * (p.taps + 1) * std::min(kConvUpdateChannels, width) * kFloatBytes;
    parallel_items_with_scratch(heads * slices * rows, elements < kConvSmall, bytes, [&](int64_t i, void* scratch) {
      const int64_t head = i / slices % heads, b0 = i / slices / heads * kUpdateRows;
      const int64_t c0 = head * width + i % slices * kConvUpdateChannels;
      kernels.update(p, static_cast<float*>(scratch), b0, std::min(p.batch, b0 + kUpdateRows), c0,
                     std::min((head + 1) * width, c0 + kConvUpdateChannels));
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
