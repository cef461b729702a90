// Gated linear attention, forward: neighbouring state heads of one sequence, chunk after chunk. One instruction set.
//
// Rows of one head lie a whole token apart: one head alone would touch a new page every other row. Neighbours walk the
// chunks together, and find the pages, and the lines that were fetched ahead, still there.
#pragma once

#include "cpu/gated_linear_chunk.h"

namespace subquad::cpu::SUBQUAD_ISA {

template <class T>
class GlaForward {
 public:
  GlaForward(const GatedLinearAttentionParams& p, Arena arena)
      : p_(p), size_(p), chunk_(p, arena), pairs_(size_, arena) {
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
    for (int64_t h = 0; h < size_.per_state; ++h) attend(t, n, padded, head_ * size_.per_state + h, chunk_.q(h));
    product<Floats>(size_.k, size_.v, n, Left{chunk_.kb, 1, size_.k}, Block{chunk_.v, size_.v}, Block{state_, size_.v},
                    true);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < size_.k; c += kLanes)
        vec_store(z_ + c, vec_add(vec_load(z_ + c), vec_load(chunk_.kb + i * size_.k + c)));
  }

  void attend(int64_t t, int64_t n, int64_t padded, int64_t head, const float* qb) {
    float* scores = pairs_.scores;
    row_products(qb, size_.k, p_.dk, pairs_.transposed, padded, scores);
    keep_lower(scores, padded);
    const int64_t computed = round_up(n, kTileRows);
    product<Floats>(computed, size_.v, p_.dk, Left{qb, size_.k, 1}, Block{state_, size_.v}, Block{out_, size_.v},
                    false);
    product<Floats>(computed, size_.v, n, Left{scores, padded, 1}, Block{chunk_.v, size_.v}, Block{out_, size_.v},
                    true);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = (sequence_.b * p_.tokens + t + i) * p_.q.heads + head;
      float* out = out_ + i * size_.v;
      if (p_.den != nullptr) {
        const float total = dot(qb + i * size_.k, z_, p_.dk) + sum_of(scores + i * padded, padded);
        p_.den[row] = total;
        const Vec inverse = vec_set(1.0f / (total + p_.eps));
        for (int64_t c = 0; c < size_.v; c += kLanes) vec_store(out + c, vec_mul(vec_load(out + c), inverse));
      }
      round_row(out, p_.dv, static_cast<T*>(p_.o) + row * p_.dv);
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
  Sequence sequence_{};
  int64_t head_ = 0, bytes_ = 0;
  float *memory_, *out_;
  float *state_ = nullptr, *z_ = nullptr, *pending_ = nullptr;  // of the head chosen
};

}  // namespace subquad::cpu::SUBQUAD_ISA
