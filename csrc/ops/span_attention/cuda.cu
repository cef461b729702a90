// Binding of span_attention_{fwd,bwd}.
#include "cuda/launch.h"
#include "ops/span_attention/arguments.h"
#include "ops/span_attention/cuda.cuh"
#include "torch/register.h"

namespace subquad::cuda {
namespace {

struct Cuda {
  static void run(const SpanAttentionParams& p, DType dtype, const auto&... tensors) {
    const auto pass = [&]<class T>(T, sq::stream_t stream) { span_attention<T>(p, stream); };
    launch(dtype, pass, tensors...);
  }
};

}  // namespace

SQ_REGISTER_OPS(m) {
  m.impl("span_attention_fwd", TORCH_BOX(&span_attention_fwd<Cuda>));
  m.impl("span_attention_bwd", TORCH_BOX(&span_attention_bwd<Cuda>));
}

}  // namespace subquad::cuda
