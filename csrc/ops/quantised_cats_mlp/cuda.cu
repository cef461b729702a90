// Binding of quantised_cats_mlp_fwd.
#include "cuda/launch.h"
#include "ops/quantised_cats_mlp/arguments.h"
#include "ops/quantised_cats_mlp/cuda.cuh"
#include "torch/register.h"

namespace subquad::cuda {
namespace {

struct Cuda {
  static void run(const QuantisedCatsMlpParams& p, DType dtype, const Tensor& x, const auto&... tensors) {
    const Tensor scratch = empty_on(x, {quantised_cats_words(p)}, ScalarType::Float);
    const auto forward = [&]<class T>(T, sq::stream_t stream) {
      quantised_cats_forward<T>(p, floats_in(scratch), stream);
    };
    launch(dtype, forward, x, tensors..., scratch);
  }
};

}  // namespace

SQ_REGISTER_OPS(m) { m.impl("quantised_cats_mlp_fwd", TORCH_BOX(&quantised_cats_mlp_fwd<Cuda>)); }

}  // namespace subquad::cuda
