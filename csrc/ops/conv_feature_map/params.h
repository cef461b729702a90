// POD arguments of the fused convolution and feature map: those of its two parts.
#pragma once

#include "ops/causal_conv1d/params.h"
#include "ops/feature_map/params.h"

namespace subquad {

/// The convolution has no residual and writes no y; the map has no x and reads the rows that the convolution makes.
struct ConvFeatureMapParams {
  CausalConv1dParams conv;  // channels = map.heads * map.d, head_dim = map.d; grad_y is dy
  FeatureMapParams map;
  float* dy;  // [batch, time, heads, d], the gradient of what the convolution makes; backward only
};

}  // namespace subquad
