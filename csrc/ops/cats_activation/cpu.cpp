// subquad::cats_activation_* and subquad::cats_glu_* on CPU tensors.
#include "ops/cats_activation/cpu.h"

#include <algorithm>

#include "common/integers.h"
#include "cpu/threads.h"
#include "ops/cats_activation/arguments.h"
#include "torch/register.h"

namespace subquad::cpu {
namespace {

constexpr int64_t kRowElements = 1 << 14;  // elements per work item

struct Cpu {
  using Pass = void (*)(const CatsActivationParams&, int64_t, int64_t);

  static void run(const CatsActivationParams& p, Pass pass) {
    if (p.rows == 0 || p.cols == 0) return;
    const int64_t rows = std::max<int64_t>(1, kRowElements / p.cols), items = ceil_div(p.rows, rows);
    parallel_items(items, items == 1, [&](int64_t i) { pass(p, i * rows, std::min(p.rows, (i + 1) * rows)); });
  }
  static void forward(const CatsActivationParams& p, DType z, DType u, const auto&...) {
    run(p, SQ_DISPATCH_ISA(cats_activation_kernels, z, u).forward);
  }
  static void backward(const CatsActivationParams& p, DType z, DType u, const auto&...) {
    run(p, SQ_DISPATCH_ISA(cats_activation_kernels, z, u).backward);
  }
};

}  // namespace

SQ_REGISTER_OPS(m) {
  m.impl("cats_activation_fwd", TORCH_BOX(&cats_activation_fwd<Cpu>));
  m.impl("cats_activation_bwd", TORCH_BOX(&cats_activation_bwd<Cpu>));
  m.impl("cats_glu_fwd", TORCH_BOX(&cats_glu_fwd<Cpu>));
  m.impl("cats_glu_bwd", TORCH_BOX(&cats_glu_bwd<Cpu>));
}

}  // namespace subquad::cpu
