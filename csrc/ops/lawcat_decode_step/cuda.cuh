// LAWCAT's decoding step in one launch. A block takes one raw key head of one row with all states and queries that hang
// on it, so that nobody else reads what it changes in place: warps convolve and map heads, each its own, then the block
// streams one state after the other.
#pragma once

#include "cuda/chunk.cuh"
#include "cuda/portable.cuh"
#include "ops/gated_linear_attention/cuda_step.cuh"
#include "ops/lawcat_decode_step/params.h"

namespace subquad::cuda {

constexpr int kDecodePasses = 4;              // over states, whose heads are mapped together
constexpr int kDecodeUnits = 1 + kStepHeads;  // heads of a pass: the key, then its queries
constexpr int kDecodeSlots = 4;               // columns of a map that a lane owns, 32 apart
static_assert(kDecodeSlots * kWarp * 2 == kDecodeMaxDim && kDecodeMaxDim == kStepWidth);

/// Floats of shared memory: inputs of the maps by warp, features by unit, decay and value, totals, the warps' outputs.
inline int64_t decode_shared_floats(const LawcatDecodeStepParams& p) {
  return kStepWarps * p.d + kDecodePasses * kDecodeUnits * 2 * p.f + 2 * p.f + p.dv + kStepHeads * kStepWarps +
         kStepWarps * kStepHeads * p.dv;
}

/// One head by one warp: x[0 .. d) = act(bias + taps of [past, token]); `moves`: the token enters the past.
template <class T>
__device__ __forceinline__ void convolve_head(const LawcatDecodeStepParams& p, const T* token, const T* weight,
                                              const T* bias, T* past, bool moves, float* x) {
  const int d = static_cast<int>(p.d), taps = p.taps;
  for (int c = static_cast<int>(threadIdx.x) % kWarp; c < d; c += kWarp) {
    const T now = sq::load_nc(token + c);
    T* line = past + int64_t{c} * (taps - 1);
    float sum = bias == nullptr ? 0.0f : sq::to_float(sq::load_nc(bias + c));
    for (int j = 0; j < taps - 1; ++j) {
      const T before = sq::load(line + j);
      sum = fmaf(sq::to_float(sq::load_nc(weight + int64_t{c} * taps + j)), sq::to_float(before), sum);
      if (moves && j > 0) sq::store(line + j - 1, before);
    }
    if (moves && taps > 1) sq::store(line + taps - 2, now);
    sum = fmaf(sq::to_float(sq::load_nc(weight + int64_t{c} * taps + taps - 1)), sq::to_float(now), sum);
    x[c] = p.silu ? sum / (1.0f + expf(-sum)) : sum;
  }
}

/// phi[0 .. 2 f) = factor max([softmax(y), softmax(-y)], eps), y = x weight, by one warp.
template <class T>
__device__ __forceinline__ void map_head(const LawcatDecodeStepParams& p, const float* x, const T* weight, float factor,
                                         float* phi) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, d = static_cast<int>(p.d), f = static_cast<int>(p.f);
  float y[kDecodeSlots] = {};
  SQ_UNROLL
  for (int i = 0; i < kDecodeSlots; ++i) {
    const int j = lane + i * kWarp;
    if (j >= f) continue;
    const T* column = weight + j;
    constexpr int kDepth = 8;  // loads under way together
    float sum = 0.0f;
    int c = 0;
    for (; c + kDepth <= d; c += kDepth) {
      T w[kDepth];
      SQ_UNROLL
      for (int n = 0; n < kDepth; ++n) w[n] = sq::load_nc(column + int64_t{c + n} * f);
      SQ_UNROLL
      for (int n = 0; n < kDepth; ++n) sum = fmaf(x[c + n], sq::to_float(w[n]), sum);
    }
    for (; c < d; ++c) sum = fmaf(x[c], sq::to_float(sq::load_nc(column + int64_t{c} * f)), sum);
    y[i] = sum;
  }
  SQ_UNROLL
  for (int half = 0; half < 2; ++half) {
    float top = -INFINITY, total = 0.0f, e[kDecodeSlots];
    SQ_UNROLL
    for (int i = 0; i < kDecodeSlots; ++i) {
      e[i] = lane + i * kWarp < f ? (half == 0 ? y[i] : -y[i]) : -INFINITY;
      top = fmaxf(top, e[i]);
    }
    top = warp_max(top);
    SQ_UNROLL
    for (int i = 0; i < kDecodeSlots; ++i) {
      e[i] = lane + i * kWarp < f ? expf(e[i] - top) : 0.0f;
      total += e[i];
    }
    total = warp_sum(total);
    SQ_UNROLL
    for (int i = 0; i < kDecodeSlots; ++i) {
      const int j = lane + i * kWarp;
      const float value = e[i] / total;
      if (j < f) phi[half * f + j] = factor * (value < p.fm_eps ? p.fm_eps : value);
    }
  }
}

