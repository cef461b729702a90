// Causal convolution and feature map for one CPU instruction set: the convolution writes a tile of rows of one head to
// L1, where the map finds it.
#include "cpu/conv_feature_map.h"

#include "cpu/causal_conv1d_rows.h"
#include "cpu/feature_map_rows.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

int64_t scratch_bytes(const ConvFeatureMapParams& p) {
  const int64_t history = p.conv.state == nullptr ? 0 : kConvMaxTaps * p.map.d;
  return (feature::Scratch(p.map, false, nullptr).floats + history) * static_cast<int64_t>(sizeof(float));
}

template <class T>
void forward(const ConvFeatureMapParams& p, const float* packed, int64_t b, int64_t t0, int64_t t1, int64_t head,
             void* memory) {
  const feature::Scratch s(p.map, false, memory);
  float* history = static_cast<float*>(memory) + s.floats;
  const Block weight = feature::load_weight<T>(p.map, head / p.sharing, s);
  for (int64_t t = t0; t < t1; t += kFeatureTile) {
    const int64_t n = t1 - t < kFeatureTile ? t1 - t : kFeatureTile;
    conv::forward_head<T>(p.conv, packed, history, b, t, t + n, head * p.map.d, p.map.d, s.x, s.ldx);
    zero_words(s.x + n * s.ldx, (round_up(n, kTileRows) - n) * s.ldx);
    feature::store_tile<T>(p.map, s, weight, head, b * p.conv.time + t, n);
  }
}

template <class T>
ConvFeatureMapKernels kernels() {
  return {scratch_bytes, forward<T>};
}

}  // namespace

ConvFeatureMapKernels conv_feature_map_kernels(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return kernels<BFloat16>();
    case DType::kHalf:
      return kernels<Half>();
    default:
      return kernels<float>();
  }
}

}  // namespace subquad::cpu::SUBQUAD_ISA
