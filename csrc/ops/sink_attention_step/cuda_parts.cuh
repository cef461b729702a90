// What reading and writing a streaming cache share: what the ring stores, rotations, and how a launch is cut.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/chunk.cuh"
#include "cuda/portable.cuh"
#include "cuda/shares.cuh"
#include "ops/sink_attention_step/params.h"

namespace subquad::cuda {

constexpr int kSinkWarps = 4;
constexpr int kSinkThreads = kSinkWarps * kWarp;
constexpr int kSinkRows = 8;   // query rows of one key head, at most, that share the loads of its keys and values
constexpr int kFewRows = 4;    // the same where there are no more: with fewer registers, more blocks are under way
constexpr int kSinkTile = 32;  // keys that are rotated from one base, and bits of a word
constexpr int kSinkChunk = 8;  // elements of a head that a lane owns
static_assert(kWarp * kSinkChunk == kSinkMaxDim);

// --- what the ring stores

/// float8_e4m3fn: no infinity, 0x7f and 0xff are NaN.
struct Float8 {
  std::uint8_t bits;
};

/// Whether rows of S have a scale.
template <class S>
constexpr bool kScaled = sizeof(S) == 1;

template <class S>
constexpr float kMostStored = std::is_same_v<S, Float8> ? 448.0f : 127.0f;

__device__ __forceinline__ float stored_float(float x) { return x; }
__device__ __forceinline__ float stored_float(sq::bf16 x) { return sq::to_float(x); }
__device__ __forceinline__ float stored_float(sq::fp16 x) { return sq::to_float(x); }
__device__ __forceinline__ float stored_float(std::int8_t x) { return static_cast<float>(x); }
__device__ __forceinline__ float stored_float(Float8 x) {
  const std::uint32_t sign = (x.bits & 0x80u) << 24, magnitude = x.bits & 0x7fu;
  // 2^120 moves the exponent bias from 7 to 127; the multiplication also normalises subnormals.
  const float value = sq::detail::bit_cast<float>(sign | magnitude << 20) * 0x1p120f;
  return magnitude == 0x7fu ? NAN : value;
}

/// x rounded to nearest even, |x| <= kMostStored<S>.
template <class S>
__device__ __forceinline__ S stored(float x) {
  if constexpr (std::is_same_v<S, std::int8_t>) {
    return static_cast<std::int8_t>(rintf(x));
  } else {
    static_assert(std::is_same_v<S, Float8>);
    const std::uint32_t bits = sq::detail::bit_cast<std::uint32_t>(x), sign = bits >> 24 & 0x80u;
    std::uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude < 0x3c800000u) {  // subnormal, below 2^-6: 2^14 has the last bit that these have
      magnitude = sq::detail::bit_cast<std::uint32_t>(fabsf(x) + 0x1p14f) - 0x46800000u;
    } else {
      magnitude = (magnitude + 0x7ffffu + (magnitude >> 20 & 1u) - 0x3c000000u) >> 20;
    }
    return {static_cast<std::uint8_t>(sign | magnitude)};
  }
}

/// The elements of a lane, in words of at most 16 bytes.
template <class S>
struct SinkChunk {
  static constexpr int kWord = sizeof(S) == 4 ? kSinkChunk / 2 : kSinkChunk;
  sq::Vec<S, kWord> words[kSinkChunk / kWord];
};

template <bool kAligned, class S>
__device__ __forceinline__ SinkChunk<S> load_sink_chunk(const S* p, int count) {
  constexpr int kWord = SinkChunk<S>::kWord;
  SinkChunk<S> chunk;
  SQ_UNROLL
  for (int i = 0; i < kSinkChunk / kWord; ++i) {
    chunk.words[i] = load_chunk<Reuse::kKeep, kAligned, kWord>(p + i * kWord, count - i * kWord);
  }
  return chunk;
}

/// One half of a chunk.
template <class S>
__device__ __forceinline__ void to_floats(const SinkChunk<S>& chunk, int half, float (&out)[kSinkChunk / 2]) {
  constexpr int kWord = SinkChunk<S>::kWord;
  SQ_UNROLL
  for (int i = 0; i < kSinkChunk / 2; ++i) {
    const int e = half * kSinkChunk / 2 + i;
    out[i] = stored_float(chunk.words[e / kWord].v[e % kWord]);
  }
}

// --- rotations

struct Turn {
  float cos, sin;
};

