// Attention of new tokens to a streaming cache and to each other. The keys that a group of query rows sees are cut into
// shares, one per block; in a block every few lanes walk keys of their own, and what they found is merged in one order.
// Correct for any number of new tokens, made for few.
#pragma once

#include "ops/sink_attention_step/cuda_tile.cuh"

namespace subquad::cuda {

/// Where the keys lie that a block walks, in the order of the sequence.
enum SinkPart : int { kHeldSinks, kNewSinks, kHeldTokens, kNewTokens, kSinkParts };

/// What a block knows of its rows, (token, head of the group) pairs in that order, and of their keys. In shared memory:
/// registers are for the sums.
struct SinkBlock {
  int64_t begin[kSinkRows], stop[kSinkRows], sink_stop[kSinkRows];  // what the row sees, as in SinkView
  int64_t position[kSinkRows], sink_position[kSinkRows];            // of its query, towards the window and the sinks
  int64_t query[kSinkRows], result[kSinkRows];                      // offsets in q and in the scratch
  int64_t low[kSinkParts], high[kSinkParts];                        // tokens of a part
  int64_t before, head, new_keys, new_values;                       // head of the cache; offsets in k and v
  int tiles[kSinkParts];                                            // up to the end of a part
  int first_tile, last_tile;                                        // of the share, the second is not in it
  unsigned visible[kSinkRows];
};

/// Fills the block's own, and returns the rows that are tokens.
template <int kRows>
__device__ __forceinline__ int begin_block(const SinkAttentionStepParams& p, const SinkPlan& plan, SinkBlock& block) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t per_kv = p.heads / p.kv_heads, groups = ceil_div(p.width * per_kv, kRows);
  const int64_t split = blockIdx.x % plan.splits, first_row = blockIdx.x / plan.splits % groups * kRows;
  const int64_t head = blockIdx.x / plan.splits / groups, b = head / p.kv_heads, kv_head = head % p.kv_heads;
  const int64_t before = tokens_before(p, b), count = new_tokens(p, b), first = sq::load_nc(p.first + b);
  const int rows = static_cast<int>(clamp(count * per_kv - first_row, 0, kRows));
  if (thread < rows) {
    const int64_t t = (first_row + thread) / per_kv, h = kv_head * per_kv + (first_row + thread) % per_kv;
    const SinkView view = sink_view(p, before, count, first, t);
    block.begin[thread] = view.begin, block.stop[thread] = view.stop, block.sink_stop[thread] = view.sink_stop;
    block.position[thread] = before + t;
    block.sink_position[thread] = before + t - (p.absolute ? 0 : view.forgotten);
    block.query[thread] = b * p.q_stride_b + t * p.q_stride_t + h * p.q_stride_h;
    block.result[thread] = (((b * p.width + t) * p.heads + h) * plan.splits + split) * Shares::floats(p.dv);
  }
  if (thread == 0 && rows > 0) {
    const SinkView oldest = sink_view(p, before, count, first, first_row / per_kv);
    const SinkView newest = sink_view(p, before, count, first, (first_row + rows - 1) / per_kv);
    // Windows of neighbouring rows overlap, so every token from the first to the last is seen by some row.
    const int64_t begin = larger(oldest.begin, p.sinks);
    const int64_t stop = newest.begin < newest.stop ? larger(newest.stop, begin) : begin;
    const int64_t held_sinks = smaller(newest.sink_stop, before), held = clamp(before, begin, stop);
    block.low[kHeldSinks] = 0, block.high[kHeldSinks] = held_sinks;
    block.low[kNewSinks] = held_sinks, block.high[kNewSinks] = newest.sink_stop;
    block.low[kHeldTokens] = begin, block.high[kHeldTokens] = held;
    block.low[kNewTokens] = held, block.high[kNewTokens] = stop;
    int tiles = 0;
    for (int part = 0; part < kSinkParts; ++part) {
      tiles += static_cast<int>(ceil_div(larger(block.high[part] - block.low[part], 0), kSinkTile));
      block.tiles[part] = tiles;
    }
    block.first_tile = static_cast<int>(tiles * split / plan.splits);
    block.last_tile = static_cast<int>(tiles * (split + 1) / plan.splits);
    block.before = before, block.head = head;
    block.new_keys = b * p.k_stride_b + kv_head * p.k_stride_h;
    block.new_values = b * p.v_stride_b + kv_head * p.v_stride_h;
  }
  return rows;
}

