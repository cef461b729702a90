// Binding of interval_attention_fwd.
#include "cuda/launch.h"
#include "ops/interval_attention/arguments.h"
#include "ops/interval_attention/cuda.cuh"
#include "torch/register.h"

namespace subquad::cuda {
namespace {

struct Cuda {
  static void forward(const IntervalAttentionParams& p, DType dtype, const Tensor& q, const auto&... tensors) {
    const Tensor scratch = empty_on(q, {attention_scratch_floats(p)}, ScalarType::Float);
    const auto run = [&]<class T>(T, sq::stream_t stream) {
      interval_attention_forward<T>(p, floats_in(scratch), stream);
    };
    launch(dtype, run, q, tensors..., scratch);
  }
};

}  // namespace

SQ_REGISTER_OPS(m) { m.impl("interval_attention_fwd", TORCH_BOX(&interval_attention_fwd<Cuda>)); }

}  // namespace subquad::cuda
