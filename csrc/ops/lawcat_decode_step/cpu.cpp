// subquad::lawcat_decode_step_ on CPU tensors.
#include "ops/lawcat_decode_step/cpu.h"

#include "cpu/threads.h"
#include "ops/lawcat_decode_step/arguments.h"
#include "torch/register.h"

namespace subquad::cpu {
namespace {

struct Cpu {
  static void run(const LawcatDecodeStepParams& p, DType dtype, const auto&...) {
    constexpr int64_t kSmallState = 1 << 16;
    const LawcatDecodeStepKernel kernel = SQ_DISPATCH_ISA(lawcat_decode_step_kernel, dtype);
    const int64_t elements = p.batch * p.states * 2 * p.f * p.dv;
    parallel_items(p.batch * p.k_heads, elements < kSmallState, [&](int64_t item) { kernel(p, item); });
  }
};

}  // namespace

SQ_REGISTER_OPS(m) { m.impl("lawcat_decode_step_", TORCH_BOX(&lawcat_decode_step_<Cpu>)); }

}  // namespace subquad::cpu
