// Binding of causal_conv1d_{fwd,bwd} and causal_conv1d_update_.
#include "cuda/launch.h"
#include "ops/causal_conv1d/arguments.h"
#include "ops/causal_conv1d/cuda.cuh"
#include "torch/register.h"

namespace subquad::cuda {
namespace {

struct Cuda {
  static void forward(const CausalConv1dParams& p, DType dtype, const auto&... tensors) {
    const auto run = [&]<class T>(T, sq::stream_t stream) { causal_conv1d_forward<T>(p, stream); };
    launch(dtype, run, tensors...);
  }
  static void backward(const CausalConv1dParams& p, DType dtype, const auto&... tensors) {
    const auto run = [&]<class T>(T, sq::stream_t stream) { causal_conv1d_backward<T, T>(p, stream); };
    launch(dtype, run, tensors...);
  }
  static void update(const CausalConv1dUpdateParams& p, DType dtype, const auto&... tensors) {
    const auto run = [&]<class T>(T, sq::stream_t stream) { causal_conv1d_step<T>(p, stream); };
    launch(dtype, run, tensors...);
  }
};

}  // namespace

SQ_REGISTER_OPS(m) {
  m.impl("causal_conv1d_fwd", TORCH_BOX(&causal_conv1d_fwd<Cuda>));
  m.impl("causal_conv1d_bwd", TORCH_BOX(&causal_conv1d_bwd<Cuda>));
  m.impl("causal_conv1d_update_", TORCH_BOX(&causal_conv1d_update_<Cuda>));
}

}  // namespace subquad::cuda
