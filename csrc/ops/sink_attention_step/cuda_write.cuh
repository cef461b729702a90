// What follows attention: shares are merged, new tokens enter the cache, counters move on.
#pragma once

#include "cuda/shares.cuh"
#include "ops/sink_attention_step/cuda_parts.cuh"

namespace subquad::cuda {

/// The shares of one query row, in their order; the sink logit once. Columns that are no tokens are 0 and -inf.
template <class T>
__device__ __forceinline__ void merge_row(const SinkAttentionStepParams& p, const float* __restrict__ scratch,
                                          int64_t splits, int64_t row) {
  const int64_t column = row / p.heads % p.width;
  const bool is_token = column < new_tokens(p, row / p.heads / p.width);
  const float* parts = scratch + row * splits * Shares::floats(p.dv);
  const float sink = p.sink_logits == nullptr || !is_token ? -INFINITY : sq::load_nc(p.sink_logits + row % p.heads);
  const RowTotal merged =
      merge_shares<kSinkThreads>({parts, is_token ? splits : 0, p.dv}, sink, static_cast<T*>(p.out) + row * p.dv);
  if (threadIdx.x != 0) return;
  sq::store(p.lse + row, merged.empty() ? -INFINITY : merged.shift + logf(merged.total));
}

/// One row of a head by one warp into `to`, quantised where S is not T; `x(c)` is element c.
template <class T, class S, class Elements>
__device__ __forceinline__ void store_row(int64_t width, S* to, float* scale, const Elements& x) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  float row[kSinkChunk];
  SQ_UNROLL
  for (int i = 0; i < kSinkChunk; ++i) row[i] = lane + i * kWarp < width ? x(lane + i * kWarp) : 0.0f;
  if constexpr (std::is_same_v<S, T>) {
    SQ_UNROLL
    for (int i = 0; i < kSinkChunk; ++i) {
      if (lane + i * kWarp < width) sq::store(to + lane + i * kWarp, sq::from_float<T>(row[i]));
    }
  } else {
    std::uint32_t most = 0;  // as an integer: NaN is above infinity, and makes the scale NaN
    SQ_UNROLL
    for (int i = 0; i < kSinkChunk; ++i) {
      const std::uint32_t magnitude = sq::detail::bit_cast<std::uint32_t>(row[i]) & 0x7fffffffu;
      most = magnitude > most ? magnitude : most;
    }
    SQ_UNROLL
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const std::uint32_t other = __shfl_xor_sync(kFullWarp, most, offset);
      most = other > most ? other : most;
    }
    const float unit = most == 0 ? 1.0f : sq::detail::bit_cast<float>(most) / kMostStored<S>;
    SQ_UNROLL
    for (int i = 0; i < kSinkChunk; ++i) {
      if (lane + i * kWarp >= width) continue;
      const float ratio = row[i] / unit, inside = fminf(fmaxf(ratio, -kMostStored<S>), kMostStored<S>);
      sq::store(to + lane + i * kWarp, stored<S>(fabsf(ratio) < INFINITY ? inside : 0.0f));
    }
    if (lane == 0) sq::store(scale, unit);
  }
}

/// Column t of k and v, head h, by one warp into its place; what no later token leaves in place is not written.
template <class T, class R>
__device__ __forceinline__ void enter_token(const SinkAttentionStepParams& p, int64_t b, int64_t h, int64_t t,
                                            int64_t before, int64_t count) {
  const int64_t token = before + t, at = b * p.kv_heads + h;
  if (t >= count || (token >= p.sinks && t < count - p.ring)) return;
  const T* k = static_cast<const T*>(p.k) + b * p.k_stride_b + t * p.k_stride_t + h * p.k_stride_h;
  const T* v = static_cast<const T*>(p.v) + b * p.v_stride_b + t * p.v_stride_t + h * p.v_stride_h;
  const auto key = [&](int c) {
    const float x = sq::to_float(sq::load_nc(k + c));
    if (!p.rotated || c >= p.rotary) return x;
    const int pairs = static_cast<int>(p.rotary / 2);
    const int f = p.interleaved ? c / 2 : c % pairs;
    const RotaryPair pair = rotary_pair(p, f);
    const Turn turn = turn_of(token, sq::load_nc(p.turns + f));
    const float partner = sq::to_float(sq::load_nc(k + (c == pair.first ? pair.second : pair.first)));
    return fmaf(x, turn.cos, c == pair.first ? -(partner * turn.sin) : partner * turn.sin);
  };
  const auto value = [&](int c) { return sq::to_float(sq::load_nc(v + c)); };
  if (token < p.sinks) {
    const int64_t row = at * p.sinks + token;
    store_row<T>(p.d, static_cast<T*>(p.sink_k) + row * p.d, nullptr, key);
    store_row<T>(p.dv, static_cast<T*>(p.sink_v) + row * p.dv, nullptr, value);
  } else {
    const int64_t row = at * p.ring + (token - p.sinks) % p.ring;
    float* const scales[] = {p.k_scale == nullptr ? nullptr : p.k_scale + row,
                             p.v_scale == nullptr ? nullptr : p.v_scale + row};
    store_row<T>(p.d, static_cast<R*>(p.ring_k) + row * p.d, scales[0], key);
    store_row<T>(p.dv, static_cast<R*>(p.ring_v) + row * p.dv, scales[1], value);
  }
}

__device__ __forceinline__ void advance(const SinkAttentionStepParams& p, int64_t b, int64_t before, int64_t count) {
  const int64_t after = before + count;
  sq::store(p.seen + b, p.advance ? after : before);
  sq::store(p.written + b, larger(sq::load(p.written + b), after));
}

/// Merges `rows` query rows, a block each, and writes the tokens, `writers` blocks for a sequence. Merging reads
/// nothing that writing changes. A single writer knows when all have read the counters, and advances them.
template <class T, class R>
__global__ void __launch_bounds__(kSinkThreads)
    sink_attention_enter_kernel(const SinkAttentionStepParams p, const float* __restrict__ scratch, int64_t splits,
                                int64_t rows, int64_t writers) {
  if (blockIdx.x < rows) {
    merge_row<T>(p, scratch, splits, blockIdx.x);
    return;
  }
  const int64_t b = (blockIdx.x - rows) / writers, writer = (blockIdx.x - rows) % writers;
  const int64_t before = tokens_before(p, b), count = new_tokens(p, b);
  for (int64_t n = writer * kSinkWarps + threadIdx.x / kWarp; n < p.width * p.kv_heads; n += writers * kSinkWarps) {
    enter_token<T, R>(p, b, n % p.kv_heads, n / p.kv_heads, before, count);
  }
  if (writers > 1) return;
  __syncthreads();
  if (threadIdx.x == 0) advance(p, b, before, count);
}

/// The counters, for several writers of a sequence.
template <class = void>
__global__ void __launch_bounds__(kSinkThreads) sink_attention_advance_kernel(const SinkAttentionStepParams p) {
  const int64_t b = int64_t{blockIdx.x} * kSinkThreads + threadIdx.x;
  if (b < p.batch) advance(p, b, tokens_before(p, b), new_tokens(p, b));
}

}  // namespace subquad::cuda
