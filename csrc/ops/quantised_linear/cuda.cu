// Binding of quantised_linear_{fwd,bwd}.
#include "cuda/launch.h"
#include "ops/quantised_linear/arguments.h"
#include "ops/quantised_linear/cuda.cuh"
#include "torch/register.h"

namespace subquad::cuda {
namespace {

struct Cuda {
  static void forward(const QuantisedLinearParams& p, DType dtype, const auto&... tensors) {
    const auto pass = [&]<class T>(T, sq::stream_t stream) { quantised_forward<T>(p, stream); };
    launch(dtype, pass, tensors...);
  }
  static void backward(const QuantisedLinearParams& p, DType dtype, const auto&... tensors) {
    const auto pass = [&]<class T>(T, sq::stream_t stream) { quantised_backward<T>(p, stream); };
    launch(dtype, pass, tensors...);
  }
};

}  // namespace

SQ_REGISTER_OPS(m) {
  m.impl("quantised_linear_fwd", TORCH_BOX(&quantised_linear_fwd<Cuda>));
  m.impl("quantised_linear_bwd", TORCH_BOX(&quantised_linear_bwd<Cuda>));
}

}  // namespace subquad::cuda
