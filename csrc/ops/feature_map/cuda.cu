// Binding of feature_map_{fwd,bwd}.
#include "cuda/launch.h"
#include "ops/feature_map/arguments.h"
#include "ops/feature_map/cuda.cuh"
#include "torch/register.h"

namespace subquad::cuda {
namespace {

struct Cuda {
  static void forward(const FeatureMapParams& p, DType dtype, const auto&... tensors) {
    const auto run = [&]<class T>(T, sq::stream_t stream) { feature_map_forward<T>(p, stream); };
    launch(dtype, run, tensors...);
  }
  static void backward(const FeatureMapParams& p, DType dtype, const auto&... tensors) {
    const auto run = [&]<class T>(T, sq::stream_t stream) { feature_map_backward<T>(p, stream); };
    launch(dtype, run, tensors...);
  }
};

}  // namespace

SQ_REGISTER_OPS(m) {
  m.impl("feature_map_fwd", TORCH_BOX(&feature_map_fwd<Cuda>));
  m.impl("feature_map_bwd", TORCH_BOX(&feature_map_bwd<Cuda>));
}

}  // namespace subquad::cuda
