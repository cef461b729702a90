// Gated linear attention, forward: neighbouring state heads of one sequence, chunk after chunk. One instruction set.
//
// Rows of one head lie a whole token apart: one head alone would touch a new page every other row. Neighbours walk the
// chunks together, and while one chunk is multiplied the rows of the next are fetched.
//
// Where a sequence is continued, its state begins with zeros, and a token keeps its numerator and denominator as long
// as what enters later still reaches it.
//
// A sequence may be cut into shares. Each goes through the tokens before it for their state alone, by the same
// operations, so that cuts change no bit and shares wait for nothing. Where there are no queries all go so.
#pragma once

#include "ops/gated_linear_attention/cpu_state.h"

namespace subquad::cpu::SUBQUAD_ISA::gla {

template <class T>
class GlaForward {
 public:
  GlaForward(const GatedLinearAttentionParams& p, Arena arena)
      : p_(p),
        size_(p),
        chunk_(p, arena),
        passing_{{p, arena}, {p, arena}},
        pairs_(size_, arena),
        ahead_(p),
        far_ahead_(p) {
    memory_ = arena.take<float>(p.group * State::words(size_));
    kept_ = arena.take<float>(kHalvings * State::words(size_));
    factors_ = arena.take<float>(2 * kPassing * size_.k);
    passing_[1].up = passing_[0].up, passing_[1].down = passing_[0].down;  // of one at a time
    out_ = arena.take<float>(kChunk * size_.v);
    bytes_ = arena.used();
  }
  int64_t bytes() const { return bytes_; }

  /// State heads [first, end) of sequence n: the results of one share of it, and of the last the state.
  void run(int64_t n, int64_t first, int64_t end, int64_t share) {
    sequence_ = sequence_at(p_, n);
    const int64_t end_results = share_begin(share + 1);
    const int64_t begin_results = size_.per_state == 0 ? end_results : share_begin(share);
    if (share > 0 && begin_results == sequence_.end) return;
    for (int64_t s = first; s < end; ++s) {
      choose(s, s - first);
      begin(n * p_.states + s);
    }
    for (int64_t t = sequence_.begin; t < begin_results; t += kPassing * kChunk)
      for (int64_t s = first; s < end; ++s) {
        choose(s, s - first);
        const bool last = s + 1 == end;
        const int64_t next = last ? t + kPassing * kChunk : t;
        far_ahead_.aim(sequence_.b, last ? first : s + 1, next, smaller(kPassing * kChunk, begin_results - next),
                       RowsAhead<T, 2>::What::kState);
        pass_several(t, begin_results);
      }
    for (int64_t t = begin_results; t < end_results; t += kChunk)
      for (int64_t s = first; s < end; ++s) {
        choose(s, s - first);
        const bool last = s + 1 == end;
        const int64_t next = last ? t + kChunk : t;
        ahead_.aim(sequence_.b, last ? first : s + 1, next, smaller(kChunk, end_results - next),
                   RowsAhead<T>::What::kResults);
        if (p_.local.reach != nullptr) see_reach(n, t);
        walk(t, smaller(kChunk, sequence_.end - t), 0);
      }
    for (int64_t s = first; s < end && end_results == sequence_.end; ++s) {
      choose(s, s - first);
      finish(n * p_.states + s);
    }
  }

 private:
  size_t memory_bytes() const { return static_cast<size_t>(State::words(size_)) * sizeof(float); }

  void choose(int64_t head, int64_t member) {
    head_ = head;
    state_ = State(memory_ + member * State::words(size_), size_);
  }

  void begin(int64_t at) {
    state_.begin(p_, size_, at);
    if (p_.local.reach != nullptr) p_.local.reach[at] = is_continued(at / p_.states) ? sequence_.end : 0;
  }

  bool is_continued(int64_t n) const { return p_.cu_seqlens == nullptr || n == 0; }

  /// Whether the decays of the head chosen up to token t are all 0. `reach` counts from the first token, as sequences
  /// that are continued begin at 0.
  void see_reach(int64_t n, int64_t t) {
    int64_t& reach = p_.local.reach[n * p_.states + head_];
    within_reach_ = t < reach;
    if (!within_reach_) return;
    for (int64_t c = 0; c < p_.dk; ++c)
      if (state_.decay[c] * state_.pending[c] != 0.0f) return;
    reach = t, within_reach_ = false;
  }

