// Binding of cats_activation_{fwd,bwd} and cats_glu_{fwd,bwd}.
#include "ops/cats_activation/cuda.cuh"

#include <tuple>

#include "cuda/binding.h"

namespace subquad::cuda {
namespace {

CatsActivationParams make_params(const Tensor& z, const Tensor& threshold, int64_t activation, bool inclusive) {
  check_dims(z, "z", 2);
  check_contiguous(z, "z");
  check_same_device(threshold, "threshold", z, "z");
  STD_TORCH_CHECK(activation >= 0 && activation < kActivationCount, "activation: expected a code in [0, ",
                  kActivationCount, "), got ", activation);
  CatsActivationParams p{};
  p.z = z.const_data_ptr();
  p.rows = z.size(0);
  p.cols = z.size(1);
  p.threshold = static_cast<const float*>(threshold.const_data_ptr());
  p.threshold_stride = check_channel_vector(threshold, "threshold", p.cols);
  p.activation = static_cast<Activation>(activation);
  p.inclusive = inclusive;
  return p;
}

const void* elementwise_pointer(const Tensor& t, const char* name, const Tensor& z) {
  check_same_device(t, name, z, "z");
  check_shape(t, name, {z.size(0), z.size(1)});
  check_contiguous(t, name);
  return t.const_data_ptr();
}

void run_activation(CatsActivationPass pass, const CatsActivationParams& p, const Tensor& z, sq::stream_t stream) {
  dispatch_dtype(z, "z", [&](auto element) {
    cats_activation<decltype(element), decltype(element), /*kGated=*/false>(pass, p, stream);
  });
}

// z is in the dtype of u, or float32 beside a lower u.
void run_glu(CatsActivationPass pass, const CatsActivationParams& p, const Tensor& z, const Tensor& u,
             sq::stream_t stream) {
  dispatch_dtype(u, "u", [&](auto element) {
    using U = decltype(element);
    if (z.scalar_type() == ScalarType::Float) {
      cats_activation<float, U, /*kGated=*/true>(pass, p, stream);
    } else {
      check_same_dtype(z, "z, unless float32", u, "u");
      cats_activation<U, U, /*kGated=*/true>(pass, p, stream);
    }
  });
}

Tensor cats_activation_fwd(const Tensor& z, const Tensor& threshold, int64_t activation, bool inclusive) {
  CatsActivationParams p = make_params(z, threshold, activation, inclusive);
  const Tensor a = empty_contiguous_like(z);
  const LaunchScope scope(z, threshold, a);
  p.out = a.mutable_data_ptr();
  run_activation(CatsActivationPass::kForward, p, z, scope.stream());
  return a;
}

Tensor cats_activation_bwd(const Tensor& grad_a, const Tensor& z, const Tensor& threshold, int64_t activation,
                           bool inclusive, bool straight_through) {
  CatsActivationParams p = make_params(z, threshold, activation, inclusive);
  p.straight_through = straight_through;
  p.grad = elementwise_pointer(grad_a, "grad_a", z);
  check_same_dtype(grad_a, "grad_a", z, "z");
  const Tensor dz = empty_contiguous_like(z);
  const LaunchScope scope(z, grad_a, threshold, dz);
  p.dz = dz.mutable_data_ptr();
  run_activation(CatsActivationPass::kBackward, p, z, scope.stream());
  return dz;
}

Tensor cats_glu_fwd(const Tensor& z, const Tensor& u, const Tensor& threshold, int64_t activation, bool inclusive) {
  CatsActivationParams p = make_params(z, threshold, activation, inclusive);
  p.u = elementwise_pointer(u, "u", z);
  const Tensor h = empty_contiguous_like(u);
  const LaunchScope scope(z, u, threshold, h);
  p.out = h.mutable_data_ptr();
  run_glu(CatsActivationPass::kForward, p, z, u, scope.stream());
  return h;
}

std::tuple<Tensor, Tensor> cats_glu_bwd(const Tensor& grad_h, const Tensor& z, const Tensor& u, const Tensor& threshold,
                                        int64_t activation, bool inclusive, bool straight_through) {
  CatsActivationParams p = make_params(z, threshold, activation, inclusive);
  p.straight_through = straight_through;
  p.u = elementwise_pointer(u, "u", z);
  p.grad = elementwise_pointer(grad_h, "grad_h", z);
  check_same_dtype(grad_h, "grad_h", u, "u");
  const Tensor dz = empty_contiguous_like(z);
  const Tensor du = empty_contiguous_like(u);
  const LaunchScope scope(z, u, grad_h, threshold, dz, du);
  p.dz = dz.mutable_data_ptr();
  p.du = du.mutable_data_ptr();
  run_glu(CatsActivationPass::kBackward, p, z, u, scope.stream());
  return {dz, du};
}

}  // namespace
}  // namespace subquad::cuda

SQ_REGISTER_OPS(m) {
  m.impl("cats_activation_fwd", TORCH_BOX(&subquad::cuda::cats_activation_fwd));
  m.impl("cats_activation_bwd", TORCH_BOX(&subquad::cuda::cats_activation_bwd));
  m.impl("cats_glu_fwd", TORCH_BOX(&subquad::cuda::cats_glu_fwd));
  m.impl("cats_glu_bwd", TORCH_BOX(&subquad::cuda::cats_glu_bwd));
}
