// What a state that enters a sequence adds to results that were computed without it. One instruction set.
//
// o_t = (N_t + scale q_t exp(b_t) S) / (D_t + scale q_t exp(b_t) z + eps), b_t the gates summed up to t. Where the
// decays are all 0 nothing is added, but the NaN that 0 times an infinite state is.
#pragma once

#include "ops/gated_linear_attention/cpu_state.h"

namespace subquad::cpu::SUBQUAD_ISA::gla {

template <class T>
class GlaEnter {
 public:
  GlaEnter(const GatedLinearAttentionParams& p, Arena arena) : p_(p), size_(p), chunk_(p, arena), ahead_(p) {
    memory_ = arena.take<float>(p.group * State::words(size_));
    out_ = arena.take<float>(kTileRows * size_.v);
    ends_ = arena.take<int64_t>(p.group);
    bytes_ = arena.used();
  }
  int64_t bytes() const { return bytes_; }

  /// State heads [first, end) of batch row b.
  void run(int64_t b, int64_t first, int64_t end) {
    b_ = b;
    int64_t stop = 0;
    for (int64_t s = first; s < end; ++s) {
      choose(s, s - first);
      state_.begin(p_, size_, b * p_.states + s);
      ends_[s - first] = end_of(s);
      stop = larger(stop, ends_[s - first]);
    }
    for (int64_t t = 0; t < stop; t += kChunk)
      for (int64_t s = first; s < end; ++s) {
        choose(s, s - first);
        const bool last = s + 1 == end;
        const int64_t next = last ? t + kChunk : t, then = last ? 0 : s + 1 - first, own = ends_[s - first];
        ahead_.aim(b, first + then, next, smaller(kChunk, ends_[then] - next), RowsAhead<T>::What::kEntered);
        if (t < own) walk(t, smaller(kChunk, own - t));
      }
  }

 private:
  void choose(int64_t head, int64_t member) {
    head_ = head;
    state_ = State(memory_ + member * State::words(size_), size_);
  }

  int64_t reach(int64_t s) const { return clamp(p_.local.reach[b_ * p_.states + s], 0, p_.tokens); }

  /// Where the tokens of state head s end that it changes.
  int64_t end_of(int64_t s) const {
    const int64_t at = b_ * p_.states + s;
    const bool finite = all_finite(p_.s0 + at * p_.dk * p_.dv, p_.dk * p_.dv) &&
                        (p_.z0 == nullptr || all_finite(p_.z0 + at * p_.dk, p_.dk));
    return finite ? reach(s) : p_.tokens;
  }

  void walk(int64_t t, int64_t n) {
    if (!chunk_.load({b_, 0, p_.tokens}, head_, t, n, Rows::kQueries)) {
      const int64_t half = (n + 1) / 2;
      walk(t, half);
      walk(t + half, n - half);
      return;
    }
    state_.move_to(chunk_.head, p_, size_);
    std::memcpy(state_.pending, chunk_.tail, static_cast<size_t>(size_.k) * sizeof(float));
    for (int64_t h = 0; h < size_.per_state; ++h)
      for (int64_t row = 0; row < n; row += kTileRows) {
        product<Floats>(kTileRows, size_.v, p_.dk, Left{chunk_.q(h) + row * size_.k, size_.k, 1},
                        Block{state_.s, size_.v}, Block{out_, size_.v}, false);
        for (int64_t i = row; i < smaller(n, row + kTileRows); ++i) {
          add(t + i, h, i, out_ + (i - row) * size_.v);
          if (h == 0) ahead_.fetch();
        }
      }
  }

  /// Row i of the chunk, token t, of query head h of the state: `more` to its numerators.
  void add(int64_t t, int64_t h, int64_t i, const float* more) {
    const int64_t at = (b_ * p_.tokens + t) * p_.q.heads + head_ * size_.per_state + h;
    T* const o = static_cast<T*>(p_.o) + at * p_.dv;
    float inverse = 1.0f, extra = 0.0f;
    if (p_.den != nullptr) {
      extra = dot(chunk_.q(h) + i * size_.k, state_.z, p_.dk);
      p_.den[at] += extra;
      inverse = 1.0f / (p_.den[at] + p_.eps);
    }
    if (t < reach(head_)) return add_row(p_.local.sums + at * p_.dv, more, 0.0f, inverse, o);
    add_row(o, more, extra, 1.0f, o);
  }

  /// o = (row + more + extra) factor.
  template <class E>
  void add_row(const E* row, const float* more, float extra, float factor, T* o) {
    for (int64_t c = 0; c < p_.dv; c += kLanes) {
      const int64_t n = smaller(p_.dv - c, kLanes);
      const Vec x = n == kLanes ? vec_load_part<true>(row + c, n) : vec_load_part<false>(row + c, n);
      const Vec y = (x + vec_load(more + c) + extra) * factor;
      n == kLanes ? vec_store_part<true>(o + c, y, n) : vec_store_part<false>(o + c, y, n);
    }
  }

  const GatedLinearAttentionParams& p_;
  Sizes size_;
  Chunk<T> chunk_;
  RowsAhead<T> ahead_;
  State state_;  // of the head chosen
  int64_t b_ = 0, head_ = 0, bytes_ = 0;
  float *memory_, *out_;
  int64_t* ends_;  // of each state head of the group
};

}  // namespace subquad::cpu::SUBQUAD_ISA::gla
