// Gated linear attention token by token, with the state in registers: for few tokens, and for one in place. Exact for
// any gate, since every decay multiplies the state it belongs to. Forward only.
#pragma once

#include "cuda/chunk.cuh"
#include "cuda/portable.cuh"
#include "ops/gated_linear_attention/cuda_step.cuh"
#include "ops/gated_linear_attention/params.h"

namespace subquad::cuda {

constexpr int kWalkThreads = 128;
constexpr int kWalkWarps = kWalkThreads / kWarp;
constexpr int kWalkRows = kWalkThreads / kStepLanes;  // channels that the block holds at once
constexpr int kWalkTokens = 4;                        // tokens that are loaded together
constexpr int kWalkHeads = 4;                         // query heads of a block

/// e^g of one token, state head and channel; 1 without a gate.
template <class T>
__device__ __forceinline__ float gate_decay(const void* g, bool is_float, int64_t at) {
  return expf(is_float ? sq::load_nc(static_cast<const float*>(g) + at)
                       : sq::to_float(sq::load_nc(static_cast<const T*>(g) + at)));
}

/// The head of a tensor with `heads` (0: there is none) that state head s reads. Divisions of 32 bits throughout: those
/// of 64 are calls, around which registers are spilled.
__device__ __forceinline__ int64_t shared_head(int64_t s, int64_t heads, int64_t states) {
  return static_cast<unsigned>(s) * static_cast<unsigned>(heads) / static_cast<unsigned>(states);
}

/// One sequence, state head, `kWalkHeads` of its query heads and `kStepTile` columns of the values. kRows: channels of
/// a thread, each with four columns of the state.
template <class T, int kRows, bool kAligned>
__global__ void __launch_bounds__(kWalkThreads)
    gated_linear_walk_kernel(const GatedLinearAttentionParams p, unsigned columns, unsigned head_groups) {
  constexpr int kChannels = kRows * kWalkRows, kOwn = (kChannels + kWalkThreads - 1) / kWalkThreads;
  SQ_SHARED(float, key, kWalkTokens* kChannels);
  SQ_SHARED(float, decay, kWalkTokens* kChannels);
  SQ_SHARED(float, query, kWalkTokens * kWalkHeads * kChannels);
  SQ_SHARED(float, value, kWalkTokens* kStepTile);
  SQ_SHARED(float, totals, kWalkTokens * kWalkHeads * kWalkWarps);
  SQ_SHARED(float, parts, kWalkTokens * kWalkWarps * kWalkHeads * kStepTile);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int row = thread / kStepLanes, quad = lane % kStepLanes * kStepQuad;
  const int dk = static_cast<int>(p.dk), dv = static_cast<int>(p.dv);
  const unsigned unit = blockIdx.x / columns, head_group = unit % head_groups, states = static_cast<unsigned>(p.states);
  const int64_t n = unit / head_groups / states, s = unit / head_groups % states;
  const int64_t per_state = static_cast<unsigned>(p.q.heads) / states;
  const int base = static_cast<int>(blockIdx.x % columns) * kStepTile, col = base + quad;
  const int64_t head = s * per_state + head_group * kWalkHeads, left = per_state - head_group * kWalkHeads;
  const int heads = static_cast<int>(left < kWalkHeads ? left : kWalkHeads);
  const bool normalized = p.den != nullptr;

  int64_t b = n, begin = 0, end = p.tokens;
  if (p.cu_seqlens != nullptr) {
    b = 0;
    begin = clamp(sq::load_nc(p.cu_seqlens + n), 0, p.tokens);
    end = clamp(sq::load_nc(p.cu_seqlens + n + 1), begin, p.tokens);
  }
  const int64_t state_at = (n * p.states + s) * dk * dv, z_at = (n * p.states + s) * dk;

  float state[kRows][kStepQuad] = {}, z[kOwn] = {};
  if (p.s0 != nullptr) {
    SQ_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int c = row + i * kWalkRows;
      to_floats(
          load_chunk<Reuse::kKeep, kAligned, kStepQuad>(p.s0 + state_at + int64_t{c} * dv + col, c < dk ? dv - col : 0),
          state[i]);
    }
  }
  if (p.z0 != nullptr) {
    SQ_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      const int c = thread + i * kWalkThreads;
      if (c < dk) z[i] = sq::load_nc(p.z0 + z_at + c);
    }
  }

  const T* k = static_cast<const T*>(p.k.data) + b * p.k.stride_b + shared_head(s, p.k.heads, p.states) * p.k.stride_h;
  const T* v = static_cast<const T*>(p.v.data) + b * p.v.stride_b + shared_head(s, p.v.heads, p.states) * p.v.stride_h;
  const T* q = static_cast<const T*>(p.q.data) + b * p.q.stride_b + head * p.q.stride_h;
  const int64_t gate = b * p.g.stride_b + shared_head(s, p.g.heads, p.states) * p.g.stride_h;

  for (int64_t first = begin; first < end; first += kWalkTokens) {
    const int count = static_cast<int>(end - first < kWalkTokens ? end - first : kWalkTokens);
    // Rows of the next tokens, and z, which every block of columns walks by itself.
    SQ_UNROLL
    for (int t = 0; t < kWalkTokens; ++t) {
      if (t >= count) continue;
      float dots[kWalkHeads] = {};
      SQ_UNROLL
      for (int i = 0; i < kOwn; ++i) {
        const int c = thread + i * kWalkThreads;
        if (c >= dk) continue;
        const float x = sq::to_float(sq::load_nc(k + (first + t) * p.k.stride_t + c));
        float a = 1.0f;
        if (p.gate != GateKind::kNone) {
          const int64_t at = gate + (first + t) * p.g.stride_t + (p.gate == GateKind::kChannel ? c : 0);
          a = gate_decay<T>(p.g.data, p.gate_is_float, at);
        }
        key[t * kChannels + c] = x;
        decay[t * kChannels + c] = a;
        z[i] = fmaf(a, z[i], x);
        SQ_UNROLL
        for (int h = 0; h < kWalkHeads; ++h) {
          if (h >= heads) continue;
          const float y = p.scale * sq::to_float(sq::load_nc(q + (first + t) * p.q.stride_t + h * p.q.stride_h + c));
          query[(t * kWalkHeads + h) * kChannels + c] = y;
          dots[h] = fmaf(y, z[i], dots[h]);
        }
      }
      SQ_UNROLL
      for (int h = 0; h < kWalkHeads; ++h) {
        const float sum = warp_sum(dots[h]);
        if (lane == 0) totals[(t * kWalkHeads + h) * kWalkWarps + warp] = sum;
      }
    }
    const int t_own = thread / kStepTile, column = base + thread % kStepTile;
    static_assert(kWalkThreads == kWalkTokens * kStepTile, "a thread loads one value");
    if (t_own < count) {
      value[thread] = column < dv ? sq::to_float(sq::load_nc(v + (first + t_own) * p.v.stride_t + column)) : 0.0f;
    }
    __syncthreads();
    for (int t = 0; t < count; ++t) {
      float acc[kWalkHeads][kStepQuad] = {}, x[kStepQuad];
      SQ_UNROLL
      for (int j = 0; j < kStepQuad; ++j) x[j] = value[t * kStepTile + quad + j];
      SQ_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const int c = row + i * kWalkRows;
        if (c >= dk) continue;
        const float a = decay[t * kChannels + c], y = key[t * kChannels + c];
        SQ_UNROLL
        for (int j = 0; j < kStepQuad; ++j) state[i][j] = fmaf(y, x[j], a * state[i][j]);
        SQ_UNROLL
        for (int h = 0; h < kWalkHeads; ++h) {
          if (h >= heads) continue;
          const float w = query[(t * kWalkHeads + h) * kChannels + c];
          SQ_UNROLL
          for (int j = 0; j < kStepQuad; ++j) acc[h][j] = fmaf(w, state[i][j], acc[h][j]);
        }
      }
      SQ_UNROLL
      for (int h = 0; h < kWalkHeads; ++h) {
        if (h >= heads) continue;
        SQ_UNROLL
        for (int j = 0; j < kStepQuad; ++j) {
          const float sum = column_sum(acc[h][j]);
          if (lane < kStepLanes) parts[((t * kWalkWarps + warp) * kWalkHeads + h) * kStepTile + quad + j] = sum;
        }
      }
    }
    __syncthreads();
    if (t_own < count && column < dv) {
      for (int h = 0; h < heads; ++h) {
        float sum = 0.0f, total = 0.0f;
        SQ_UNROLL
        for (int w = 0; w < kWalkWarps; ++w) {
          sum += parts[((t_own * kWalkWarps + w) * kWalkHeads + h) * kStepTile + thread % kStepTile];
          total += totals[(t_own * kWalkHeads + h) * kWalkWarps + w];
        }
        const int64_t at = (b * p.tokens + first + t_own) * p.q.heads + head + h;
        sq::store(static_cast<T*>(p.o) + at * dv + column, sq::from_float<T>(normalized ? sum / (total + p.eps) : sum));
        if (normalized && column == 0) sq::store(p.den + at, total);
      }
    }
    __syncthreads();  // the next tokens overwrite the totals
  }

  if (head_group != 0) return;
  SQ_UNROLL
  for (int i = 0; i < kRows; ++i) {
    const int c = row + i * kWalkRows;
    if (c < dk) store_chunk<kAligned>(p.s + state_at + int64_t{c} * dv + col, dv - col, state[i]);
  }
  if (p.z == nullptr || base != 0) return;
  SQ_UNROLL
  for (int i = 0; i < kOwn; ++i) {
    const int c = thread + i * kWalkThreads;
    if (c < dk) sq::store(p.z + z_at + c, z[i]);
  }
}

