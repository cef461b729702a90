// Causal convolution and feature map for one CPU instruction set: the convolution writes a tile of rows of one head to
// L1, where the map finds it.
#include "ops/conv_feature_map/cpu.h"

#include "ops/causal_conv1d/cpu_rows.h"
#include "ops/feature_map/cpu_rows.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

/// What a thread works in: that of the map, and rows before a sequence.
struct Scratch {
  Arena arena;
  feature::Scratch map;
  float* history;

  Scratch(const ConvFeatureMapParams& p, bool backward, void* memory)
      : arena(memory),
        map(p.map, backward, arena),
        history(arena.take<float>(p.conv.state == nullptr ? 0 : kConvMaxTaps * p.map.d)) {}
};

int64_t scratch_bytes(const ConvFeatureMapParams& p, bool backward) {
  return Scratch(p, backward, nullptr).arena.used();
}

/// Rows [t, t + n) of the convolution of one head, padded with zeros to a whole group of rows.
template <class T>
void convolve_tile(const ConvFeatureMapParams& p, const float* packed, const feature::Scratch& s, float* history,
                   int64_t b, int64_t t, int64_t n, int64_t head) {
  conv::forward_head<T>(p.conv, packed, history, b, t, t + n, head * p.map.d, p.map.d, s.x, s.ldx, kConvTile);
  zero_words(s.x + n * s.ldx, (round_up(n, kTileRows) - n) * s.ldx);
}

template <class T>
void forward(const ConvFeatureMapParams& p, const float* packed, int64_t b, int64_t t0, int64_t t1, int64_t head,
             void* memory) {
  const Scratch scratch(p, false, memory);
  const feature::Scratch& s = scratch.map;
  const Block weight = feature::load_weight<T>(p.map, head / p.map.sharing, s);
  for (int64_t t = t0; t < t1; t += kFeatureTile) {
    const int64_t n = t1 - t < kFeatureTile ? t1 - t : kFeatureTile;
    convolve_tile<T>(p, packed, s, scratch.history, b, t, n, head);
    feature::store_tile<T>(p.map, s, weight, head, b * p.conv.time + t, n);
  }
}

template <class T>
void backward(const ConvFeatureMapParams& p, const float* packed, int64_t chunk, int64_t head, void* memory) {
  const Scratch scratch(p, true, memory);
  const feature::Scratch& s = scratch.map;
  const Block weight = feature::begin_backward<T>(p.map, head, s);
  zero_words(s.x, kFeatureTile * s.ldx);  // for its columns from d on
  const int64_t begin = chunk * p.map.chunk, last = begin + p.map.chunk, end = last < p.map.rows ? last : p.map.rows;
  for (int64_t row = begin, n; row < end; row += n) {
    const int64_t b = row / p.map.time, t = row % p.map.time;
    n = end - row < kFeatureTile ? end - row : kFeatureTile;
    if (p.map.time - t < n) n = p.map.time - t;
    convolve_tile<T>(p, packed, s, scratch.history, b, t, n, head);
    const float* dy = feature::backward_tile<T>(p.map, s, weight, head, row, n);
    for (int64_t r = 0; r < n; ++r) {
      feature::store(dy + r * s.ldx, p.map.d, p.dy + ((row + r) * p.map.heads + head) * p.map.d);
    }
  }
  feature::store_partial(p.map, s, head, chunk);
}

template <class T>
void reduce(const ConvFeatureMapParams& p, int64_t index) {
  feature::reduce<T>(p.map, index);
}

template <class T>
ConvFeatureMapKernels kernels() {
  return {scratch_bytes, forward<T>, backward<T>, reduce<T>};
}

}  // namespace

ConvFeatureMapKernels conv_feature_map_kernels(DType dtype) {
  return by_dtype<BFloat16, Half>(dtype, []<class T>(T) -> ConvFeatureMapKernels { return kernels<T>(); });
}

}  // namespace subquad::cpu::SUBQUAD_ISA
