// Binding of span_search_{fwd,bwd}.
#include "cuda/launch.h"
#include "ops/span_search/arguments.h"
#include "ops/span_search/cuda.cuh"
#include "torch/register.h"

namespace subquad::cuda {
namespace {

struct Cuda {
  static void run(const SpanSearchParams& p, DType dtype, const auto&... tensors) {
    const auto pass = [&]<class T>(T, sq::stream_t stream) { span_search<T>(p, stream); };
    launch(dtype, pass, tensors...);
  }
};

}  // namespace

SQ_REGISTER_OPS(m) {
  m.impl("span_search_fwd", TORCH_BOX(&span_search_fwd<Cuda>));
  m.impl("span_search_bwd", TORCH_BOX(&span_search_bwd<Cuda>));
}

}  // namespace subquad::cuda
