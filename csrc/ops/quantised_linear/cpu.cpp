// subquad::quantised_linear_{fwd,bwd} on CPU tensors: scratch memory and threads.
#include "ops/quantised_linear/cpu.h"

#include "common/integers.h"
#include "cpu/threads.h"
#include "ops/quantised_linear/arguments.h"
#include "torch/register.h"

namespace subquad::cpu {
namespace {

constexpr int64_t kSmallBytes = 1 << 16;  // below this many bytes of weights, waking a thread costs more than it saves

void run(const QuantisedLinearParams& p, DType dtype, const Tensor& x, int64_t width, bool gradient) {
  const QuantisedLinearKernels kernels = SQ_DISPATCH_ISA(quantised_linear_kernels, dtype);
  const bool few = !gradient && p.tokens <= kQuantisedFewTokens, small = p.rows * p.row_bytes() < kSmallBytes;
  const int64_t tokens = round_up(p.tokens, 4);
  const bool four_bits = few && p.format != QuantisedFormat::kInt8;
  const int64_t ld_planes = four_bits ? kernels.planes_floats(p.columns / kQuantisedGroup) : 0;
  const Tensor memory = empty_on(x, {tokens * (width + ld_planes)}, ScalarType::Float);
  float* floats = floats_in(memory);
  const QuantisedLinearScratch scratch{floats, ld_planes > 0 ? floats + tokens * width : nullptr, width, ld_planes};
  parallel_items(tokens, few || small, [&](int64_t token) { kernels.pack(p, scratch, width, token); });
  const auto items = few ? kernels.few_items : gradient ? kernels.gradient_items : kernels.items;
  const auto kernel = few ? kernels.few : gradient ? kernels.gradient : kernels.many;
  parallel_items_with_scratch(items(p), small && few, few ? 64 : kernels.own_bytes,
                              [&](int64_t item, void* own) { kernel(p, scratch, item, own); });
}

struct Cpu {
  static void forward(const QuantisedLinearParams& p, DType dtype, const Tensor& x, const auto&...) {
    if (p.tokens > 0 && p.rows > 0) run(p, dtype, x, p.columns, false);
  }
  static void backward(const QuantisedLinearParams& p, DType dtype, const Tensor& grad, const auto&...) {
    if (p.tokens > 0 && p.columns > 0) run(p, dtype, grad, p.rows, true);
  }
};

}  // namespace

SQ_REGISTER_OPS(m) {
  m.impl("quantised_linear_fwd", TORCH_BOX(&quantised_linear_fwd<Cpu>));
  m.impl("quantised_linear_bwd", TORCH_BOX(&quantised_linear_bwd<Cpu>));
}

}  // namespace subquad::cpu