/// One row and state head: all columns, since z is updated in place and nobody else may read it.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kStepThreads) gated_linear_step_kernel(const GlaStepParams p) {
  SQ_SHARED(float, key, kStepWidth);
  SQ_SHARED(float, decay, kStepWidth);
  SQ_SHARED(float, value, kStepWidth);
  SQ_SHARED(float, query, kStepHeads* kStepWidth);
  SQ_SHARED(float, totals, kStepHeads* kStepWarps);
  SQ_SHARED(float, parts, kStepWarps * kStepHeads * kStepWidth);
  const int c = static_cast<int>(threadIdx.x), dk = static_cast<int>(p.dk), dv = static_cast<int>(p.dv);
  const int states = static_cast<int>(p.states), per_state = static_cast<int>(p.q_heads) / states;
  const int64_t b = blockIdx.x / static_cast<unsigned>(states);
  const int s = static_cast<int>(blockIdx.x % static_cast<unsigned>(states));
  const int64_t slot = p.state_indices == nullptr ? b : sq::load_nc(p.state_indices + b);
  const int64_t head = b * p.q_heads + s * per_state;
  T* out = static_cast<T*>(p.o) + head * dv;
  if (slot < 0 || slot >= p.pool) {
    for (int i = c; i < per_state * dv; i += kStepThreads) sq::store(out + i, sq::from_float<T>(0.0f));
    return;
  }
  float z = 0.0f;
  if (c < dk) {
    const float x = sq::to_float(
        sq::load_nc(static_cast<const T*>(p.k) + (b * p.k_heads + shared_head(s, p.k_heads, p.states)) * dk + c));
    float a = 1.0f;
    if (p.gate != GateKind::kNone) {
      const int64_t gate = b * p.g_heads + shared_head(s, p.g_heads, p.states);
      a = gate_decay<T>(p.g, p.gate_is_float, p.gate == GateKind::kChannel ? gate * dk + c : gate);
    }
    key[c] = x;
    decay[c] = a;
    if (p.z != nullptr) {
      float* own = p.z + (slot * p.states + s) * dk + c;
      z = fmaf(a, sq::load(own), x);
      sq::store(own, z);
    }
  }
  if (c < dv) {
    const int64_t at = (b * p.v_heads + shared_head(s, p.v_heads, p.states)) * dv + c;
    value[c] = sq::to_float(sq::load_nc(static_cast<const T*>(p.v) + at));
  }
  float* state = p.s + (slot * p.states + s) * dk * dv;
  for (int first = 0; first < per_state; first += kStepHeads) {
    const int heads = per_state - first < kStepHeads ? per_state - first : kStepHeads;
    __syncthreads();  // the last heads' totals may still be being read
    for (int h = 0; h < heads; ++h) {
      float y = 0.0f;
      if (c < dk) {
        y = p.scale * sq::to_float(sq::load_nc(static_cast<const T*>(p.q) + (head + first + h) * dk + c));
        query[h * kStepWidth + c] = y;
      }
      const float sum = warp_sum(c < dk ? y * z : 0.0f);
      if (c % kWarp == 0) totals[h * kStepWarps + c / kWarp] = sum;
    }
    __syncthreads();
    if (first == 0) {
      step_state<kAligned, true>(state, dk, dv, key, decay, value, query, kStepWidth, heads, parts);
    } else {
      step_state<kAligned, false>(state, dk, dv, key, decay, value, query, kStepWidth, heads, parts);
    }
    __syncthreads();
    step_outputs(parts, p.z == nullptr ? nullptr : totals, heads, dv, p.eps, out + first * dv);
  }
}

