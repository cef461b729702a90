// Binding of cats_activation_* and cats_glu_*.
#include "cuda/launch.h"
#include "ops/cats_activation/arguments.h"
#include "ops/cats_activation/cuda.cuh"
#include "torch/register.h"

namespace subquad::cuda {
namespace {

template <CatsActivationPass kPass>
void run(const CatsActivationParams& p, DType z, DType u, const auto&... tensors) {
  const auto pass = [&](auto element, sq::stream_t stream) {
    using U = decltype(element);
    if (p.u == nullptr) {
      cats_activation<U, U, /*kGated=*/false>(kPass, p, stream);
    } else if (z == DType::kFloat) {
      cats_activation<float, U, /*kGated=*/true>(kPass, p, stream);
    } else {
      cats_activation<U, U, /*kGated=*/true>(kPass, p, stream);
    }
  };
  launch(u, pass, tensors...);
}

struct Cuda {
  static void forward(const auto&... arguments) { run<CatsActivationPass::kForward>(arguments...); }
  static void backward(const auto&... arguments) { run<CatsActivationPass::kBackward>(arguments...); }
};

}  // namespace

SQ_REGISTER_OPS(m) {
  m.impl("cats_activation_fwd", TORCH_BOX(&cats_activation_fwd<Cuda>));
  m.impl("cats_activation_bwd", TORCH_BOX(&cats_activation_bwd<Cuda>));
  m.impl("cats_glu_fwd", TORCH_BOX(&cats_glu_fwd<Cuda>));
  m.impl("cats_glu_bwd", TORCH_BOX(&cats_glu_bwd<Cuda>));
}

}  // namespace subquad::cuda
