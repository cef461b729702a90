// Binding of causal_conv1d_{fwd,bwd}.
#include "causal_conv1d.cuh"

#include "binding.h"

namespace subquad::cuda {
namespace {

Tensor run(const Tensor& x, const void* grad) {
  check_dims(x, "x", 2);
  check_contiguous(x, "x");
  const LaunchScope scope(x);
  const Tensor out = empty_contiguous_like(x);
  dispatch_dtype(x, "x", [&](auto element) {
    causal_conv1d<decltype(element)>(x.const_data_ptr(), grad, out.mutable_data_ptr(), x.numel(), scope.stream());
  });
  return out;
}

Tensor causal_conv1d_fwd(const Tensor& x) { return run(x, nullptr); }

Tensor causal_conv1d_bwd(const Tensor& grad_y, const Tensor& x) {
  check_same_device(grad_y, "grad_y", x, "x");
  check_dims(x, "x", 2);
  check_shape(grad_y, "grad_y", {x.size(0), x.size(1)});
  check_contiguous(grad_y, "grad_y");
  check_same_dtype(grad_y, "grad_y", x, "x");
  return run(x, grad_y.const_data_ptr());
}

}  // namespace
}  // namespace subquad::cuda

SQ_REGISTER_OPS(m) {
  m.impl("causal_conv1d_fwd", TORCH_BOX(&subquad::cuda::causal_conv1d_fwd));
  m.impl("causal_conv1d_bwd", TORCH_BOX(&subquad::cuda::causal_conv1d_bwd));
}
