// Some consecutive queries against a range of stripes, far to near. One instruction set.
#pragma once

#include <type_traits>

#include "cpu/simd/arena.h"
#include "cpu/simd/dot.h"
#include "ops/span_search/cpu_best.h"

namespace subquad::cpu::SUBQUAD_ISA::stripes {

constexpr int64_t kQueries = 64;  // of an item: a stripe of theirs is so many rows of keys, one after the other

template <class T>
class StripeSearch {
  using X = typename Input<T>::Type;
  static constexpr int kStripes = 4;                   // stripes at once
  static constexpr int kHeads = kLanes == 16 ? 4 : 2;  // heads at once; bounded by registers

 public:
  StripeSearch(const SpanSearchParams& p, Arena arena)
      : p_(p),
        group_(p.heads / p.kv_heads),
        width_(round_up(p.d, kBlock)),
        q_(arena.take<X>(kQueries * group_ * width_)),
        zeros_(arena.take<T>(width_)),
        scores_(arena.take<float>(kStripes * group_)),
        best_(arena.take<Best>(kQueries * group_)),
        bytes_(arena.used()) {}

  int64_t bytes() const { return bytes_; }
  const Best& best(int64_t row) const { return best_[row]; }

  /// Stripes [begin, end) of queries [first, first + count); the results of row (query, head of the group) in `best`.
  void run(int64_t b, int64_t kv_head, int64_t first, int64_t count, int64_t begin, int64_t end) {
    b_ = b, kv_head_ = kv_head;
    std::memset(zeros_, 0, static_cast<size_t>(width_) * sizeof(T));
    int64_t farthest = 0;
    for (int64_t t = 0; t < count; ++t) {
      const int64_t token = b * p_.tokens + first + t;
      farthest = larger(farthest, p_.position[token] + int64_t{1} - larger(p_.first[token], 0));
      for (int64_t g = 0; g < group_; ++g) {
        best_[t * group_ + g].clear(p_.spans);
        pack(static_cast<const T*>(p_.q) + b * p_.q_stride_b + (first + t) * p_.q_stride_t +
                 (kv_head * group_ + g) * p_.q_stride_h,
             q_ + (t * group_ + g) * width_);
      }
    }
    while (end > begin && p_.offsets[end - 1] > farthest) --end;
    for (int64_t stripe = end; stripe > begin; stripe -= kStripes) {
      const int64_t low = larger(begin, stripe - kStripes);
      for (int64_t t = 0; t < count; ++t) add(b * p_.tokens + first + t, t, low, stripe);
    }
  }

 private:
  /// A query in the order of what it is multiplied with.
  void pack(const T* src, X* dst) const {
    if constexpr (std::is_same_v<X, float>) {
      std::memset(dst, 0, static_cast<size_t>(width_) * sizeof(X));
      for (int64_t i = 0; i < p_.d; ++i) dst[packed_index<T>(i)] = to_float(src[i]);
    } else {
      std::memset(static_cast<void*>(dst), 0, static_cast<size_t>(width_) * sizeof(X));
      std::memcpy(dst, src, static_cast<size_t>(p_.d) * sizeof(X));
    }
  }

  /// Key of a stripe of a query, or -1 where it cannot be chosen.
  int64_t key_of(int64_t token, int64_t stripe) const {
    const int64_t key = p_.position[token] + int64_t{1} - p_.offsets[stripe];
    if (key < larger(p_.first[token], 0) || key >= p_.keys) return -1;
    return p_.key_mask == nullptr || p_.key_mask[b_ * p_.keys + key] ? key : -1;
  }

  /// Stripes [low, high) of query t, at most kStripes: the farther ones come first.
  void add(int64_t token, int64_t t, int64_t low, int64_t high) {
    const T* rows[kStripes];
    int64_t keys[kStripes];
    bool any = false;
    for (int64_t i = 0; i < kStripes; ++i) {
      keys[i] = high - 1 - i >= low ? key_of(token, high - 1 - i) : -1;
      rows[i] = keys[i] < 0 ? zeros_ : static_cast<const T*>(p_.k) + row_offset(p_.keys_at, b_, keys[i], kv_head_);
      any |= keys[i] >= 0;
    }
    if (!any) return;
    multiply(rows, q_ + t * group_ * width_);
    Best* best = best_ + t * group_;
    for (int64_t i = 0; i < kStripes; ++i) {
      if (keys[i] < 0) continue;
      const auto anchor = static_cast<int32_t>(keys[i]);
      const float* scores = scores_ + i * group_;
      float sum = 0.0f;
      for (int64_t g = 0; p_.per_group && g < group_; ++g) sum += scores[g];
      for (int64_t g = 0; g < group_; ++g) best[g].offer(p_.spans, p_.per_group ? sum : scores[g], scores[g], anchor);
    }
  }

  /// scores_[stripe * group + head] = scale * row . query
  void multiply(const T* const* rows, const X* queries) {
    for (int64_t g = 0; g < group_;) {
      if (group_ - g >= kHeads) {
        multiply<kHeads>(rows, queries, g);
        g += kHeads;
      } else {
        multiply<1>(rows, queries, g);
        ++g;
      }
    }
  }

  template <int N>
  void multiply(const T* const* rows, const X* queries, int64_t g) {
    const X* x[N];
    for (int n = 0; n < N; ++n) x[n] = queries + (g + n) * width_;
    Vec sums[kStripes][N] = {};
    const T* at[kStripes];
    int64_t c = 0;
    for (; c + kBlock <= p_.d; c += kBlock) {
      for (int i = 0; i < kStripes; ++i) at[i] = rows[i] + c;
      dot_block<T, kStripes, N>(at, x, c, sums);
    }
    if (c < p_.d) {
      T last[kStripes][kBlock] = {};
      for (int i = 0; i < kStripes; ++i) {
        std::memcpy(last[i], rows[i] + c, static_cast<size_t>(p_.d - c) * sizeof(T));
        at[i] = last[i];
      }
      dot_block<T, kStripes, N>(at, x, c, sums);
    }
    float products[kStripes * N];
    if constexpr (kStripes * N == 16) {
      vec_sums(sums[0], products);
    } else {
      for (int i = 0; i < kStripes * N; ++i) products[i] = vec_sum(sums[i / N][i % N]);
    }
    for (int i = 0; i < kStripes; ++i)
      for (int n = 0; n < N; ++n) scores_[i * group_ + g + n] = p_.scale * products[i * N + n];
  }

  const SpanSearchParams& p_;
  const int64_t group_, width_;
  int64_t b_ = 0, kv_head_ = 0;
  X* const q_;
  T* const zeros_;
  float* const scores_;  // [stripe, head of the group]
  Best* const best_;
  const int64_t bytes_;
};

}  // namespace subquad::cpu::SUBQUAD_ISA::stripes
