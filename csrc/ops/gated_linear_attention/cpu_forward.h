// Gated linear attention, forward: neighbouring state heads of one sequence, chunk after chunk. One instruction set.
//
// Rows of one head lie a whole token apart: one head alone would touch a new page every other row. Neighbours walk the
// chunks together, and while one chunk is multiplied the rows of the next are fetched.
#pragma once

#include "ops/gated_linear_attention/cpu_chunk.h"

namespace subquad::cpu::SUBQUAD_ISA::gla {

template <class T>
class GlaForward {
 public:
  GlaForward(const GatedLinearAttentionParams& p, Arena arena)
      : p_(p), size_(p), chunk_(p, arena), pairs_(size_, arena), ahead_(p) {
    memory_ = arena.take<float>(p.group * memory_size());
    out_ = arena.take<float>(kChunk * size_.v);
    bytes_ = arena.used();
  }
  int64_t bytes() const { return bytes_; }

  /// State heads [first, end) of sequence n.
  void run(int64_t n, int64_t first, int64_t end) {
    sequence_ = sequence_at(p_, n);
    for (int64_t s = first; s < end; ++s) {
      choose(s, s - first);
      begin(n * p_.states + s);
    }
    for (int64_t t = sequence_.begin; t < sequence_.end; t += kChunk)
      for (int64_t s = first; s < end; ++s) {
        choose(s, s - first);
        const bool last = s + 1 == end;
        const int64_t next = last ? t + kChunk : t;
        ahead_.aim(sequence_.b, last ? first : s + 1, next, smaller(kChunk, sequence_.end - next),
                   RowsAhead<T>::What::kResults);
        walk(t, smaller(kChunk, sequence_.end - t));
      }
    for (int64_t s = first; s < end; ++s) {
      choose(s, s - first);
      finish(n * p_.states + s);
    }
  }

 private:
  int64_t memory_size() const { return size_.k * (size_.v + 2); }

  void choose(int64_t head, int64_t member) {
    head_ = head;
    state_ = memory_ + member * memory_size();
    z_ = state_ + size_.k * size_.v;
    pending_ = z_ + size_.k;
  }

  void begin(int64_t at) {
    zero_words(state_, size_.k * size_.v);
    zero_words(z_, size_.k);
    for (int64_t c = 0; c < p_.dk && p_.s0 != nullptr; ++c)
      std::memcpy(state_ + c * size_.v, p_.s0 + (at * p_.dk + c) * p_.dv, static_cast<size_t>(p_.dv) * sizeof(float));
    if (p_.z0 != nullptr) std::memcpy(z_, p_.z0 + at * p_.dk, static_cast<size_t>(p_.dk) * sizeof(float));
    for (int64_t c = 0; c < size_.k; ++c) pending_[c] = 1.0f;
  }

  void finish(int64_t at) {
    decay_state(nullptr);
    for (int64_t c = 0; c < p_.dk; ++c)
      std::memcpy(p_.s + (at * p_.dk + c) * p_.dv, state_ + c * size_.v, static_cast<size_t>(p_.dv) * sizeof(float));
    if (p_.z != nullptr) std::memcpy(p_.z + at * p_.dk, z_, static_cast<size_t>(p_.dk) * sizeof(float));
  }

  void walk(int64_t t, int64_t n) {
    if (!chunk_.load(sequence_, head_, t, n)) {
      const int64_t half = (n + 1) / 2;
      walk(t, half);
      walk(t + half, n - half);
      return;
    }
    const int64_t padded = chunk_rows(n);
    decay_state(chunk_.head);
    std::memcpy(pending_, chunk_.tail, static_cast<size_t>(size_.k) * sizeof(float));
    transpose_words(chunk_.kb, padded, size_.k, pairs_.transposed, padded);
    for (int64_t h = 0; h < size_.per_state; ++h) {
      product<Floats>(round_up(n, kTileRows), size_.v, p_.dk, Left{chunk_.q(h), size_.k, 1}, Block{state_, size_.v},
                      Block{out_, size_.v}, false);
      for (int64_t row = 0; row < n; row += kTileRows) attend(t, n, padded, h, row);
    }
    for (int64_t c = 0; c < size_.k; c += kTileRows) {
      product<Floats>(kTileRows, size_.v, n, Left{chunk_.kb + c, 1, size_.k}, Block{chunk_.v, size_.v},
                      Block{state_ + c * size_.v, size_.v}, true);
      ahead_.fetch();
    }
    for (int64_t c = 0; c < size_.k; c += kLanes) {
      Vec sum = vec_load(z_ + c);
      for (int64_t i = 0; i < n; ++i) sum = vec_add(sum, vec_load(chunk_.kb + i * size_.k + c));
      vec_store(z_ + c, sum);
    }
  }

  /// Rows [row, row + kTileRows) of query head h of the state, whose products with the state are in `out_`.
  void attend(int64_t t, int64_t n, int64_t padded, int64_t h, int64_t row) {
    const float* qb = chunk_.q(h);
    float* scores = pairs_.scores;
    lower_products(row, qb, size_.k, p_.dk, pairs_.transposed, padded, scores);
    ahead_.fetch();
    add_lower(row, scores, padded, n, chunk_.v, size_.v, out_);
    ahead_.fetch();
    for (int64_t i = row; i < smaller(n, row + kTileRows); ++i) {
      const int64_t at = (sequence_.b * p_.tokens + t + i) * p_.q.heads + head_ * size_.per_state + h;
      float inverse = 1.0f;
      if (p_.den != nullptr) {
        const float total = dot(qb + i * size_.k, z_, p_.dk) + sum_of(scores + i * padded, padded);
        p_.den[at] = total;
        inverse = 1.0f / (total + p_.eps);
      }
      round_row(out_ + i * size_.v, p_.dv, inverse, static_cast<T*>(p_.o) + at * p_.dv);
    }
  }

  /// Rows of the state and z times the decay that is pending, and `next`.
  void decay_state(const float* next) {
    for (int64_t c = 0; c < p_.dk; ++c) {
      const float factor = next == nullptr ? pending_[c] : pending_[c] * next[c];
      z_[c] *= factor;
      const Vec f = vec_set(factor);
      float* row = state_ + c * size_.v;
      for (int64_t i = 0; i < size_.v; i += kLanes) vec_store(row + i, vec_mul(vec_load(row + i), f));
    }
  }

  const GatedLinearAttentionParams& p_;
  Sizes size_;
  Chunk<T> chunk_;
  Pairs2D pairs_;
  RowsAhead<T> ahead_;
  Sequence sequence_{};
  int64_t head_ = 0, bytes_ = 0;
  float *memory_, *out_;
  float *state_ = nullptr, *z_ = nullptr, *pending_ = nullptr;  // of the head chosen
};

}  // namespace subquad::cpu::SUBQUAD_ISA::gla