/// The keys and values of a part that holds S.
template <class S>
__device__ __forceinline__ SinkSource<S> source_of(const SinkAttentionStepParams& p, const SinkPlan& plan,
                                                   const SinkBlock& block, int part) {
  if (part == kNewSinks || part == kNewTokens) {
    return {static_cast<const S*>(p.k) + block.new_keys,
            static_cast<const S*>(p.v) + block.new_values,
            p.k_stride_t,
            p.v_stride_t,
            nullptr,
            nullptr,
            INT64_MAX,
            plan.new_aligned};
  }
  const bool in_ring = part == kHeldTokens;
  const int64_t places = in_ring ? p.ring : p.sinks, at = block.head * places;
  return {static_cast<const S*>(in_ring ? p.ring_k : p.sink_k) + at * p.d,
          static_cast<const S*>(in_ring ? p.ring_v : p.sink_v) + at * p.dv,
          p.d,
          p.dv,
          kScaled<S> ? p.k_scale + at : nullptr,
          kScaled<S> ? p.v_scale + at : nullptr,
          places,
          plan.held_aligned};
}

/// The query rows in shared memory, rotated to `base`, for keys that are turned, or to 0.
template <int kRows, class T>
__device__ __forceinline__ void place_query(const SinkAttentionStepParams& p, const SinkBlock& block, int rows,
                                            bool to_sinks, bool turned, int64_t base, const SinkShared& shared) {
  const int thread = static_cast<int>(threadIdx.x), width = shared.width;
  const int pairs = p.turns == nullptr ? 0 : static_cast<int>(p.rotary / 2);
  for (int n = thread; n < rows * pairs; n += kSinkThreads) {
    const int i = n / pairs, f = n % pairs;
    const RotaryPair pair = rotary_pair(p, f);
    const T* q = static_cast<const T*>(p.q) + block.query[i];
    const float a = sq::to_float(sq::load_nc(q + pair.first)) * p.rotary_scale;
    const float b = sq::to_float(sq::load_nc(q + pair.second)) * p.rotary_scale;
    const int64_t position = (to_sinks ? block.sink_position[i] : block.position[i]) - (turned ? base : 0);
    const Turn turn = turn_of(position, sq::load_nc(p.turns + f));
    const float first = fmaf(a, turn.cos, -(b * turn.sin)), second = fmaf(b, turn.cos, a * turn.sin);
    float* row = shared.query + i * width;
    row[sink_slot(pair.first, width)] = first;
    row[sink_slot(pair.second, width)] = second;
    if (!turned) continue;
    row += kRows * width;
    row[sink_slot(pair.first, width)] = second;
    row[sink_slot(pair.second, width)] = -first;
  }
  const int rest = width - 2 * pairs;
  for (int n = thread; n < rows * rest; n += kSinkThreads) {
    const int i = n / rest, c = 2 * pairs + n % rest;
    float* at = shared.query + i * width + sink_slot(c, width);
    *at = c < p.d ? sq::to_float(sq::load_nc(static_cast<const T*>(p.q) + block.query[i] + c)) : 0.0f;
    if (turned) at[kRows * width] = 0.0f;
  }
}

