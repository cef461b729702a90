// Binding of span_search_fwd.
#include "cuda/launch.h"
#include "ops/span_search/arguments.h"
#include "ops/span_search/cuda.cuh"
#include "torch/register.h"

namespace subquad::cuda {
namespace {

struct Cuda {
  static void forward(const SpanSearchParams& p, DType dtype, const Tensor& q, const auto&... tensors) {
    const Tensor scratch = empty_on(q, {search_scratch_floats(p)}, ScalarType::Float);
    const auto run = [&]<class T>(T, sq::stream_t stream) { span_search_forward<T>(p, floats_in(scratch), stream); };
    launch(dtype, run, q, tensors..., scratch);
  }
};

}  // namespace

SQ_REGISTER_OPS(m) { m.impl("span_search_fwd", TORCH_BOX(&span_search_fwd<Cuda>)); }

}  // namespace subquad::cuda
