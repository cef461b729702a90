// Interval attention for a few query rows over many keys (decoding): the keys that a group of rows sees are cut into
// equal shares, and what the shares gave is merged in their order. Forward only; correct for any number of rows.
#pragma once

#include "common/exp.h"
#include "cuda/chunk.cuh"
#include "cuda/portable.cuh"
#include "cuda/shares.cuh"
#include "ops/interval_attention/params.h"

namespace subquad::cuda {

constexpr int kAttentionRows = 8;   // rows of one key head that share the loads of its keys and values
constexpr int kAttentionKeys = 32;  // keys of a tile: one per lane where weights are made
constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = kAttentionWarps * kWarp;
constexpr int kAttentionWidth = static_cast<int>(kIntervalMaxDim);
constexpr int64_t kAttentionBlocks = 264;  // blocks wanted: two for each of 132 processors
constexpr int64_t kKeysPerSplit = 256;     // fewer keys are not worth a block of their own
constexpr int64_t kMaxSplits = 64;

inline int64_t attention_row_groups(const IntervalAttentionParams& p) {
  return ceil_div(p.mask.tq * (p.heads / p.kv_heads), kAttentionRows);
}

/// Shares of the keys; from shapes alone, and not from the batch, so that a row has the same bits alone and among
/// others.
inline int64_t attention_splits(const IntervalAttentionParams& p) {
  const int64_t blocks = p.kv_heads * attention_row_groups(p);
  const int64_t wanted = ceil_div(kAttentionBlocks, blocks < 1 ? 1 : blocks);
  const int64_t most = clamp(ceil_div(p.mask.tk, kKeysPerSplit), 1, kMaxSplits);
  return wanted < most ? wanted : most;
}

/// Floats of scratch: for every row and split the sums of the values, the largest score and the sum of the weights.
inline int64_t attention_scratch_floats(const IntervalAttentionParams& p) {
  return p.batch * p.mask.tq * p.heads * attention_splits(p) * Shares::floats(p.dv);
}

/// The rows of a block, (position, head of the group) pairs in that order.
struct RowGroup {
  int64_t b, kv_head, per_kv, first;
  int count;

