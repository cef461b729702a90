// Binding of gated_linear_attention_fwd and _step_.
#include "cuda/launch.h"
#include "ops/gated_linear_attention/arguments.h"
#include "ops/gated_linear_attention/cuda.cuh"
#include "torch/register.h"

namespace subquad::cuda {
namespace {

struct Cuda {
  static void forward(const GatedLinearAttentionParams& p, DType dtype, const auto&... tensors) {
    const auto run = [&]<class T>(T, sq::stream_t stream) { gated_linear_attention_forward<T>(p, stream); };
    launch(dtype, run, tensors...);
  }
  static void step(const GlaStepParams& p, DType dtype, const auto&... tensors) {
    const auto run = [&]<class T>(T, sq::stream_t stream) { gated_linear_attention_step<T>(p, stream); };
    launch(dtype, run, tensors...);
  }
};

}  // namespace

SQ_REGISTER_OPS(m) {
  m.impl("gated_linear_attention_fwd", TORCH_BOX(&gated_linear_attention_fwd<Cuda>));
  m.impl("gated_linear_attention_step_", TORCH_BOX(&gated_linear_attention_step_<Cuda>));
}

}  // namespace subquad::cuda
