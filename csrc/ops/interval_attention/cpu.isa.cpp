// Compiled once per instruction set.
#include "ops/interval_attention/cpu.h"

#include "ops/interval_attention/cpu_backward.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using namespace interval;

int64_t rows_of_head(const IntervalAttentionParams& p) { return p.mask.tq * (p.heads / p.kv_heads); }

int64_t row_tiles(const IntervalAttentionParams& p) { return ceil_div(rows_of_head(p), kRows); }

constexpr int64_t kRangeKeys = 1024;  // keys taken at a time, where the rows of a head are one tile
constexpr int64_t kManyHeads = 64;    // keep all threads busy, each with an item of its own

/// Not from batch or heads, so that a row has the same bits alone and among others.
int64_t forward_ranges(const IntervalAttentionParams& p) {
  return row_tiles(p) == 1 ? larger(1, ceil_div(p.mask.tk, kRangeKeys)) : 1;
}

/// Whether the ranges of a head are items of their own.
bool has_parts(const IntervalAttentionParams& p) { return forward_ranges(p) > 1 && p.batch * p.kv_heads < kManyHeads; }

int64_t forward_items(const IntervalAttentionParams& p) {
  return p.batch * p.kv_heads * (has_parts(p) ? forward_ranges(p) : row_tiles(p));
}

RowTile row_tile(const IntervalAttentionParams& p, int64_t head, int64_t first, int64_t count) {
  return {head / p.kv_heads, head % p.kv_heads, p.heads / p.kv_heads, first, count};
}

/// What the items of a head leave for `merge_parts`: for each range whether any row sees one of its keys, and its sums.
struct Parts {
  Parts(const IntervalAttentionParams& p, float* memory)
      : cols(RowSums::columns(p)),
        rows(round_up(rows_of_head(p), kTileRows)),
        count(has_parts(p) ? p.batch * p.kv_heads * forward_ranges(p) : 0),
        seen(memory) {}

  RowSums sums(int64_t part) const { return RowSums::in(seen + floats_before(part), rows, cols); }
  int64_t floats() const { return floats_before(count); }

  int64_t cols, rows, count;
  float* seen;  // 1 or 0, head by head

 private:
  int64_t floats_before(int64_t part) const { return round_up(count, 16) + part * RowSums::floats(rows, cols); }
};

int64_t part_floats(const IntervalAttentionParams& p) { return Parts(p, nullptr).floats(); }

RowSums take_sums(const IntervalAttentionParams& p, Arena& arena) {
  const int64_t cols = RowSums::columns(p);
  return {arena.take<float>(kRows * cols), arena.take<float>(kRows), arena.take<float>(kRows), cols};
}

template <class T>
int64_t forward_scratch(const IntervalAttentionParams& p) {
  Arena arena(nullptr);
  take_sums(p, arena), take_sums(p, arena);
  return ForwardTile<T>(p, arena).bytes();
}

/// The tiles of a head follow each other, so that its keys stay in a shared cache; the last ones, which see most under
/// a causal mask, come first.
template <class T>
void forward(const IntervalAttentionParams& p, int64_t item, float* memory, void* scratch) {
  Arena arena(scratch);
  const RowSums total = take_sums(p, arena), one_range = take_sums(p, arena);
  ForwardTile<T> tile(p, arena);
  const int64_t ranges = forward_ranges(p), all_rows = rows_of_head(p);
  if (ranges == 1) {
    const int64_t tiles = row_tiles(p), first = (tiles - 1 - item % tiles) * kRows;
    const RowTile rows = row_tile(p, item / tiles, first, smaller(kRows, all_rows - first));
    start(p, rows, total);
    tile.add(rows, 0, p.mask.tk, total, true);
    return store<T>(p, rows, total);
  }
  const bool apart = has_parts(p);
  const Parts parts(p, memory);
  const RowTile rows = row_tile(p, apart ? item / ranges : item, 0, all_rows);
  const int64_t first = apart ? item % ranges : 0, last = apart ? first + 1 : ranges;
  if (!apart) start(p, rows, total);
  for (int64_t range = first; range < last; ++range) {
    const RowSums sums = apart ? parts.sums(item) : one_range;
    const int64_t key = range * kRangeKeys;
    const bool seen = tile.add(rows, key, smaller(p.mask.tk, key + kRangeKeys), sums, false);
    if (apart) {
      parts.seen[item] = seen ? 1.0f : 0.0f;
    } else if (seen) {
      for (int64_t row = 0; row < all_rows; ++row) merge(total.from(row), sums.from(row));
    }
  }
  if (!apart) store<T>(p, rows, total);
}