  __device__ int64_t position(int r) const { return (first + r) / per_kv; }
  __device__ int64_t head(int r) const { return kv_head * per_kv + (first + r) % per_kv; }
};

/// Tiles of keys that interval r of some row of the group touches. `seen` is where the tiles of earlier intervals end:
/// intervals are sorted, so those before it were visited already. Slots are visited each on its own.
__device__ __forceinline__ Interval tiles_of_interval(const IntervalMaskParams& mask, const RowGroup& rows, int64_t r,
                                                      int64_t seen) {
  Interval tiles{mask.tk, 0};
  for (int i = 0; i < rows.count; ++i) {
    const Interval at = row_interval(mask, rows.b, rows.head(i), rows.position(i), r);
    if (at.begin >= at.end) continue;
    tiles.begin = at.begin < tiles.begin ? at.begin : tiles.begin;
    tiles.end = at.end > tiles.end ? at.end : tiles.end;
  }
  tiles.begin = tiles.begin / kAttentionKeys;
  tiles.end = ceil_div(tiles.end, kAttentionKeys);
  if (tiles.begin < seen) tiles.begin = seen;
  if (tiles.end < tiles.begin) tiles.end = tiles.begin;
  return tiles;
}

/// Whether a row sees a key; `slot` >= 0: through that interval.
__device__ __forceinline__ bool sees(const IntervalAttentionParams& p, const RowGroup& rows, int i, int64_t slot,
                                     int64_t key) {
  const IntervalMaskParams& mask = p.mask;
  const int64_t t = rows.position(i), h = rows.head(i);
  bool inside = false;
  const int64_t begin = slot < 0 ? 0 : slot, end = slot < 0 ? mask.intervals : slot + 1;
  for (int64_t r = begin; r < end; ++r) {
    const Interval at = row_interval(mask, rows.b, h, t, r);
    inside = inside || (key >= at.begin && key < at.end);
  }
  if (!inside) return false;
  if (mask.key_start != nullptr) {
    const int64_t at = rows.b * mask.key_stride_b + h * mask.key_stride_h + key;
    if (t < sq::load_nc(mask.key_start + at) || t >= sq::load_nc(mask.key_stop + at)) return false;
  }
  return p.key_bias == nullptr ||
         sq::load_nc(p.key_bias + rows.b * p.bias_stride_b + h * p.bias_stride_h + key) != -INFINITY;
}

/// The score of row i of the group and a key, from their product.
__device__ __forceinline__ float score_of(const IntervalAttentionParams& p, const RowGroup& rows, int i, int64_t key,
                                          float product) {
  const int64_t h = rows.head(i);
  float score = product * p.scale;
  if (p.softcap != 0.0f) score = tanhf(score / p.softcap) * p.softcap;
  if (p.alibi_slopes != nullptr) {
    const auto distance = static_cast<float>(rows.position(i) + p.mask.tk - p.mask.tq - key);
    score -= sq::load_nc(p.alibi_slopes + rows.b * p.slope_stride_b + h) * fabsf(distance);
  }
  if (p.key_bias != nullptr) score += sq::load_nc(p.key_bias + rows.b * p.bias_stride_b + h * p.bias_stride_h + key);
  return score;
}

// allow-spill(interval_attention_split_kernel): two words on sm_100 for bf16, so that three blocks fit
/// One share of the keys for one group of rows.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kAttentionThreads, 3)
    interval_attention_split_kernel(const IntervalAttentionParams p, float* __restrict__ scratch, int64_t splits) {
  constexpr int kChunk = kVecElems<T>;
  constexpr int kCols = kAttentionWidth / kAttentionThreads;  // columns of the values per thread
  SQ_SHARED(float, query, kAttentionRows* kAttentionWidth);
  SQ_SHARED(float, weights, kAttentionRows* kAttentionKeys);
  SQ_SHARED(float, factors, kAttentionRows);
  SQ_SHARED(unsigned, visible, kAttentionRows);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t groups = ceil_div(p.mask.tq * (p.heads / p.kv_heads), kAttentionRows);
  const int64_t split = blockIdx.x % splits, group = blockIdx.x / splits % groups, head = blockIdx.x / splits / groups;
  RowGroup rows{head / p.kv_heads, head % p.kv_heads, p.heads / p.kv_heads, group * kAttentionRows, kAttentionRows};
  const int64_t left = p.mask.tq * rows.per_kv - rows.first;
  if (left < rows.count) rows.count = static_cast<int>(left);
  const T* keys = static_cast<const T*>(p.k) + rows.b * p.k_stride_b + rows.kv_head * p.k_stride_h;
  const T* values = static_cast<const T*>(p.v) + rows.b * p.v_stride_b + rows.kv_head * p.v_stride_h;

  float acc[kAttentionRows][kCols] = {};
  float top[kAttentionRows / kAttentionWarps], sum[kAttentionRows / kAttentionWarps];
  SQ_UNROLL
  for (int i = 0; i < kAttentionRows / kAttentionWarps; ++i) top[i] = -INFINITY, sum[i] = 0.0f;

  const bool slotted = p.slots > 1;
  int64_t total = 0, seen = 0;
  for (int64_t r = 0; r < p.mask.intervals; ++r) {
    const Interval tiles = tiles_of_interval(p.mask, rows, r, seen);
    total += tiles.end - tiles.begin;
    if (!slotted) seen = tiles.end;
  }
  const int64_t low = total * split / splits, high = total * (split + 1) / splits;

  const auto load_query = [&](int64_t slot) {
    const int d = static_cast<int>(p.d);
    for (int i = thread; i < kAttentionRows * d; i += kAttentionThreads) {
      const int row = i / d, c = i % d;
      float x = 0.0f;
      if (row < rows.count) {
        const T* q = static_cast<const T*>(p.q) + rows.b * p.q_stride_b + rows.position(row) * p.q_stride_t +
                     rows.head(row) * p.q_stride_h + slot * p.q_stride_s;
        x = sq::to_float(sq::load_nc(q + c));
      }
      query[row * kAttentionWidth + c] = x;
    }
    __syncthreads();
  };
  if (!slotted) load_query(0);

  int64_t before = 0;
  seen = 0;
  for (int64_t r = 0; r < p.mask.intervals; ++r) {
    const Interval tiles = tiles_of_interval(p.mask, rows, r, seen);
    const int64_t first = clamp(low - before, 0, tiles.end - tiles.begin);
    const int64_t last = clamp(high - before, 0, tiles.end - tiles.begin);
    before += tiles.end - tiles.begin;
    if (!slotted) seen = tiles.end;
    if (first >= last) continue;
    if (slotted) load_query(r);
    for (int64_t tile = tiles.begin + first; tile < tiles.begin + last; ++tile) {
      // Scores: a warp takes every fourth key, lane i answers for row i.
      for (int j = warp; j < kAttentionKeys; j += kAttentionWarps) {
        const int64_t key = tile * kAttentionKeys + j;
        const bool mine = lane < rows.count && key < p.mask.tk && sees(p, rows, lane, slotted ? r : -1, key);
        float score = -INFINITY;
        if (__ballot_sync(kFullWarp, mine) != 0) {
          float dots[kAttentionRows] = {};
          for (int64_t c = int64_t{lane} * kChunk; c < p.d; c += int64_t{kWarp} * kChunk) {
            const auto raw = load_chunk<Reuse::kStream, kAligned, kChunk>(keys + key * p.k_stride_t + c, p.d - c);
            float k[kChunk];
            to_floats(raw, k);
            SQ_UNROLL
            for (int i = 0; i < kAttentionRows; ++i) {
              SQ_UNROLL
              for (int e = 0; e < kChunk; ++e) {
                if (kAligned || c + e < p.d) dots[i] = fmaf(query[i * kAttentionWidth + c + e], k[e], dots[i]);
              }
            }
          }
          SQ_UNROLL
          for (int i = 0; i < kAttentionRows; ++i) {
            const float dot = warp_sum(dots[i]);
            if (lane == i) score = dot;
          }
          if (mine) score = score_of(p, rows, lane, key, score);
        }
        if (lane < kAttentionRows) weights[lane * kAttentionKeys + j] = mine ? score : -INFINITY;
      }
      __syncthreads();
      // Weights: a warp takes every fourth row, a lane one key.
      SQ_UNROLL
      for (int i = 0; i < kAttentionRows / kAttentionWarps; ++i) {
        const int row = warp + i * kAttentionWarps;
        const float score = weights[row * kAttentionKeys + lane];
        float largest = score;
        SQ_UNROLL
        for (int offset = kWarp / 2; offset > 0; offset /= 2) {
          largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, offset));
        }
        const float new_top = fmaxf(top[i], largest), shift = new_top == -INFINITY ? 0.0f : new_top;
        const float weight = exp2f((score - shift) * kLog2e), factor = exp2f((top[i] - shift) * kLog2e);
        const unsigned bits = __ballot_sync(kFullWarp, !(score == -INFINITY));
        sum[i] = fmaf(sum[i], factor, warp_sum(weight));
        top[i] = new_top;
        weights[row * kAttentionKeys + lane] = weight;
        if (lane == 0) factors[row] = factor, visible[row] = bits;
      }
      __syncthreads();
      // Values: a thread takes its columns of every row.
      unsigned any = 0;
      SQ_UNROLL
      for (int i = 0; i < kAttentionRows; ++i) {
        any |= visible[i];
        SQ_UNROLL
        for (int n = 0; n < kCols; ++n) acc[i][n] *= factors[i];
      }
      for (int j = 0; j < kAttentionKeys; ++j) {
        if ((any >> j & 1u) == 0) continue;
        const T* value = values + (tile * kAttentionKeys + j) * p.v_stride_t;
        SQ_UNROLL
        for (int n = 0; n < kCols; ++n) {
          const int64_t c = thread + n * kAttentionThreads;
          if (c >= p.dv) continue;
          const float v = sq::to_float(sq::load_stream(value + c));
          SQ_UNROLL
          for (int i = 0; i < kAttentionRows; ++i) {
            if ((visible[i] >> j & 1u) != 0) acc[i][n] = fmaf(weights[i * kAttentionKeys + j], v, acc[i][n]);
          }
        }
      }
      __syncthreads();  // the next tile overwrites the weights
    }
  }

  const int64_t width = Shares::floats(p.dv);
  const auto part_of = [&](int i) {
    return scratch + (((rows.b * p.mask.tq + rows.position(i)) * p.heads + rows.head(i)) * splits + split) * width;
  };
  SQ_UNROLL
  for (int i = 0; i < kAttentionRows; ++i) {
    if (i >= rows.count) continue;
    SQ_UNROLL
    for (int n = 0; n < kCols; ++n) {
      const int64_t c = thread + n * kAttentionThreads;
      if (c < p.dv) sq::store(part_of(i) + c, acc[i][n]);
    }
  }
  SQ_UNROLL
  for (int i = 0; i < kAttentionRows / kAttentionWarps; ++i) {
    const int row = warp + i * kAttentionWarps;
    if (lane != 0 || row >= rows.count) continue;
    sq::store(part_of(row) + p.dv, top[i]);
    sq::store(part_of(row) + p.dv + 1, sum[i]);
  }
}

