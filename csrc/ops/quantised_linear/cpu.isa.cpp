// The product with quantised weights for one CPU instruction set. See cpu.h for the plan.
#include "ops/quantised_linear/cpu.h"
#include "common/integers.h"
#include "cpu/simd/arena.h"
#include "cpu/simd/quantised_rows.h"
#include "cpu/simd/tile.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using namespace quantised;

// ------------------------------------------------------------------------------------------------------- a few tokens

constexpr int64_t kItemRows = 16;  // an item is a multiple of it
constexpr int64_t kFewItems = 64;

static_assert(kMaxTokens == kQuantisedFewTokens);

int64_t few_rows(const QuantisedLinearParams& p) { return round_up(ceil_div(p.rows, kFewItems), kItemRows); }

int64_t few_items(const QuantisedLinearParams& p) { return ceil_div(p.rows, few_rows(p)); }

template <class T>
void few(const QuantisedLinearParams& p, const QuantisedLinearScratch& s, int64_t item, void*) {
  constexpr int64_t kRound = 256;
  const int64_t begin = item * few_rows(p), end = smaller(p.rows, begin + few_rows(p)), bytes = p.row_bytes();
  const T* bias = static_cast<const T*>(p.bias);
  const Tokens x{s.x, s.ld_x, s.planes, s.ld_planes, p.columns / kGroup, static_cast<int>(p.tokens)};
  float out[kMaxTokens * kRound];
  const auto rows = [&](int64_t first) {
    const int64_t count = clamp(end - first, 0, kRound);
    return RowList{p.weight + first * bytes, nullptr, count, p.columns / kGroup, bytes, code_bytes(p.format)};
  };
  for (int64_t first = begin; first < end; first += kRound) {
    RowList list = rows(first);
    const RowList then = rows(first + list.count);
    list.then = &then;
    if (first == begin) list.fetch_first();
    products(p.format, list, x, nullptr, out, kRound);
    for (int64_t t = 0; t < p.tokens; ++t)
      for (int64_t j = 0; j < list.count; ++j) {
        const float by = bias == nullptr ? 0.0f : to_float(bias[first + j]);
        static_cast<T*>(p.y)[t * p.rows + first + j] = from_float<T>(out[t * kRound + j] + by);
      }
  }
}

// ------------------------------------------------------------------------------------------------------- many tokens

constexpr int64_t kRows = 64;    // of the weight, that a panel of tokens meets
constexpr int64_t kDepth = 128;  // elements of the summed dimension at a time: the block stays in the first cache
constexpr int64_t kColumns = 128;

int64_t panels(const QuantisedLinearParams& p) { return ceil_div(p.tokens, kPanelTokens); }
int64_t items(const QuantisedLinearParams& p) { return panels(p) * ceil_div(p.rows, kRows); }
int64_t gradient_items(const QuantisedLinearParams& p) { return panels(p) * ceil_div(p.columns, kColumns); }

/// What a thread works in.
struct Panel {
  float *weights, *transposed, *sums;
  int64_t bytes;

  explicit Panel(void* memory) {
    Arena arena(memory);
    weights = arena.take<float>(kDepth * kColumns);
    transposed = arena.take<float>(kDepth * kRows);
    sums = arena.take<float>(kPanelTokens * kColumns);
    bytes = arena.used();
  }
};

/// y[first .. last)[column .. column + width) = the sums of a panel, rounded once.
template <class T>
void store_panel(const QuantisedLinearParams& p, const float* sums, int64_t lds, int64_t first, int64_t last,
                 int64_t column, int64_t width, int64_t ldy, const T* bias) {
  for (int64_t t = first; t < last; ++t)
    for (int64_t i = 0; i < width; ++i) {
      const float by = bias == nullptr ? 0.0f : to_float(bias[column + i]);
      static_cast<T*>(p.y)[t * ldy + column + i] = from_float<T>(sums[(t - first) * lds + i] + by);
    }
}

template <class T>
void many(const QuantisedLinearParams& p, const QuantisedLinearScratch& s, int64_t item, void* own) {
  const Panel panel(own);
  const int64_t first = item % panels(p) * kPanelTokens, last = smaller(p.tokens, first + kPanelTokens);
  const int64_t row = item / panels(p) * kRows, live = smaller(kRows, p.rows - row), tokens = round_up(last - first, 4);
  zero_words(panel.sums, tokens * kRows);
  by_format(p.format, [&]<QuantisedFormat kFormat>() {
    for (int64_t k = 0; k < p.columns; k += kDepth) {
      const int64_t depth = smaller(kDepth, p.columns - k);
      for (int64_t r = 0; r < kRows; ++r) {
        float* out = panel.weights + r * depth;
        if (r >= live) {
          zero_words(out, depth);
        } else {
          const Row from = row_of<kFormat>(p.weight, row + r, p.columns / kGroup);
          dequantise<kFormat>(from, from, k / kGroup, depth / kGroup, out);
        }
      }
      transpose_words(panel.weights, kRows, depth, panel.transposed, kRows);
      product<Floats>(tokens, kRows, depth, {s.x + first * s.ld_x + k, s.ld_x, 1}, {panel.transposed, kRows},
                      {panel.sums, kRows}, true);
    }
  });
  store_panel<T>(p, panel.sums, kRows, first, last, row, live, p.rows, static_cast<const T*>(p.bias));
}

template <class T>
void gradient(const QuantisedLinearParams& p, const QuantisedLinearScratch& s, int64_t item, void* own) {
  const Panel panel(own);
  const int64_t first = item % panels(p) * kPanelTokens, last = smaller(p.tokens, first + kPanelTokens);
  const int64_t column = item / panels(p) * kColumns, width = smaller(kColumns, p.columns - column);
  const int64_t tokens = round_up(last - first, 4);
  zero_words(panel.sums, tokens * width);
  by_format(p.format, [&]<QuantisedFormat kFormat>() {
    for (int64_t row = 0; row < p.rows; row += kDepth) {
      const int64_t depth = smaller(kDepth, p.rows - row);
      for (int64_t r = 0; r < depth; ++r) {
        const Row from = row_of<kFormat>(p.weight, row + r, p.columns / kGroup);
        dequantise<kFormat>(from, from, column / kGroup, width / kGroup, panel.weights + r * width);
      }
      product<Floats>(tokens, width, depth, {s.x + first * s.ld_x + row, s.ld_x, 1}, {panel.weights, width},
                      {panel.sums, width}, true);
    }
  });
  store_panel<T>(p, panel.sums, width, first, last, column, width, p.columns, nullptr);
}

// ------------------------------------------------------------------------------------------------------- both

template <class T>
void pack(const QuantisedLinearParams& p, const QuantisedLinearScratch& s, int64_t width, int64_t token) {
  float* x = s.x + token * s.ld_x;
  if (token >= p.tokens) return zero_words(x, width);
  const T* from = static_cast<const T*>(p.x) + token * width;
  for (int64_t i = 0; i < width; ++i) x[i] = to_float(from[i]);
  if (s.planes != nullptr) pack_planes(x, width / kGroup, s.planes + token * s.ld_planes);
}

template <class T>
QuantisedLinearKernels kernels() {
  return {pack<T>, few_items, items, gradient_items, few<T>, many<T>, gradient<T>, planes_floats, Panel(nullptr).bytes};
}

}  // namespace

QuantisedLinearKernels quantised_linear_kernels(DType dtype) {
  return by_dtype<BFloat16, Half>(dtype, []<class T>(T) -> QuantisedLinearKernels { return kernels<T>(); });
}

}  // namespace subquad::cpu::SUBQUAD_ISA
