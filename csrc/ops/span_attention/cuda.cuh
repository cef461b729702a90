// Attention to spans for a few queries (decoding): every span is cut into pieces, blocks walk pieces, and what they
// found is merged in its order. Forward only; correct for any number of queries, whose launches follow each other over
// one bounded scratch.
#pragma once

#include "cuda/rows.cuh"
#include "cuda/shares.cuh"
#include "ops/span_attention/params.h"

namespace subquad::cuda {

constexpr int kSpanWarps = 4;
constexpr int kSpanThreads = kSpanWarps * kWarp;
constexpr int64_t kSpanPiece = 512, kMostPieces = 64;  // keys of a piece, but no span has more pieces
static_assert(kSpanAttentionMaxDim == kMaxLaneRow && kSpanAttentionMaxDim == 2 * kSpanThreads);

// --- how spans are cut

/// The pieces of a span. From the span alone: a row has the same bits whatever is computed with it, and however.
struct SpanPieces {
  int64_t begin, end;   // of the span
  int64_t keys, count;  // of a piece, of pieces

  __device__ explicit SpanPieces(const Span& span)
      : begin(span.begin),
        end(larger(span.begin, span.end)),
        keys(larger(kSpanPiece, ceil_div(end - begin, kMostPieces))),
        count(ceil_div(end - begin, keys)) {}
};

/// From shapes alone: spans are not known without waiting for the device.
struct SpanPlan {
  int lanes;        // of a warp that share a key
  int64_t pieces;   // that a span has room for in the scratch: no span has more
  int64_t workers;  // blocks of a span, which share its pieces; those with none leave
  int64_t tokens;   // of a launch
};

inline int64_t span_floats_per_token(const SpanAttentionParams& p, int64_t pieces) {
  return p.heads * p.spans * pieces * Shares::floats(p.dv);
}

inline SpanPlan span_plan(const SpanAttentionParams& p) {
  constexpr int64_t kBlocks = 8192;  // wanted; most of them find that their span has fewer pieces
  SpanPlan plan{};
  plan.lanes = lanes_of(larger(p.d, p.dv));
  plan.pieces = smaller(kMostPieces, ceil_div(p.keys, kSpanPiece));
  const int64_t bytes = span_floats_per_token(p, plan.pieces) * static_cast<int64_t>(sizeof(float));
  plan.tokens = tokens_at_once(p.batch * p.tokens, bytes);
  plan.workers = clamp(ceil_div(kBlocks, larger(plan.tokens * p.heads * p.spans, 1)), 1, larger(plan.pieces, 1));
  return plan;
}

inline int64_t span_scratch_floats(const SpanAttentionParams& p) {
  const SpanPlan plan = span_plan(p);
  return smaller(plan.tokens, p.batch * p.tokens) * span_floats_per_token(p, plan.pieces);
}

/// The shares of a slot: token n of the launch.
__device__ __forceinline__ int64_t share_of(const SpanAttentionParams& p, const SpanPlan& plan, int64_t n, int64_t h,
                                            int64_t slot) {
  return ((n * p.heads + h) * p.spans + slot) * plan.pieces * Shares::floats(p.dv);
}

// --- a piece

/// Keys of a lane that are under way together, and their values.
template <class T>
struct SpanBatch {
  static constexpr int kDepth = sizeof(T) == 2 ? 4 : 2;
  LaneRow<T> k[kDepth], v[kDepth];
  unsigned seen;  // bit u for key u
};

/// The keys of a piece.
struct SpanSource {
  int64_t b, kv_head, begin;
  int count;
  const bool* key_mask;  // from `begin` on, or null
};

/// The lane's keys of those from place `first` on: each `units` after the last.
template <bool kAligned, class T>
__device__ __forceinline__ SpanBatch<T> load_batch(const SpanAttentionParams& p, const SpanSource& from,
                                                   const RowLane& lane, int first) {
  SpanBatch<T> batch;
  batch.seen = 0;
  SQ_UNROLL
  for (int u = 0; u < SpanBatch<T>::kDepth; ++u) {
    const int n = first + u * lane.units + lane.unit;
    const bool seen = n < from.count && is_kept(from.key_mask, n);
    const T *k = static_cast<const T*>(p.k), *v = static_cast<const T*>(p.v);
    if (seen) {
      k += row_offset(p.keys_at, from.b, from.begin + n, from.kv_head);
      v += row_offset(p.values_at, from.b, from.begin + n, from.kv_head);
    }
    batch.k[u] = load_lane_row<kAligned>(k, seen ? p.d : 0, lane);
    batch.v[u] = load_lane_row<kAligned>(v, seen ? p.dv : 0, lane);
    batch.seen |= seen ? 1u << u : 0u;
  }
  return batch;
}

/// What a lane found: its columns of the values' sum, the largest score and the sum of the weights.
struct SpanSums {
  float acc[kLaneElems], top, sum;
};

template <class T>
__device__ __forceinline__ void add_batch(const SpanBatch<T>& batch, const float (&query)[kLaneElems], float scale,
                                          const RowLane& lane, SpanSums& sums) {
  constexpr int kDepth = SpanBatch<T>::kDepth;
  float weights[kDepth], top = sums.top;
  SQ_UNROLL
  for (int u = 0; u < kDepth; ++u) {
    float k[kLaneElems], dot = 0.0f;
    to_floats(batch.k[u], k);
    SQ_UNROLL
    for (int e = 0; e < kLaneElems; ++e) dot = fmaf(query[e], k[e], dot);
    weights[u] = dot;
  }
  for (int offset = lane.lanes / 2; offset > 0; offset /= 2) {
    SQ_UNROLL
    for (int u = 0; u < kDepth; ++u) weights[u] += __shfl_xor_sync(kFullWarp, weights[u], offset);
  }
  SQ_UNROLL
  for (int u = 0; u < kDepth; ++u) {
    weights[u] = (batch.seen >> u & 1u) != 0 ? weights[u] * scale : -INFINITY;
    top = fmaxf(top, weights[u]);
  }
  const float shift = shift_of(top), factor = exp2f((sums.top - shift) * kLog2e);
  sums.top = top, sums.sum *= factor;
  SQ_UNROLL
  for (int e = 0; e < kLaneElems; ++e) sums.acc[e] *= factor;
  SQ_UNROLL
  for (int u = 0; u < kDepth; ++u) {
    const float weight = exp2f((weights[u] - shift) * kLog2e);
    sums.sum += weight;
    if ((batch.seen >> u & 1u) == 0) continue;
    float v[kLaneElems];
    to_floats(batch.v[u], v);
    SQ_UNROLL
    for (int e = 0; e < kLaneElems; ++e) sums.acc[e] = fmaf(weight, v[e], sums.acc[e]);
  }
}

/// What the lanes of the block found, in their order, as a share.
template <class T>
__device__ __forceinline__ void store_share(const RowLane& lane, const SpanSums& sums, int64_t dv, float* found,
                                            float* tops, float* totals, float* share) {
  const int width = lane.width();
  __syncthreads();  // the last piece is stored
  SQ_UNROLL
  for (int n = 0; n < 2; ++n) {
    const float* acc = sums.acc + 4 * n;
    *lane_quad(found + lane.unit * width, n, lane) = {acc[0], acc[1], acc[2], acc[3]};
  }
  if (lane.sub == 0) tops[lane.unit] = sums.top, totals[lane.unit] = sums.sum;
  __syncthreads();
  float top = -INFINITY, total = 0.0f;
  for (int u = 0; u < lane.units; ++u) top = fmaxf(top, tops[u]);
  const float shift = shift_of(top);
  for (int c = static_cast<int>(threadIdx.x); c < dv; c += kSpanThreads) {
    const int slot = lane_slot<T>(c, width);
    float sum = 0.0f;
    for (int u = 0; u < lane.units; ++u) {
      sum = fmaf(found[u * width + slot], exp2f((tops[u] - shift) * kLog2e), sum);
    }
    sq::store(share + c, sum);
  }
  if (threadIdx.x != 0) return;
  for (int u = 0; u < lane.units; ++u) total = fmaf(totals[u], exp2f((tops[u] - shift) * kLog2e), total);
  sq::store(share + dv, top);
  sq::store(share + dv + 1, total);
}

/// The pieces worker, worker + workers, ... of one span. Heads of a key head follow each other: where their spans are
/// the same, all but the first find the keys in the cache.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kSpanThreads, 3)
    span_attention_piece_kernel(const SpanAttentionParams p, const SpanPlan plan, int64_t first_token,
                                float* __restrict__ scratch) {
  SQ_SHARED(FloatQuad, found, kSpanThreads * kLaneElems / 4);
  SQ_SHARED(float, tops, kSpanThreads / 4);
  SQ_SHARED(float, totals, kSpanThreads / 4);
  const int64_t group = p.heads / p.kv_heads;
  int64_t at = blockIdx.x;
  const int64_t in_group = at % group;
  at /= group;
  const int64_t worker = at % plan.workers;
  at /= plan.workers;
  const int64_t slot = at % p.spans;
  at /= p.spans;
  const int64_t kv_head = at % p.kv_heads, n = at / p.kv_heads, h = kv_head * group + in_group;
  const int64_t b = (first_token + n) / p.tokens, t = (first_token + n) % p.tokens;
  const SpanPieces pieces(span_of(p, b, t, h, slot));
  if (worker >= pieces.count) return;

  const RowLane lane(plan.lanes, kSpanWarps);
  const T* q = static_cast<const T*>(p.q) + b * p.q_stride_b + t * p.q_stride_t + h * p.q_stride_h;
  float query[kLaneElems];
  to_floats(load_lane_row<false>(q, p.d, lane), query);
  for (int64_t piece = worker; piece < pieces.count; piece += plan.workers) {
    const int64_t begin = pieces.begin + piece * pieces.keys;
    const SpanSource from{b, kv_head, begin, static_cast<int>(smaller(pieces.keys, pieces.end - begin)),
                          p.key_mask == nullptr ? nullptr : p.key_mask + b * p.keys + begin};
    const int step = lane.units * SpanBatch<T>::kDepth;
    SpanSums sums{{}, -INFINITY, 0.0f};
    auto batch = load_batch<kAligned, T>(p, from, lane, 0);
    for (int first = 0; first + lane.first_unit() < from.count; first += step) {
      SpanBatch<T> next;
      if constexpr (kAligned) next = load_batch<kAligned, T>(p, from, lane, first + step);
      add_batch(batch, query, p.scale, lane, sums);
      if constexpr (!kAligned) next = load_batch<kAligned, T>(p, from, lane, first + step);  // registers are for one
      batch = next;
    }
    float* share = scratch + share_of(p, plan, n, h, slot) + piece * Shares::floats(p.dv);
    store_share<T>(lane, sums, p.dv, found->v, tops, totals, share);
  }
}

// --- the row

/// The slots of one row, each its pieces and the base, through their gates; or all in one softmax.
template <class T>
__global__ void __launch_bounds__(kSpanThreads)
    span_attention_merge_kernel(const SpanAttentionParams p, const SpanPlan plan, int64_t first_token,
                                const float* __restrict__ scratch) {
  const int64_t n = blockIdx.x / p.heads, h = blockIdx.x % p.heads, row = (first_token + n) * p.heads + h;
  const int64_t b = (first_token + n) / p.tokens, t = (first_token + n) % p.tokens;
  const bool gated = p.gate != nullptr;
  const float base = p.base_lse == nullptr ? -INFINITY : sq::load_nc(p.base_lse + row);
  const auto shares_of = [&](int64_t slot) {
    const SpanPieces pieces(span_of(p, b, t, h, slot));
    return Shares{scratch + share_of(p, plan, n, h, slot), pieces.count, p.dv};
  };
  const int64_t columns[] = {threadIdx.x, int64_t{threadIdx.x} + kSpanThreads};
  float base_out[2] = {}, out[2] = {};
  for (int i = 0; i < 2; ++i) {
    if (base == -INFINITY || columns[i] >= p.dv) continue;
    base_out[i] = sq::to_float(sq::load_nc(static_cast<const T*>(p.base_out) + row * p.dv + columns[i]));
  }
  for (int64_t m = 0; m < p.softmaxes; ++m) {
    const int64_t first = gated ? m : 0, last = gated ? m + 1 : p.spans;
    float top = base;
    for (int64_t s = first; s < last; ++s) top = shares_of(s).top(top);
    const float shift = shift_of(top), base_weight = weight_of(base, shift);
    float total = base_weight;
    for (int64_t s = first; s < last; ++s) total = shares_of(s).total(shift, total);
    const RowTotal merged{shift, total};
    const float gate = gated ? sq::load_nc(p.gate + row * p.spans + m) : 1.0f;
    for (int i = 0; i < 2; ++i) {
      if (columns[i] >= p.dv) continue;
      float sum = base == -INFINITY ? 0.0f : base_weight * base_out[i];
      for (int64_t s = first; s < last; ++s) sum = shares_of(s).value(columns[i], shift, sum);
      out[i] = fmaf(gate, merged.empty() ? 0.0f : sum / total, out[i]);
    }
    if (threadIdx.x == 0) sq::store(p.lse + row * p.softmaxes + m, merged.empty() ? -INFINITY : shift + logf(total));
  }
  for (int i = 0; i < 2; ++i) {
    if (columns[i] < p.dv) sq::store(static_cast<T*>(p.out) + row * p.dv + columns[i], sq::from_float<T>(out[i]));
  }
}

template <class T>
void span_attention_forward(const SpanAttentionParams& p, float* scratch, sq::stream_t stream) {
  const int64_t tokens = p.batch * p.tokens;
  if (tokens == 0 || p.heads == 0) return;
  const SpanPlan plan = span_plan(p);
  const bool aligned = rows_aligned<T>(p.k, p.keys_at, p.d) && rows_aligned<T>(p.v, p.values_at, p.dv);
  for (int64_t first = 0; first < tokens; first += plan.tokens) {
    const int64_t rows = smaller(plan.tokens, tokens - first) * p.heads;
    if (plan.pieces > 0) {
      with_flag(aligned, [&](auto by_words) {
        SQ_LAUNCH((span_attention_piece_kernel<T, decltype(by_words)::value>), rows * p.spans * plan.workers,
                  kSpanThreads, 0, stream, p, plan, first, scratch);
      });
    }
    SQ_LAUNCH((span_attention_merge_kernel<T>), rows, kSpanThreads, 0, stream, p, plan, first,
              static_cast<const float*>(scratch));
  }
}

}  // namespace subquad::cuda