/// The first `count` turns of the table, for every element of a head; elements that are not rotated have none.
__device__ __forceinline__ void fill_turns(const SinkAttentionStepParams& p, int count, const SinkShared& shared) {
  const int thread = static_cast<int>(threadIdx.x), width = shared.width, pairs = static_cast<int>(p.rotary / 2);
  const auto put = [&](int n, int c, const Turn& turn) {
    float* at = shared.table + n * width + sink_slot(c, width);
    at[0] = turn.cos;
    at[kSinkTile * width] = turn.sin;
  };
  for (int i = thread; i < count * pairs; i += kSinkThreads) {
    const int n = i / pairs, f = i % pairs;
    const Turn turn = turn_of(n, sq::load_nc(p.turns + f));
    const RotaryPair pair = rotary_pair(p, f);
    put(n, pair.first, turn);
    put(n, pair.second, turn);
  }
  const int rest = width - 2 * pairs;
  for (int i = thread; i < count * rest; i += kSinkThreads) put(i / rest, 2 * pairs + i % rest, {1, 0});
}

/// The tile of `keys` tokens from `base` on. T: what q has, S: what the part holds.
template <class T, class S, int kRows>
__device__ __forceinline__ void walk_tile(const SinkAttentionStepParams& p, const SinkPlan& plan, SinkBlock& block,
                                          int part, int64_t base, bool is_first, int rows, const SinkLane& lane,
                                          const SinkShared& shared, SinkSums<kRows>& sums) {
  const int thread = static_cast<int>(threadIdx.x);
  const bool is_new = part == kNewSinks || part == kNewTokens, is_sink = part <= kNewSinks;
  // Keys are rotated where they enter, so new ones are not yet, or where they are read.
  const bool turned = p.turns != nullptr && (is_new || !p.rotated);
  const int64_t high = block.high[part];
  const int keys = static_cast<int>(smaller(high - base, kSinkTile));
  const int64_t start = is_new ? base - block.before : is_sink ? base : (base - p.sinks) % p.ring;
  auto batch = load_batch(p, source_of<S>(p, plan, block, part), lane, start, keys, 0);
  __syncthreads();  // the last tile has been walked
  if (turned || is_first) place_query<kRows, T>(p, block, rows, is_sink, turned, base, shared);
  if (turned && is_first) fill_turns(p, keys, shared);  // later tiles of a part have no more keys
  if (thread < rows) {
    const int64_t stop = smaller(is_sink ? block.sink_stop[thread] : block.stop[thread], high);
    const int64_t below = clamp((is_sink ? 0 : block.begin[thread]) - base, 0, kSinkTile);
    const int64_t end = clamp(stop - base, below, kSinkTile);
    block.visible[thread] = static_cast<unsigned>((uint64_t{1} << end) - (uint64_t{1} << below));
  }
  __syncthreads();
  for (int step = 0; (step * kSinkWarps + lane.warp) * lane.units < keys; step += batch.kDepth) {
    const auto next = load_batch(p, source_of<S>(p, plan, block, part), lane, start, keys, step + batch.kDepth);
    add_batch(batch, lane, shared, rows, step, turned, p.scale, sums);
    batch = next;
  }
}

/// Floats of shared memory: what keys are walked with, or what the lanes found.
template <int kRows>
inline int64_t sink_shared_floats(const SinkAttentionStepParams& p, const SinkPlan& plan) {
  const int64_t rotating = p.turns == nullptr ? 0 : 2 * (kRows + kSinkTile) * plan.width;
  const int64_t parts = kSinkThreads * kRows * kSinkChunk + 3 * kSinkThreads / plan.lanes * kRows;
  return larger(larger(rotating, kRows * plan.width), parts);
}