template <class T>
void merge_parts(const IntervalAttentionParams& p, float* memory, int64_t begin, int64_t end) {
  const Parts parts(p, memory);
  const int64_t ranges = forward_ranges(p), all_rows = rows_of_head(p);
  alignas(64) float sums[RowSums::floats(kTileRows, kIntervalMaxDim)];  // of one row, padded
  const RowSums total = RowSums::in(sums, kTileRows, parts.cols);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t head = i / all_rows, row = i % all_rows;
    const RowTile one = row_tile(p, head, row, 1);
    start(p, one, total);
    for (int64_t part = head * ranges; part < (head + 1) * ranges; ++part)
      if (parts.seen[part] != 0.0f) merge(total, parts.sums(part).from(row));
    store<T>(p, one, total);
  }
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

/// What the items leave for `sum_dq`: shares of dq, and of which row tiles and slots of each head there is one. Most
/// rows see keys of few ranges; what they do not see is neither written nor read.
struct DqParts {
  DqParts(const IntervalAttentionParams& p, float* memory)
      : count(ranges(p) > 1 ? split_ranges(p) : 0),
        elements(p.batch * p.mask.tq * p.heads * p.slots * p.d),
        flags(row_tiles(p) * p.slots),
        heads(p.batch * p.kv_heads),
        memory_(memory) {}

  float* part(int64_t i) const { return memory_ + i * elements; }
  float* written(int64_t i, int64_t head) const { return part(count) + (i * heads + head) * flags; }
  int64_t floats() const { return count * (elements + heads * flags); }

  const int64_t count, elements, flags, heads;

 private:
  float* const memory_;
};

int64_t dq_floats(const IntervalAttentionParams& p) { return DqParts(p, nullptr).floats(); }

template <class T>
int64_t backward_scratch(const IntervalAttentionParams& p, const IntervalAttentionGrads& grads) {
  return BackwardRange<T>(p, grads, range_keys(p), Arena(nullptr)).bytes();
}

template <class T>
void backward(const IntervalAttentionParams& p, const IntervalAttentionGrads& grads, int64_t item, float* memory,
              void* scratch) {
  const int64_t all = ranges(p), split = split_ranges(p), head = item / split, keys = range_keys(p);
  const int64_t begin = split > 1 ? item % split : 0, end = split > 1 ? begin + 1 : all;
  const DqParts parts(p, memory);
  float* part = all > 1 ? parts.part(begin) : nullptr;
  float* written = all > 1 ? parts.written(begin, head) : nullptr;
  if (all > 1) zero_words(written, parts.flags);
  BackwardRange<T> keys_of_range(p, grads, keys, Arena(scratch));
  for (int64_t range = begin; range < end; ++range)
    keys_of_range.run(head / p.kv_heads, head % p.kv_heads, range * keys, smaller(p.mask.tk, (range + 1) * keys), part,
                      written);
}

template <class T>
void sum_dq(const IntervalAttentionParams& p, const IntervalAttentionGrads& grads, float* memory, int64_t begin,
            int64_t end) {
  const DqParts parts(p, memory);
  const int64_t group = p.heads / p.kv_heads;
  float sum[kIntervalMaxDim];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t h = row % p.heads, t = row / p.heads % p.mask.tq, b = row / p.heads / p.mask.tq;
    const int64_t tile = (t * group + h % group) / kRows;
    for (int64_t slot = 0; slot < p.slots; ++slot) {
      const int64_t at = (row * p.slots + slot) * p.d;
      zero_words(sum, p.d);
      for (int64_t i = 0; i < parts.count; ++i) {
        if (parts.written(i, b * p.kv_heads + h / group)[tile * p.slots + slot] == 0.0f) continue;
        const float* part = parts.part(i) + at;
        for (int64_t c = 0; c < p.d; ++c) sum[c] += part[c];
      }
      T* dq = static_cast<T*>(grads.dq) + at;
      for (int64_t c = 0; c < p.d; ++c) dq[c] = from_float<T>(sum[c] * p.scale);
    }
  }
}

template <class T>
IntervalAttentionKernels kernels() {
  return {forward_items,  part_floats, forward_scratch<T>,  forward<T>,  merge_parts<T>, delta<T>,
          backward_items, dq_floats,   backward_scratch<T>, backward<T>, sum_dq<T>};
}

}  // namespace

IntervalAttentionKernels interval_attention_kernels(DType dtype) {
  return by_dtype<BFloat16, Half>(dtype, []<class T>(T) -> IntervalAttentionKernels { return kernels<T>(); });
}

}  // namespace subquad::cpu::SUBQUAD_ISA