  void finish(int64_t at) {
    state_.move_to(nullptr, p_, size_);
    const size_t row = static_cast<size_t>(p_.dv) * sizeof(float), column = static_cast<size_t>(p_.dk) * sizeof(float);
    for (int64_t c = 0; c < p_.dk; ++c) std::memcpy(p_.s + (at * p_.dk + c) * p_.dv, state_.s + c * size_.v, row);
    if (p_.z != nullptr) std::memcpy(p_.z + at * p_.dk, state_.z, column);
    if (p_.local.decay != nullptr) std::memcpy(p_.local.decay + at * p_.dk, state_.decay, column);
  }

  /// Where the results of a share begin: so that all shares take as long, when a token on the way takes kPassingTime
  /// of the time of one with results. A multiple of kPassing chunks from the first token on.
  int64_t share_begin(int64_t share) const {
    double left = 1.0, all = 1.0;  // powers of 1 - kPassingTime
    for (int64_t i = 0; i < share; ++i) left *= 1.0 - kPassingTime;
    for (int64_t i = 0; i < p_.shares; ++i) all *= 1.0 - kPassingTime;
    const double chunks = static_cast<double>(ceil_div(sequence_.end - sequence_.begin, kChunk));
    const auto before = static_cast<int64_t>(chunks * (1.0 - left) / (1.0 - all) / kPassing + 0.5) * kPassing;
    return share == p_.shares ? sequence_.end : smaller(sequence_.begin + before * kChunk, sequence_.end);
  }

  /// Tokens [t, t + n) into the state, without results.
  void pass(int64_t t, int64_t n) {
    if (passing_[0].load(sequence_, head_, t, n, Rows::kKeys)) return pass_loaded(1, n);
    const int64_t half = (n + 1) / 2;
    pass(t, half);
    pass(t + half, n - half);
  }

  /// Tokens [t, end), at most kPassing chunks of them: whole ones, but for the last tokens of all.
  void pass_several(int64_t t, int64_t end) {
    if (end - t < kPassing * kChunk) {
      for (; t < end; t += kChunk) pass(t, smaller(kChunk, end - t));
      return;
    }
    for (int64_t i = 0; i < kPassing; ++i) {
      if (passing_[i].load(sequence_, head_, t + i * kChunk, kChunk, Rows::kKeys)) continue;
      if (i > 0) pass_loaded(i, kChunk);
      for (; i < kPassing; ++i) pass(t + i * kChunk, kChunk);
      return;
    }
    pass_loaded(kPassing, kChunk);
  }

  /// What `State::move_to` and `update` do for one chunk after the other, with the state in registers meanwhile.
  void pass_loaded(int64_t chunks, int64_t n) {
    for (int64_t i = 0; i < chunks; ++i) {
      const float* before = i == 0 ? state_.pending : passing_[i - 1].tail;
      float *first = factors_ + 2 * i * size_.k, *then = first + size_.k;
      std::memcpy(first, before, static_cast<size_t>(size_.k) * sizeof(float));
      std::memcpy(then, passing_[i].head, static_cast<size_t>(size_.k) * sizeof(float));
      for (int64_t c = 0; c < size_.k; c += kLanes) {
        const Vec f = vec_load(first + c), g = vec_load(then + c);
        vec_store(state_.z + c, vec_mul(vec_mul(vec_load(state_.z + c), f), g));
        vec_store(state_.decay + c, vec_mul(vec_mul(vec_load(state_.decay + c), f), g));
      }
      add_keys(passing_[i], n);
    }
    const int64_t tiles = ceil_div(size_.v, kTileCols) * (size_.k / kTileRows),
                  fetches = ceil_div(kPassing * kChunk, tiles);
    for (int64_t col = 0; col < size_.v; col += kTileCols)
      for (int64_t c = 0; c < size_.k; c += kTileRows) {
        if (col + kTileCols <= size_.v) {
          pass_tile<kTileVecs>(chunks, n, c, col);
        } else {
          for (int64_t rest = col; rest < size_.v; rest += kLanes) pass_tile<1>(chunks, n, c, rest);
        }
        for (int64_t i = 0; i < fetches; ++i) far_ahead_.fetch();
      }
    std::memcpy(state_.pending, passing_[chunks - 1].tail, static_cast<size_t>(size_.k) * sizeof(float));
  }