inline bool states_aligned(const void* s, int64_t dv) { return is_aligned16(s) && dv % kStepQuad == 0; }

template <class T>
void gated_linear_attention_forward(const GatedLinearAttentionParams& p, sq::stream_t stream) {
  if (p.sequences == 0) return;
  const auto columns = static_cast<unsigned>(ceil_div(p.dv, kStepTile));
  const auto groups = static_cast<unsigned>(larger(ceil_div(p.q.heads / p.states, kWalkHeads), 1));  // 1: of no queries
  const int64_t blocks = p.sequences * p.states * groups * columns;
  const bool aligned = states_aligned(p.s, p.dv) && (p.s0 == nullptr || is_aligned16(p.s0));
  with_flag(aligned, [&](auto flag) {
    const auto walk = [&](auto rows) {
      SQ_LAUNCH((gated_linear_walk_kernel<T, decltype(rows)::value, decltype(flag)::value>), blocks, kWalkThreads, 0,
                stream, p, columns, groups);
    };
    if (p.dk <= 4 * kWalkRows) return walk(std::integral_constant<int, 4>{});
    if (p.dk <= 8 * kWalkRows) return walk(std::integral_constant<int, 8>{});
    walk(std::integral_constant<int, 16>{});
  });
}

template <class T>
void gated_linear_attention_step(const GlaStepParams& p, sq::stream_t stream) {
  if (p.batch == 0) return;
  with_flag(states_aligned(p.s, p.dv), [&](auto flag) {
    SQ_LAUNCH((gated_linear_step_kernel<T, decltype(flag)::value>), p.batch * p.states, kStepThreads, 0, stream, p);
  });
}

}  // namespace subquad::cuda
