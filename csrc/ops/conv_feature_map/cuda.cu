// Binding of conv_feature_map_{fwd,bwd}.
#include "cuda/launch.h"
#include "ops/conv_feature_map/arguments.h"
#include "ops/conv_feature_map/cuda.cuh"
#include "torch/register.h"

namespace subquad::cuda {
namespace {

struct Cuda {
  static void forward(const ConvFeatureMapParams& p, DType dtype, const auto&... tensors) {
    const auto run = [&]<class T>(T, sq::stream_t stream) { conv_feature_map_forward<T>(p, stream); };
    launch(dtype, run, tensors...);
  }
  static void backward(const ConvFeatureMapParams& p, DType dtype, const auto&... tensors) {
    const auto run = [&]<class T>(T, sq::stream_t stream) { conv_feature_map_backward<T>(p, stream); };
    launch(dtype, run, tensors...);
  }
};

}  // namespace

SQ_REGISTER_OPS(m) {
  m.impl("conv_feature_map_fwd", TORCH_BOX(&conv_feature_map_fwd<Cuda>));
  m.impl("conv_feature_map_bwd", TORCH_BOX(&conv_feature_map_bwd<Cuda>));
}

}  // namespace subquad::cuda
