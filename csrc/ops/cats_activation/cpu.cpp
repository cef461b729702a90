// subquad::cats_activation_* and subquad::cats_glu_* on CPU tensors.
#include "ops/cats_activation/cpu.h"

#include <algorithm>
#include <tuple>

#include "cpu/binding.h"
#include "cpu/isa.h"

namespace subquad::cpu {
namespace {

constexpr int64_t kRowElements = 1 << 14;  // elements per work item

void check_same(const Tensor& tensor, const char* name, const Tensor& z) {
  check_contiguous(tensor, name);
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == z.size(0) && tensor.size(1) == z.size(1), name,
                  ": expected the shape of z");
}

CatsActivationParams make_params(const Tensor& z, const Tensor& threshold, int64_t activation, bool inclusive) {
  STD_TORCH_CHECK(z.dim() == 2, "z: expected shape [N, I]");
  check_contiguous(z, "z");
  STD_TORCH_CHECK(activation >= 0 && activation < kActivationCount, "activation: unknown code ", activation);
  CatsActivationParams p{};
  p.z = z.const_data_ptr();
  p.threshold = static_cast<const float*>(threshold.const_data_ptr());
  p.rows = z.size(0);
  p.cols = z.size(1);
  p.threshold_stride = threshold_stride(threshold, p.cols);
  p.activation = static_cast<Activation>(activation);
  p.inclusive = inclusive;
  return p;
}

void run(const CatsActivationParams& p, void (*pass)(const CatsActivationParams&, int64_t, int64_t)) {
  if (p.rows == 0 || p.cols == 0) return;
  const int64_t rows = std::max<int64_t>(1, kRowElements / p.cols), items = (p.rows + rows - 1) / rows;
  parallel_items(items, items == 1, [&](int64_t i) { pass(p, i * rows, std::min(p.rows, (i + 1) * rows)); });
}

CatsActivationKernels kernels_for(const Tensor& z, const Tensor& u) {
  return SQ_DISPATCH_ISA(cats_activation_kernels, dtype_of(z, "z"), dtype_of(u, "u"));
}

Tensor cats_activation_fwd(const Tensor& z, const Tensor& threshold, int64_t activation, bool inclusive) {
  CatsActivationParams p = make_params(z, threshold, activation, inclusive);
  Tensor a = empty({p.rows, p.cols}, z.scalar_type());
  p.out = a.mutable_data_ptr();
  run(p, kernels_for(z, z).forward);
  return a;
}

Tensor cats_activation_bwd(const Tensor& grad_a, const Tensor& z, const Tensor& threshold, int64_t activation,
                           bool inclusive, bool straight_through) {
  CatsActivationParams p = make_params(z, threshold, activation, inclusive);
  check_same(grad_a, "grad_a", z);
  STD_TORCH_CHECK(grad_a.scalar_type() == z.scalar_type(), "grad_a: expected the dtype of z");
  Tensor dz = empty({p.rows, p.cols}, z.scalar_type());
  p.grad = grad_a.const_data_ptr();
  p.dz = dz.mutable_data_ptr();
  p.straight_through = straight_through;
  run(p, kernels_for(z, z).backward);
  return dz;
}

Tensor cats_glu_fwd(const Tensor& z, const Tensor& u, const Tensor& threshold, int64_t activation, bool inclusive) {
  CatsActivationParams p = make_params(z, threshold, activation, inclusive);
  check_same(u, "u", z);
  Tensor h = empty({p.rows, p.cols}, u.scalar_type());
  p.u = u.const_data_ptr();
  p.out = h.mutable_data_ptr();
  run(p, kernels_for(z, u).forward);
  return h;
}

std::tuple<Tensor, Tensor> cats_glu_bwd(const Tensor& grad_h, const Tensor& z, const Tensor& u, const Tensor& threshold,
                                        int64_t activation, bool inclusive, bool straight_through) {
  CatsActivationParams p = make_params(z, threshold, activation, inclusive);
  check_same(u, "u", z);
  check_same(grad_h, "grad_h", z);
  STD_TORCH_CHECK(grad_h.scalar_type() == u.scalar_type(), "grad_h: expected the dtype of u");
  Tensor dz = empty({p.rows, p.cols}, z.scalar_type()), du = empty({p.rows, p.cols}, u.scalar_type());
  p.u = u.const_data_ptr();
  p.grad = grad_h.const_data_ptr();
  p.dz = dz.mutable_data_ptr();
  p.du = du.mutable_data_ptr();
  p.straight_through = straight_through;
  run(p, kernels_for(z, u).backward);
  return {dz, du};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(subquad, CPU, m) {
  m.impl("cats_activation_fwd", TORCH_BOX(&cats_activation_fwd));
  m.impl("cats_activation_bwd", TORCH_BOX(&cats_activation_bwd));
  m.impl("cats_glu_fwd", TORCH_BOX(&cats_glu_fwd));
  m.impl("cats_glu_bwd", TORCH_BOX(&cats_glu_bwd));
}

}  // namespace subquad::cpu