  template <int N>
  void pass_tile(int64_t chunks, int64_t n, int64_t c, int64_t col) {
    float* at = state_.s + c * size_.v + col;
    Vec sums[kTileRows][N];
    for (int r = 0; r < kTileRows; ++r)
      for (int j = 0; j < N; ++j) sums[r][j] = vec_load(at + r * size_.v + j * kLanes);
    for (int64_t i = 0; i < chunks; ++i) {
      const float *key = passing_[i].kb + c, *value = passing_[i].v + col;
      for (int r = 0; r < kTileRows; ++r)
        for (int j = 0; j < N; ++j)
          sums[r][j] = vec_mul(vec_mul(sums[r][j], vec_set(factors_[2 * i * size_.k + c + r])),
                               vec_set(factors_[(2 * i + 1) * size_.k + c + r]));
      for (int64_t t = 0; t < n; ++t) {
        Vec right[N];
        for (int j = 0; j < N; ++j) right[j] = vec_load(value + t * size_.v + j * kLanes);
        for (int r = 0; r < kTileRows; ++r) {
          const Vec left = vec_set(key[t * size_.k + r]);
          for (int j = 0; j < N; ++j) sums[r][j] = Floats::multiply_add(left, right[j], sums[r][j]);
        }
      }
    }
    for (int r = 0; r < kTileRows; ++r)
      for (int j = 0; j < N; ++j) vec_store(at + r * size_.v + j * kLanes, sums[r][j]);
  }

  void walk(int64_t t, int64_t n, int64_t depth) {
    if (!chunk_.load(sequence_, head_, t, n)) {
      const int64_t half = (n + 1) / 2;
      // If keys and values would do, the state goes on as it does in `pass`.
      const bool apart = chunk_.keys_fit;
      float* kept = kept_ + depth * State::words(size_);
      if (apart) std::memcpy(kept, state_.s, memory_bytes());
      walk(t, half, depth + 1);
      walk(t + half, n - half, depth + 1);
      if (!apart) return;
      std::memcpy(state_.s, kept, memory_bytes());
      return pass(t, n);
    }
    const int64_t padded = chunk_rows(n);
    state_.move_to(chunk_.head, p_, size_);
    transpose_words(chunk_.kb, padded, size_.k, pairs_.transposed, padded);
    for (int64_t h = 0; h < size_.per_state; ++h) {
      product<Floats>(round_up(n, kTileRows), size_.v, p_.dk, Left{chunk_.q(h), size_.k, 1}, Block{state_.s, size_.v},
                      Block{out_, size_.v}, false);
      for (int64_t row = 0; row < n; row += kTileRows) attend(t, n, padded, h, row);
    }
    update(n);
  }

  /// The chunk into the state and z, which are decayed to it.
  void update(int64_t n) {
    std::memcpy(state_.pending, chunk_.tail, static_cast<size_t>(size_.k) * sizeof(float));
    for (int64_t c = 0; c < size_.k; c += kTileRows) {
      product<Floats>(kTileRows, size_.v, n, Left{chunk_.kb + c, 1, size_.k}, Block{chunk_.v, size_.v},
                      Block{state_.s + c * size_.v, size_.v}, true);
      ahead_.fetch();
    }
    add_keys(chunk_, n);
  }

  void add_keys(const Chunk<T>& chunk, int64_t n) {
    for (int64_t c = 0; c < size_.k; c += kLanes) {
      Vec sum = vec_load(state_.z + c);
      for (int64_t i = 0; i < n; ++i) sum = vec_add(sum, vec_load(chunk.kb + i * size_.k + c));
      vec_store(state_.z + c, sum);
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
        const float total = dot(qb + i * size_.k, state_.z, p_.dk) + sum_of(scores + i * padded, padded);
        p_.den[at] = total;
        inverse = 1.0f / (total + p_.eps);
      }
      if (within_reach_) {
        round_row(out_ + i * size_.v, p_.dv, 1.0f, p_.local.sums + at * p_.dv);
        continue;
      }
      round_row(out_ + i * size_.v, p_.dv, inverse, static_cast<T*>(p_.o) + at * p_.dv);
    }
  }

  static constexpr int64_t kPassing = 2;  // chunks that go into the state at once
  static constexpr double kPassingTime = 0.4;

  const GatedLinearAttentionParams& p_;
  Sizes size_;
  Chunk<T> chunk_, passing_[kPassing];
  Pairs2D pairs_;
  RowsAhead<T> ahead_;
  RowsAhead<T, 2> far_ahead_;
  Sequence sequence_{};
  int64_t head_ = 0, bytes_ = 0;
  float *memory_, *kept_, *factors_, *out_;
  State state_;                // of the head chosen
  bool within_reach_ = false;  // of the chunk at hand
};

}  // namespace subquad::cpu::SUBQUAD_ISA::gla
