// Compiled once per instruction set.
#include "ops/interval_attention/cpu.h"

#include "ops/interval_attention/cpu_backward.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using namespace interval;

int64_t row_tiles(const IntervalAttentionParams& p) { return ceil_div(p.mask.tq * (p.heads / p.kv_heads), kRows); }

int64_t forward_items(const IntervalAttentionParams& p) { return p.batch * p.kv_heads * row_tiles(p); }

template <class T>
int64_t forward_scratch(const IntervalAttentionParams& p) {
  return ForwardTile<T>(p, Arena(nullptr)).bytes();
}

/// The tiles of a head follow each other, so that its keys stay in a shared cache; the last ones, which see most under
/// a causal mask, come first.
template <class T>
void forward(const IntervalAttentionParams& p, int64_t item, void* scratch) {
  const int64_t tiles = row_tiles(p), head = item / tiles, first = (tiles - 1 - item % tiles) * kRows;
  const int64_t per_kv = p.heads / p.kv_heads;
  const RowTile rows{head / p.kv_heads, head % p.kv_heads, per_kv, first, smaller(kRows, p.mask.tq * per_kv - first)};
  ForwardTile<T>(p, Arena(scratch)).run(rows);
}

template <class T>
void delta(const IntervalAttentionParams& p, const IntervalAttentionGrads& grads, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* grad = static_cast<const T*>(grads.grad_out) + row * p.dv;
    const T* out = static_cast<const T*>(p.out) + row * p.dv;
    float sums[kLanes] = {}, sum = 0.0f;
    int64_t c = 0;
    for (; c + kLanes <= p.dv; c += kLanes)
      for (int64_t i = 0; i < kLanes; ++i) sums[i] += to_float(grad[c + i]) * to_float(out[c + i]);
    for (; c < p.dv; ++c) sum += to_float(grad[c]) * to_float(out[c]);
    grads.delta[row] = sum + vec_sum(vec_load(sums)) - grads.grad_lse[row];
  }
}

constexpr int64_t kBackwardItems = 8;  // as many, where the keys allow it: enough to keep several threads busy

/// Not from the batch, so that a sequence has the same bits alone and among others.
int64_t range_keys(const IntervalAttentionParams& p) {
  const int64_t wanted = ceil_div(kBackwardItems, p.kv_heads);
  return larger(1, ceil_div(ceil_div(p.mask.tk, kKeys), wanted)) * kKeys;
}

int64_t ranges(const IntervalAttentionParams& p) { return larger(1, ceil_div(p.mask.tk, range_keys(p))); }

/// Ranges of a head that are items of their own.
int64_t split_ranges(const IntervalAttentionParams& p) { return p.batch * p.kv_heads < kBackwardItems ? ranges(p) : 1; }

int64_t backward_items(const IntervalAttentionParams& p) { return p.batch * p.kv_heads * split_ranges(p); }

int64_t dq_parts(const IntervalAttentionParams& p) { return ranges(p) > 1 ? split_ranges(p) : 0; }

template <class T>
int64_t backward_scratch(const IntervalAttentionParams& p, const IntervalAttentionGrads& grads) {
  return BackwardRange<T>(p, grads, range_keys(p), Arena(nullptr)).bytes();
}

template <class T>
void backward(const IntervalAttentionParams& p, const IntervalAttentionGrads& grads, int64_t item, float* parts,
              void* scratch) {
  const int64_t all = ranges(p), split = split_ranges(p), head = item / split, keys = range_keys(p);
  const int64_t begin = split > 1 ? item % split : 0, end = split > 1 ? begin + 1 : all;
  float* part = all > 1 ? parts + begin * p.batch * p.mask.tq * p.heads * p.slots * p.d : nullptr;
  BackwardRange<T> keys_of_range(p, grads, keys, Arena(scratch));
  for (int64_t range = begin; range < end; ++range)
    keys_of_range.run(head / p.kv_heads, head % p.kv_heads, range * keys, smaller(p.mask.tk, (range + 1) * keys), part,
                      range > begin);
}

template <class T>
void sum_dq(const IntervalAttentionParams& p, const IntervalAttentionGrads& grads, const float* parts, int64_t begin,
            int64_t end) {
  const int64_t count = dq_parts(p), elements = p.batch * p.mask.tq * p.heads * p.slots * p.d;
  T* dq = static_cast<T*>(grads.dq);
  for (int64_t i = begin; i < end; ++i) {
    float sum = 0.0f;
    for (int64_t part = 0; part < count; ++part) sum += parts[part * elements + i];
    dq[i] = from_float<T>(sum * p.scale);
  }
}

template <class T>
IntervalAttentionKernels kernels() {
  return {forward_scratch<T>, forward_items,       forward<T>,  delta<T>, backward_items,
          dq_parts,           backward_scratch<T>, backward<T>, sum_dq<T>};
}

}  // namespace

IntervalAttentionKernels interval_attention_kernels(DType dtype) {
  return by_dtype<BFloat16, Half>(dtype, []<class T>(T) -> IntervalAttentionKernels { return kernels<T>(); });
}

}  // namespace subquad::cpu::SUBQUAD_ISA