/// exp(max(logsigmoid(u) / tau, clamp_min)) of a state head and channel.
template <class T>
__device__ __forceinline__ float decode_decay(const LawcatDecodeStepParams& p, int64_t b, int64_t s, int c) {
  if (p.gate == GateKind::kNone) return 1.0f;
  int64_t at = b * p.g_heads + s * p.g_heads / p.states;
  if (p.gate == GateKind::kChannel) at = at * 2 * p.f + c;
  const float u = p.gate_is_float ? sq::load_nc(static_cast<const float*>(p.u) + at)
                                  : sq::to_float(sq::load_nc(static_cast<const T*>(p.u) + at));
  const float g = ((u > 0.0f ? 0.0f : u) - log1pf(expf(-fabsf(u)))) / p.tau;
  return expf(g < p.clamp_min ? p.clamp_min : g);
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kStepThreads, kAligned ? 2 : 1)
    lawcat_decode_step_kernel(const LawcatDecodeStepParams p) {
  SQ_DYNAMIC_SHARED(float, shared);
  const int d = static_cast<int>(p.d), f = static_cast<int>(p.f), keys = 2 * f, dv = static_cast<int>(p.dv);
  float* const features = shared + kStepWarps * d;  // [pass][unit][keys]
  float* const decay = features + kDecodePasses * kDecodeUnits * keys;
  float* const value = decay + keys;
  float* const totals = value + dv;
  float* const parts = totals + kStepHeads * kStepWarps;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
  const int64_t b = blockIdx.x % p.batch, key_head = blockIdx.x / p.batch;  // rows of a head share its weights
  const int64_t per_head = p.states / p.k_heads, per_state = p.q_heads / p.states;
  const int64_t slot = p.state_indices == nullptr ? b : sq::load_nc(p.state_indices + b);
  if (slot < 0 || slot >= p.pool) {
    const int64_t n = per_head * per_state * dv;
    T* out = static_cast<T*>(p.o) + b * p.q_heads * dv + key_head * n;
    for (int64_t i = thread; i < n; i += kStepThreads) sq::store(out + i, sq::from_float<T>(0.0f));
    return;
  }
  const int64_t past = p.d * (p.taps - 1), filter = p.d * p.taps, map = p.d * p.f;
  const auto at = [](const void* base, int64_t offset) {
    return base == nullptr ? nullptr : static_cast<const T*>(base) + offset;
  };
  T* const conv_k = static_cast<T*>(p.conv_k) + (slot * p.k_heads + key_head) * past;
  const T* const raw_key = at(p.k, (b * p.k_heads + key_head) * d);

  // A pass is a state with up to kStepHeads of its queries.
  const int64_t per_pass = ceil_div(per_state, kStepHeads), passes = per_head * per_pass;
  float z = 0.0f;
  for (int64_t first = 0; first < passes; first += kDecodePasses) {
    const int count = static_cast<int>(passes - first < kDecodePasses ? passes - first : kDecodePasses);
    for (int unit = warp; unit < count * kDecodeUnits; unit += kStepWarps) {
      const int64_t pass = first + unit / kDecodeUnits, s = key_head * per_head + pass / per_pass;
      const int64_t query = pass % per_pass * kStepHeads + unit % kDecodeUnits - 1, h = s * per_state + query;
      const bool is_key = unit % kDecodeUnits == 0;
      if (is_key ? pass % per_pass != 0 : query >= per_state) continue;
      float* x = shared + warp * d;
      __syncwarp();  // the warp's last head has been mapped
      if (is_key) {
        convolve_head(p, raw_key, at(p.ck, s * filter), at(p.ck_bias, s * d), conv_k, false, x);
      } else {
        convolve_head(p, at(p.q, (b * p.q_heads + h) * d), at(p.cq, h * filter), at(p.cq_bias, h * d),
                      static_cast<T*>(p.conv_q) + (slot * p.q_heads + h) * past, true, x);
      }
      __syncwarp();
      const T* weight =
          is_key ? at(p.wphi_k, s * p.key_maps / p.states * map) : at(p.wphi, h * p.maps / p.q_heads * map);
      map_head(p, x, weight, is_key ? 1.0f : p.scale, features + unit * keys);
    }
    __syncthreads();
    for (int i = 0; i < count; ++i) {
      const int64_t pass = first + i, s = key_head * per_head + pass / per_pass;
      const int64_t query = pass % per_pass * kStepHeads;
      const int heads = static_cast<int>(per_state - query < kStepHeads ? per_state - query : kStepHeads);
      const bool starts = query == 0;
      const float* key = features + i * kDecodeUnits * keys;
      if (starts && thread < keys) {
        const float a = decode_decay<T>(p, b, s, thread);
        decay[thread] = a;
        if (p.z != nullptr) {
          float* own = p.z + (slot * p.states + s) * keys + thread;
          z = fmaf(a, sq::load(own), key[thread]);
          sq::store(own, z);
        }
      }
      if (starts && thread < dv) {
        value[thread] = sq::to_float(sq::load_nc(at(p.v, (b * p.v_heads + s * p.v_heads / p.states) * dv + thread)));
      }
      for (int h = 0; h < heads; ++h) {
        const float sum = warp_sum(thread < keys ? key[(1 + h) * keys + thread] * z : 0.0f);
        if (thread % kWarp == 0) totals[h * kStepWarps + warp] = sum;
      }
      __syncthreads();
      float* state = p.s + (slot * p.states + s) * keys * dv;
      if (starts) {
        step_state<kAligned, true>(state, keys, dv, key, decay, value, key + keys, keys, heads, parts);
      } else {
        step_state<kAligned, false>(state, keys, dv, key, decay, value, key + keys, keys, heads, parts);
      }
      __syncthreads();
      step_outputs(parts, p.z == nullptr ? nullptr : totals, heads, dv, p.eps,
                   static_cast<T*>(p.o) + (b * p.q_heads + s * per_state + query) * dv);
      __syncthreads();  // totals and features are free again
    }
  }
  // All states have seen the old keys.
  for (int c = thread; c < d && p.taps > 1; c += kStepThreads) {
    T* line = conv_k + int64_t{c} * (p.taps - 1);
    for (int j = 0; j + 2 < p.taps; ++j) sq::store(line + j, sq::load(line + j + 1));
    sq::store(line + p.taps - 2, sq::load_nc(raw_key + c));
  }
}

template <class T>
void lawcat_decode_step(const LawcatDecodeStepParams& p, sq::stream_t stream) {
  if (p.batch == 0) return;
  const bool aligned = is_aligned16(p.s) && p.dv % kStepQuad == 0;
  const auto bytes = static_cast<std::size_t>(decode_shared_floats(p)) * sizeof(float);
  with_flag(aligned, [&](auto flag) {
    SQ_LAUNCH((lawcat_decode_step_kernel<T, decltype(flag)::value>), p.batch * p.k_heads, kStepThreads, bytes, stream,
              p);
  });
}

}  // namespace subquad::cuda