/// The shares of one row, in their order; the sink logit once.
template <class T>
__global__ void __launch_bounds__(kAttentionThreads)
    interval_attention_merge_kernel(const IntervalAttentionParams p, const float* __restrict__ scratch,
                                    int64_t splits) {
  const int64_t row = blockIdx.x;
  const Shares shares{scratch + row * splits * Shares::floats(p.dv), splits, p.dv};
  const float sink = p.sink_logits == nullptr ? -INFINITY : sq::load_nc(p.sink_logits + row % p.heads);
  const RowTotal merged = merge_shares<kAttentionThreads>(shares, sink, static_cast<T*>(p.out) + row * p.dv);
  if (threadIdx.x != 0) return;
  const float log_sum = logf(merged.total);
  sq::store(p.lse + row, merged.empty() ? -INFINITY : merged.shift + log_sum);
  sq::store(p.stats + 2 * row, merged.shift);
  sq::store(p.stats + 2 * row + 1, merged.empty() ? INFINITY : log_sum);
}

inline bool attention_keys_aligned(const IntervalAttentionParams& p, int64_t chunk) {
  return is_aligned16(p.k) && p.d % chunk == 0 && p.k_stride_b % chunk == 0 && p.k_stride_t % chunk == 0 &&
         p.k_stride_h % chunk == 0;
}

template <class T>
void interval_attention_forward(const IntervalAttentionParams& p, float* scratch, sq::stream_t stream) {
  const int64_t rows = p.batch * p.mask.tq * p.heads;
  if (rows == 0) return;
  const int64_t splits = attention_splits(p), blocks = p.batch * p.kv_heads * attention_row_groups(p) * splits;
  with_flag(attention_keys_aligned(p, kVecElems<T>), [&](auto aligned) {
    SQ_LAUNCH((interval_attention_split_kernel<T, decltype(aligned)::value>), blocks, kAttentionThreads, 0, stream, p,
              scratch, splits);
  });
  SQ_LAUNCH((interval_attention_merge_kernel<T>), rows, kAttentionThreads, 0, stream, p,
            static_cast<const float*>(scratch), splits);
}

}  // namespace subquad::cuda
