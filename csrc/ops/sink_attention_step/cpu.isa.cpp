// A streaming cache's step for one CPU instruction set.
#include "ops/sink_attention_step/cpu.h"

#include <type_traits>

#include "ops/sink_attention_step/cpu_attend.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using namespace sink;

/// The tables at the beginning of `shared`, and how many floats they take.
template <class T, class E>
Tables tables_of(const SinkAttentionStepParams& p, float* shared) {
  return {shared, kIntegers<T, E> ? reinterpret_cast<int16_t*>(shared + table_size(p)) : nullptr};
}

template <class T, class E>
int64_t table_floats(const SinkAttentionStepParams& p) {
  return round_up(table_size(p) + (kIntegers<T, E> ? table_size(p) / 2 : 0), 16);
}

template <class T, class E>
int64_t shared_floats(const SinkAttentionStepParams& p) {
  if (p.heads == 0) return 0;
  const int64_t ranges = ranges_of(p), shares = ranges > 1 ? p.batch * p.kv_heads * ranges * rows_of(p) : 0;
  return table_floats<T, E>(p) + shares * share_floats(p);
}

template <class T, class E>
void prepare(const SinkAttentionStepParams& p, float* shared) {
  const int64_t half = p.rotary / 2, size = table_size(p);
  const Tables tables = tables_of<T, E>(p, shared);
  if (size == 0) return;
  for (int64_t j = 0; j < kTile; ++j) {
    float* cos = tables.floats + j * p.rotary;
    rotation(p.turns, half, j, cos, cos + half);
  }
  if (tables.shorts == nullptr) return;
  for (int64_t i = 0; i < size; i += kLanes) shorts_store(tables.shorts + i, vec_load(tables.floats + i) * kTableOne);
}

int64_t items(const SinkAttentionStepParams& p) { return p.batch * p.kv_heads * blocks_of(p) * ranges_of(p); }

/// The shares of row `row` of head `head`, in range 0.
template <class T, class E>
float* shares_of(const SinkAttentionStepParams& p, float* shared, int64_t head, int64_t row) {
  return shared + table_floats<T, E>(p) + (head * ranges_of(p) * rows_of(p) + row) * share_floats(p);
}

template <class T, class E>
int64_t scratch_bytes(const SinkAttentionStepParams& p) {
  return Attention<T, E>(p, {}, Arena(nullptr)).bytes();
}

template <class T, class E>
void attend(const SinkAttentionStepParams& p, float* shared, int64_t item, void* scratch) {
  const int64_t ranges = ranges_of(p), range = item % ranges, block = item / ranges % blocks_of(p);
  const int64_t head = item / ranges / blocks_of(p);
  float* shares = ranges == 1 ? nullptr : shares_of<T, E>(p, shared, head, range * rows_of(p) + block * kRows);
  Attention<T, E>(p, tables_of<T, E>(p, shared), Arena(scratch))
      .run(head / p.kv_heads, head % p.kv_heads, block, range, shares);
}

int64_t merges(const SinkAttentionStepParams& p) { return ranges_of(p) > 1 ? p.batch * p.kv_heads : 0; }

template <class T, class E>
void merge(const SinkAttentionStepParams& p, const float* shared, int64_t head) {
  const int64_t rows = rows_of(p), range_floats = rows * share_floats(p);
  for (int64_t row = 0; row < rows; ++row)
    finish_row<T>(p, head / p.kv_heads, head % p.kv_heads, row,
                  shares_of<T, E>(p, const_cast<float*>(shared), head, row), range_floats, ranges_of(p));
}

/// Row `at` of a ring, and its scale if it has one.
template <class T, class E>
void store_place(const float* x, int64_t n, E* ring, float* scales, int64_t at) {
  if constexpr (std::is_same_v<T, E>) {
    store_row(x, n, ring + at * n);
  } else {
    scales[at] = quantise(x, n, ring + at * n);
  }
}

template <class T, class E>
void write(const SinkAttentionStepParams& p, int64_t head) {
  const int64_t b = head / p.kv_heads, h = head % p.kv_heads, half = p.rotary / 2;
  const int64_t before = tokens_before(p, b), count = new_tokens(p, b);
  float k[kSinkMaxDim], v[kSinkMaxDim], cos[kSinkMaxDim / 2], sin[kSinkMaxDim / 2];
  for (int64_t t = 0; t < count; ++t) {
    const int64_t token = before + t;
    if (token >= p.sinks && t + p.ring < count) continue;  // a later one comes into this place
    widen_row(static_cast<const T*>(p.k) + b * p.k_stride_b + t * p.k_stride_t + h * p.k_stride_h, p.d, k);
    widen_row(static_cast<const T*>(p.v) + b * p.v_stride_b + t * p.v_stride_t + h * p.v_stride_h, p.dv, v);
    if (p.rotated && half > 0) {
      rotation(p.turns, half, token, cos, sin);
      rotate_row(k, p.interleaved, cos, sin, half);
    }
    if (token < p.sinks) {
      const int64_t at = head * p.sinks + token;
      store_row(k, p.d, static_cast<T*>(p.sink_k) + at * p.d);
      store_row(v, p.dv, static_cast<T*>(p.sink_v) + at * p.dv);
    } else {
      const int64_t at = head * p.ring + (token - p.sinks) % p.ring;
      store_place<T>(k, p.d, static_cast<E*>(p.ring_k), p.k_scale, at);
      store_place<T>(v, p.dv, static_cast<E*>(p.ring_v), p.v_scale, at);
    }
  }
}

template <class T, class E>
SinkAttentionStepKernels kernels() {
  return {shared_floats<T, E>, prepare<T, E>, scratch_bytes<T, E>, items,
          attend<T, E>,        merges,        merge<T, E>,         write<T, E>};
}

}  // namespace

SinkAttentionStepKernels sink_attention_step_kernels(DType dtype, RingKind kind) {
  return by_dtype<BFloat16, Half>(dtype, [&]<class T>(T) -> SinkAttentionStepKernels {
    switch (kind) {
      case RingKind::kInt8:
        return kernels<T, Int8>();
      case RingKind::kFloat8:
        return kernels<T, Float8>();
      default:
        return kernels<T, T>();
    }
  });
}

}  // namespace subquad::cpu::SUBQUAD_ISA
