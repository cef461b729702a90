// Binding of lawcat_decode_step_.
#include "cuda/launch.h"
#include "ops/lawcat_decode_step/arguments.h"
#include "ops/lawcat_decode_step/cuda.cuh"
#include "torch/register.h"

namespace subquad::cuda {
namespace {

struct Cuda {
  static void run(const LawcatDecodeStepParams& p, DType dtype, const auto&... tensors) {
    const auto step = [&]<class T>(T, sq::stream_t stream) { lawcat_decode_step<T>(p, stream); };
    launch(dtype, step, tensors...);
  }
};

}  // namespace

SQ_REGISTER_OPS(m) { m.impl("lawcat_decode_step_", TORCH_BOX(&lawcat_decode_step_<Cuda>)); }

}  // namespace subquad::cuda
