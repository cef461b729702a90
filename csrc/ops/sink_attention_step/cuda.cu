// Binding of sink_attention_step_.
#include "cuda/launch.h"
#include "ops/sink_attention_step/arguments.h"
#include "ops/sink_attention_step/cuda.cuh"
#include "torch/register.h"

namespace subquad::cuda {
namespace {

struct Cuda {
  static int64_t scratch(const SinkAttentionStepParams& p, DType) { return sink_scratch_floats(p); }
  static void run(const SinkAttentionStepParams& p, DType dtype, float* scratch, const auto&... tensors) {
    const auto step = [&]<class T>(T, sq::stream_t stream) { sink_attention_step<T>(p, scratch, stream); };
    launch(dtype, step, tensors...);
  }
};

}  // namespace

SQ_REGISTER_OPS(m) { m.impl("sink_attention_step_", TORCH_BOX(&sink_attention_step_<Cuda>)); }

}  // namespace subquad::cuda
