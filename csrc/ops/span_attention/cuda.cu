// Binding of span_attention_fwd.
#include "cuda/launch.h"
#include "ops/span_attention/arguments.h"
#include "ops/span_attention/cuda.cuh"
#include "torch/register.h"

namespace subquad::cuda {
namespace {

struct Cuda {
  static void forward(const SpanAttentionParams& p, DType dtype, const Tensor& q, const auto&... tensors) {
    const Tensor scratch = empty_on(q, {span_scratch_floats(p)}, ScalarType::Float);
    const auto run = [&]<class T>(T, sq::stream_t stream) { span_attention_forward<T>(p, floats_in(scratch), stream); };
    launch(dtype, run, q, tensors..., scratch);
  }
};

}  // namespace

SQ_REGISTER_OPS(m) { m.impl("span_attention_fwd", TORCH_BOX(&span_attention_fwd<Cuda>)); }

}  // namespace subquad::cuda