/// What the lanes found, in their order, into the scratch.
template <int kRows>
__device__ __forceinline__ void merge_lanes(const SinkAttentionStepParams& p, const SinkPlan& plan,
                                            const SinkBlock& block, int rows, const SinkLane& lane,
                                            const SinkSums<kRows>& sums, float* found, float* __restrict__ scratch) {
  const int thread = static_cast<int>(threadIdx.x), width = plan.width, units = kSinkThreads / plan.lanes;
  const int unit = thread / plan.lanes;
  float* const tops = found + units * kRows * width;  // [unit][row]
  float* const totals = tops + units * kRows;
  float* const factors = totals + units * kRows;
  __syncthreads();  // nobody walks any more
  SQ_UNROLL
  for (int i = 0; i < kRows; ++i) {
    if (i >= rows) continue;
    SQ_UNROLL
    for (int e = 0; e < kSinkChunk; ++e) {
      found[(unit * kRows + i) * width + sink_slot(lane.sub * kSinkChunk + e, width)] = sums.acc[i][e];
    }
    if (lane.sub == 0) tops[unit * kRows + i] = sums.top[i], totals[unit * kRows + i] = sums.sum[i];
  }
  __syncthreads();
  const int dv = static_cast<int>(p.dv);
  for (int n = thread; n < units * kRows; n += kSinkThreads) {
    const int i = n % kRows;
    if (i >= rows) continue;
    float top = -INFINITY, total = 0.0f;
    for (int u = 0; u < units; ++u) top = fmaxf(top, tops[u * kRows + i]);
    const float shift = top == -INFINITY ? 0.0f : top;
    factors[n] = exp2f((tops[n] - shift) * kLog2e);
    if (n >= kRows) continue;
    for (int u = 0; u < units; ++u) {
      total = fmaf(totals[u * kRows + i], exp2f((tops[u * kRows + i] - shift) * kLog2e), total);
    }
    sq::store(scratch + block.result[i] + dv, top);
    sq::store(scratch + block.result[i] + dv + 1, total);
  }
  __syncthreads();
  for (int n = thread; n < rows * dv; n += kSinkThreads) {
    const int i = n / dv, c = n % dv;
    float sum = 0.0f;
    for (int u = 0; u < units; ++u) {
      const int row = u * kRows + i;
      sum = fmaf(found[row * width + sink_slot(c, width)], factors[row], sum);
    }
    sq::store(scratch + block.result[i] + c, sum);
  }
}

/// One share of the keys for one group of rows. R: what the ring stores.
template <class T, class R, int kRows>
__global__ void __launch_bounds__(kSinkThreads, kRows == kFewRows && sizeof(T) == 2 ? 3 : 2)
    sink_attention_split_kernel(const SinkAttentionStepParams p, const SinkPlan plan, float* __restrict__ scratch) {
  SQ_DYNAMIC_SHARED(float, memory);
  SQ_SHARED(SinkBlock, own, 1);
  SinkBlock& block = own[0];
  const int thread = static_cast<int>(threadIdx.x);
  const int rows = begin_block<kRows>(p, plan, block);
  if (rows == 0) return;
  __syncthreads();

  const SinkLane lane{thread % plan.lanes, thread % kWarp / plan.lanes, kWarp / plan.lanes, thread / kWarp};
  const SinkShared shared{memory, memory + 2 * kRows * plan.width, block.visible, plan.width};
  SinkSums<kRows> sums;
  SQ_UNROLL
  for (int i = 0; i < kRows; ++i) {
    sums.top[i] = -INFINITY, sums.sum[i] = 0.0f;
    SQ_UNROLL
    for (int e = 0; e < kSinkChunk; ++e) sums.acc[i][e] = 0.0f;
  }
  for (int tile = block.first_tile; tile < block.last_tile; ++tile) {
    int part = 0;
    while (tile >= block.tiles[part]) ++part;
    const int in_part = tile - (part == 0 ? 0 : block.tiles[part - 1]);
    const int64_t base = block.low[part] + int64_t{in_part} * kSinkTile;
    const bool is_first = tile == block.first_tile || in_part == 0;
    if (std::is_same_v<T, R> || part != kHeldTokens) {
      walk_tile<T, T>(p, plan, block, part, base, is_first, rows, lane, shared, sums);
    } else {
      walk_tile<T, R>(p, plan, block, part, base, is_first, rows, lane, shared, sums);
    }
  }
  merge_lanes(p, plan, block, rows, lane, sums, memory, scratch);
}

}  // namespace subquad::cuda
