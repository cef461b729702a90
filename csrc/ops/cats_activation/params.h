// POD arguments of the thresholded activation and the gated unit: what a binding fills in and a torch-free kernel
// reads. All strides are in elements.
#pragma once

#include <cstdint>

#include "common/activations.h"

namespace subquad {

/// One elementwise call over [rows, cols] contiguous tensors; fields an op does not use are null.
/// `z` and `dz` share one element type, `u`, `grad`, `out` and `du` another (equal for cats_activation_*).
struct CatsActivationParams {
  const void* z;
  const void* u;           // cats_glu_* only
  const void* grad;        // gradient of a or h, backward only
  const float* threshold;  // threshold of column i at i * threshold_stride
  void* out;               // a or h, forward only
  void* dz;                // backward only
  void* du;                // cats_glu_bwd only
  int64_t rows;
  int64_t cols;
  int64_t threshold_stride;
  Activation activation;
  bool inclusive;
  bool straight_through;
};

}  // namespace subquad
