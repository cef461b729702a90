// Feature maps of linear attention for one CPU instruction set; the forward tile is in feature_map_rows.h.
#include "ops/feature_map/cpu.h"

#include "ops/feature_map/cpu_rows.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using namespace feature;

int64_t scratch_bytes(const FeatureMapParams& p, bool backward) {
  Arena arena(nullptr);
  Scratch(p, backward, arena);
  return arena.used();
}

/// Rows [begin, begin + n) of one head as floats, padded with zeros to `ldx` columns and to a whole group of rows.
template <class T>
void load_rows(const FeatureMapParams& p, int64_t head, int64_t begin, int64_t n, const Scratch& s) {
  for (int64_t r = 0; r < n; ++r) {
    const int64_t batch = (begin + r) / p.time, t = (begin + r) % p.time;
    load(static_cast<const T*>(p.x) + batch * p.x_batch + t * p.x_time + head * p.x_head, p.d, s.x + r * s.ldx);
    zero_words(s.x + r * s.ldx + p.d, s.ldx - p.d);
  }
  zero_words(s.x + n * s.ldx, (round_up(n, kTileRows) - n) * s.ldx);
}

// ----------------------------------------------------------------------------------------------------------- kernels

template <class T>
void forward(const FeatureMapParams& p, int64_t head, int64_t begin, int64_t end, void* memory) {
  Arena arena(memory);
  const Scratch s(p, false, arena);
  Block weight{};
  if (p.weight != nullptr) weight = load_weight<T>(p, head, s);
  for (int64_t row = begin; row < end; row += kFeatureTile) {
    const int64_t n = end - row < kFeatureTile ? end - row : kFeatureTile;
    load_rows<T>(p, head, row, n, s);
    store_tile<T>(p, s, weight, head, row, n);
  }
}

template <class T>
void backward(const FeatureMapParams& p, int64_t head, int64_t chunk, void* memory) {
  Arena arena(memory);
  const Scratch s(p, true, arena);
  const Block weight = begin_backward<T>(p, head, s);
  const int64_t begin = chunk * p.chunk, end = p.rows - begin < p.chunk ? p.rows : begin + p.chunk;
  for (int64_t row = begin; row < end; row += kFeatureTile) {
    const int64_t n = end - row < kFeatureTile ? end - row : kFeatureTile;
    load_rows<T>(p, head, row, n, s);
    const float* dx = backward_tile<T>(p, s, weight, head, row, n);
    for (int64_t r = 0; r < n; ++r) {
      store(dx + r * s.ldx, p.d, static_cast<T*>(p.dx) + ((row + r) * p.heads + head) * p.d);
    }
  }
  store_partial(p, s, head, chunk);
}

template <class T>
FeatureMapKernels kernels() {
  return {scratch_bytes, forward<T>, backward<T>, reduce<T>};
}

}  // namespace

FeatureMapKernels feature_map_kernels(DType dtype) {
  return by_dtype<BFloat16, Half>(dtype, []<class T>(T) -> FeatureMapKernels { return kernels<T>(); });
}

}  // namespace subquad::cpu::SUBQUAD_ISA
