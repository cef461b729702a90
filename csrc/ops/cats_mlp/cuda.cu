// Binding of cats_mlp_fwd.
#include "cuda/launch.h"
#include "ops/cats_mlp/arguments.h"
#include "ops/cats_mlp/cuda.cuh"
#include "torch/register.h"

namespace subquad::cuda {
namespace {

struct Cuda {
  static void run(const CatsMlpParams& p, DType dtype, const Tensor& x, const auto&... tensors) {
    STD_TORCH_CHECK(p.tokens <= kCatsMaxTokens, "x: expected at most ", kCatsMaxTokens, " rows, got ", p.tokens);
    const Tensor scratch = empty_on(x, {cats_mlp_workspace_words(p)}, ScalarType::Float);
    const auto forward = [&]<class T>(T, sq::stream_t stream) { cats_mlp_forward<T>(p, floats_in(scratch), stream); };
    launch(dtype, forward, x, tensors..., scratch);
  }
};

}  // namespace

SQ_REGISTER_OPS(m) { m.impl("cats_mlp_fwd", TORCH_BOX(&cats_mlp_fwd<Cuda>)); }

}  // namespace subquad::cuda
