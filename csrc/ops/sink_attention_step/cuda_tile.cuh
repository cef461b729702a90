// Keys and values of a streaming cache on their way into the sums of a block's query rows.
#pragma once

#include "common/exp.h"
#include "ops/sink_attention_step/cuda_parts.cuh"

namespace subquad::cuda {

/// Where rows of keys and values lie that follow each other in the sequence: the n-th from a token on in place
/// start + n, or `wrap` places before that where that is none.
template <class S>
struct SinkSource {
  const S* keys;
  const S* values;
  int64_t key_step, value_step;
  const float* key_scales;  // where S has them
  const float* value_scales;
  int64_t wrap;
  bool aligned;
};

/// What a lane is to its warp: element `sub` * kSinkChunk on of key `unit` of `units`.
struct SinkLane {
  int sub, unit, units, warp;
};

/// Keys of a lane that are under way together, and their values.
template <class S>
struct SinkBatch {
  static constexpr int kDepth = 2;
  SinkChunk<S> k[kDepth], v[kDepth];
  float k_scale[kDepth], v_scale[kDepth];
};

/// What a lane found: of every row its columns of the values' sum, the largest score and the sum of the weights.
template <int kRows>
struct SinkSums {
  float acc[kRows][kSinkChunk], top[kRows], sum[kRows];
};

/// What a block's shared memory holds while it walks keys.
struct SinkShared {
  float* query;             // [2][kRows][width]: rotated rows, and what the sine of a key's turn multiplies
  float* table;             // [2][kSinkTile][width]: cosines and sines of the first turns, for every element
  const unsigned* visible;  // [kRows]: bit n for key n of the tile
  int width;
};

/// Element c of a head in shared memory: lanes that read the first or the second halves of their chunks touch
/// neighbouring quads.
__device__ __forceinline__ int sink_slot(int c, int width) {
  return (c & 4 ? width / 2 : 0) + c / kSinkChunk * 4 + (c & 3);
}

__device__ __forceinline__ sq::Vec<float, 4> shared_quad(const float* p) {
  return *reinterpret_cast<const sq::Vec<float, 4>*>(p);
}

/// The key of a tile that a lane takes in a step.
__device__ __forceinline__ int key_of_step(const SinkLane& lane, int step) {
  return (step * kSinkWarps + lane.warp) * lane.units + lane.unit;
}

template <class S>
__device__ __forceinline__ SinkBatch<S> load_batch(const SinkAttentionStepParams& p, const SinkSource<S>& from,
                                                   const SinkLane& lane, int64_t start, int keys, int step) {
  SinkBatch<S> batch;
  const int c = lane.sub * kSinkChunk;
  int64_t place[SinkBatch<S>::kDepth];
  int k_count[SinkBatch<S>::kDepth], v_count[SinkBatch<S>::kDepth];
  SQ_UNROLL
  for (int u = 0; u < SinkBatch<S>::kDepth; ++u) {
    const int key = key_of_step(lane, step + u);
    const bool live = key < keys;
    place[u] = start + key < from.wrap ? start + key : start + key - from.wrap;
    k_count[u] = live ? static_cast<int>(p.d) - c : 0;
    v_count[u] = live ? static_cast<int>(p.dv) - c : 0;
    if constexpr (kScaled<S>) {
      batch.k_scale[u] = live ? sq::load_nc(from.key_scales + place[u]) : 1.0f;
      batch.v_scale[u] = live ? sq::load_nc(from.value_scales + place[u]) : 1.0f;
    }
  }
  const auto load = [&](auto aligned) {
    constexpr bool kAligned = decltype(aligned)::value;
    SQ_UNROLL
    for (int u = 0; u < SinkBatch<S>::kDepth; ++u) {
      batch.k[u] = load_sink_chunk<kAligned>(from.keys + place[u] * from.key_step + c, k_count[u]);
      batch.v[u] = load_sink_chunk<kAligned>(from.values + place[u] * from.value_step + c, v_count[u]);
    }
  };
  if (from.aligned) {
    load(std::true_type{});
  } else {
    load(std::false_type{});
  }
  return batch;
}

/// Adds the keys of a batch to the sums. `turned`: key n of the tile is rotated by n more. With (q1, q2) a pair of the
/// query and (k1, k2) one of the key, <q, R(n) k> = cos (q1 k1 + q2 k2) + sin (q2 k1 - q1 k2): every element of the key
/// has one factor of the cosine and one of the sine, wherever its partner lies.
template <int kRows, class S>
__device__ __forceinline__ void add_batch(const SinkBatch<S>& batch, const SinkLane& lane, const SinkShared& shared,
                                          int rows, int step, bool turned, float scale, SinkSums<kRows>& sums) {
  constexpr int kDepth = SinkBatch<S>::kDepth;
  const int width = shared.width;
  float scores[kRows][kDepth] = {};
  SQ_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int quad = half * width / 2 + lane.sub * 4;
    float k[kDepth][4], across[kDepth][4];
    SQ_UNROLL
    for (int u = 0; u < kDepth; ++u) {
      to_floats(batch.k[u], half, k[u]);
      if (!turned) continue;
      const float* turn = shared.table + key_of_step(lane, step + u) % kSinkTile * width + quad;
      const auto cos = shared_quad(turn), sin = shared_quad(turn + kSinkTile * width);
      SQ_UNROLL
      for (int e = 0; e < 4; ++e) across[u][e] = k[u][e] * sin.v[e], k[u][e] *= cos.v[e];
    }
    SQ_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (i >= rows) continue;
      const auto q = shared_quad(shared.query + i * width + quad);
      SQ_UNROLL
      for (int u = 0; u < kDepth; ++u) {
        SQ_UNROLL
        for (int e = 0; e < 4; ++e) scores[i][u] = fmaf(q.v[e], k[u][e], scores[i][u]);
      }
      if (!turned) continue;
      const auto partner = shared_quad(shared.query + (kRows + i) * width + quad);
      SQ_UNROLL
      for (int u = 0; u < kDepth; ++u) {
        SQ_UNROLL
        for (int e = 0; e < 4; ++e) scores[i][u] = fmaf(partner.v[e], across[u][e], scores[i][u]);
      }
    }
  }
  for (int offset = kWarp / lane.units / 2; offset > 0; offset /= 2) {
    SQ_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (i >= rows) continue;
      SQ_UNROLL
      for (int u = 0; u < kDepth; ++u) scores[i][u] += __shfl_xor_sync(kFullWarp, scores[i][u], offset);
    }
  }
  const auto sees = [&](int i, int u) {
    const int key = key_of_step(lane, step + u);
    return key < kSinkTile && (shared.visible[i] >> key & 1u) != 0;
  };
  SQ_UNROLL
  for (int i = 0; i < kRows; ++i) {
    if (i >= rows) continue;
    float top = sums.top[i];
    SQ_UNROLL
    for (int u = 0; u < kDepth; ++u) {
      const float score = scores[i][u] * (kScaled<S> ? batch.k_scale[u] * scale : scale);
      scores[i][u] = !sees(i, u) ? -INFINITY : fabsf(score) < INFINITY ? score : NAN;
      top = fmaxf(top, scores[i][u]);
    }
    const float shift = top == -INFINITY ? 0.0f : top, factor = exp2f((sums.top[i] - shift) * kLog2e);
    float sum = sums.sum[i] * factor;
    SQ_UNROLL
    for (int u = 0; u < kDepth; ++u) {
      scores[i][u] = exp2f((scores[i][u] - shift) * kLog2e);
      sum += scores[i][u];
    }
    sums.top[i] = top, sums.sum[i] = sum;
    SQ_UNROLL
    for (int e = 0; e < kSinkChunk; ++e) sums.acc[i][e] *= factor;
  }
  SQ_UNROLL
  for (int half = 0; half < 2; ++half) {
    SQ_UNROLL
    for (int u = 0; u < kDepth; ++u) {
      float v[4];
      to_floats(batch.v[u], half, v);
      SQ_UNROLL
      for (int e = 0; e < 4; ++e) v[e] = kScaled<S> ? v[e] * batch.v_scale[u] : v[e];
      SQ_UNROLL
      for (int i = 0; i < kRows; ++i) {
        if (i >= rows || !sees(i, u)) continue;
        SQ_UNROLL
        for (int e = 0; e < 4; ++e) {
          float& sum = sums.acc[i][half * 4 + e];
          sum = fmaf(scores[i][u], v[e], sum);
        }
      }
    }
  }
}

}  // namespace subquad::cuda