/// The turn by `position` steps of `step` 2^-64 turns: whatever the position, the angle is off by no more than 1e-7.
__device__ __forceinline__ Turn turn_of(int64_t position, uint64_t step) {
  const auto phase = static_cast<std::uint32_t>((static_cast<std::uint64_t>(position) * step) >> 32);
  const std::uint32_t quarter = (phase + 0x20000000u) >> 30;  // the nearest, and what is left: at most an eighth
  const float x = static_cast<float>(static_cast<std::int32_t>(phase - (quarter << 30))) * 0x1.921fb6p-30f;
  const float z = x * x;
  const float s = fmaf(x * z, fmaf(z, fmaf(z, -1.95152959e-4f, 8.33216087e-3f), -1.66666546e-1f), x);
  const float c = fmaf(z * z, fmaf(z, fmaf(z, 2.44331571e-5f, -1.38873162e-3f), 4.16666457e-2f), fmaf(z, -0.5f, 1.0f));
  const float cos = quarter & 1u ? s : c, sin = quarter & 1u ? c : s;
  return {(quarter + 1u) & 2u ? -cos : cos, quarter & 2u ? -sin : sin};
}

/// The elements that turn f rotates.
struct RotaryPair {
  int first, second;
};

__device__ __forceinline__ RotaryPair rotary_pair(const SinkAttentionStepParams& p, int f) {
  if (p.interleaved) return {2 * f, 2 * f + 1};
  return {f, f + static_cast<int>(p.rotary / 2)};
}

// --- how a launch is cut

/// From shapes and strides alone: a captured launch stays right whatever is in the cache.
struct SinkPlan {
  int64_t splits;                  // shares of the keys
  int lanes;                       // of a warp that own a key: a power of two in 4 .. 32
  int width;                       // floats of a head in shared memory: what these lanes own
  bool held_aligned, new_aligned;  // rows of the cache, and those of k and v, may be read by words
};

inline bool few_sink_rows(const SinkAttentionStepParams& p) { return p.width * (p.heads / p.kv_heads) <= kFewRows; }

inline int64_t sink_row_groups(const SinkAttentionStepParams& p) {
  return ceil_div(p.width * (p.heads / p.kv_heads), few_sink_rows(p) ? kFewRows : kSinkRows);
}

inline SinkPlan sink_plan(const SinkAttentionStepParams& p) {
  constexpr int64_t kBlocks = 264;       // wanted: two for each of 132 processors
  constexpr int64_t kKeysPerSplit = 64;  // fewer keys are not worth a block of their own
  constexpr int64_t kMaxSplits = 64;
  SinkPlan plan{};
  // A row's window moves with the rows of its group. The batch does not count: a sequence has the same bits alone.
  const int64_t keys = p.sinks + smaller(p.ring, p.window + kSinkRows) + smaller(p.width, p.window + kSinkRows);
  const int64_t wanted = ceil_div(kBlocks, larger(p.kv_heads * sink_row_groups(p), 1));
  plan.splits = clamp(ceil_div(keys, kKeysPerSplit), 1, smaller(wanted, kMaxSplits));
  plan.lanes = 4;
  while (plan.lanes * kSinkChunk < p.d || plan.lanes * kSinkChunk < p.dv) plan.lanes *= 2;
  plan.width = plan.lanes * kSinkChunk;

  const bool chunks = p.d % kSinkChunk == 0 && p.dv % kSinkChunk == 0;
  const auto steps = [](int64_t size, int64_t stride) { return size <= 1 || stride % kSinkChunk == 0; };
  plan.held_aligned =
      chunks && is_aligned16(p.sink_k) && is_aligned16(p.sink_v) && is_aligned16(p.ring_k) && is_aligned16(p.ring_v);
  plan.new_aligned = chunks && is_aligned16(p.k) && is_aligned16(p.v) && steps(p.batch, p.k_stride_b) &&
                     steps(p.batch, p.v_stride_b) && steps(p.width, p.k_stride_t) && steps(p.width, p.v_stride_t) &&
                     steps(p.kv_heads, p.k_stride_h) && steps(p.kv_heads, p.v_stride_h);
  return plan;
}

/// Floats of scratch: for every row and share the sums of the values, the largest score and the sum of the weights.
inline int64_t sink_scratch_floats(const SinkAttentionStepParams& p) {
  return p.batch * p.width * p.heads * sink_plan(p).splits * Shares::floats(p.dv);
}

}  // namespace subquad::cuda
