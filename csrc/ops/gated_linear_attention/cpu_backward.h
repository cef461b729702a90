// Gated linear attention, backward: the state heads that share a head of k, v or g, in one sequence. One instruction
// set.
//
// The states are computed again: first from start to end, keeping one per segment, then within each segment, from the
// last segment to the first, keeping one per block of kChunk tokens. Only one unit's states exist at a time. Here a
// state is [V, K], so that decays scale columns and products read it as it lies. It is larger than the nearest cache,
// so that decays are multiplied in on the way through a product, or all in one pass.
#pragma once

#include "ops/gated_linear_attention/cpu_chunk.h"

namespace subquad::cpu::SUBQUAD_ISA::gla {

constexpr int64_t kSegmentBlocks = 4;
constexpr int64_t kSegment = kSegmentBlocks * kChunk;

inline int64_t common_divisor(int64_t a, int64_t b) {
  while (b != 0) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

/// Groups of neighbouring state heads that share no head of k, v or g with another group; several such groups are one
/// while they stay within `p.group` heads and their states in the cache.
inline int64_t gla_units(const GatedLinearAttentionParams& p) {
  constexpr int64_t kCached = int64_t{640} << 10;
  int64_t units = common_divisor(p.k.heads, p.v.heads);
  if (p.gate != GateKind::kNone) units = common_divisor(units, p.g.heads);
  const int64_t per_unit = p.states / units;
  const int64_t bytes = per_unit * p.dk * p.dv * (kSegmentBlocks + 2) * static_cast<int64_t>(sizeof(float));
  for (int64_t merged = p.group / per_unit; merged > 1; --merged)
    if (units % merged == 0 && merged * bytes <= kCached) return units / merged;
  return units;
}

template <class T>
class GlaBackward {
 public:
  GlaBackward(const GatedLinearAttentionParams& p, const GatedLinearAttentionGrads& grads, Arena arena)
      : p_(p), grads_(grads), size_(p), units_(gla_units(p)), chunk_(p, arena), pairs_(size_, arena), ahead_(p) {
    per_unit_ = p.states / units_;
    state_size_ = size_.k * size_.v + size_.k;  // S, then z
    const auto floats = [&](int64_t n) { return arena.take<float>(n); };
    dstate_ = floats(per_unit_ * state_size_);
    segment_states_ = floats(ceil_div(p.tokens, kSegment) * per_unit_ * state_size_);
    block_states_ = floats((kSegmentBlocks - 1) * per_unit_ * state_size_);
    halves_ = floats(kHalvings * state_size_);
    dv_rows_ = floats(size_.v * kChunk);
    v_transposed_ = floats(size_.v * kChunk);
    dscores_ = floats(kChunk * kChunk);
    grad_n_ = floats(size_.per_state * kChunk * size_.v);
    inverse_ = floats(size_.per_state * kChunk);
    dq_inter_ = floats(kChunk * size_.k);
    dq_intra_ = floats(kChunk * size_.k);
    dk_inter_ = floats(kChunk * size_.k);
    dk_intra_ = floats(kChunk * size_.k);
    dv_chunk_ = floats(kChunk * size_.v);
    gate_terms_ = floats(kChunk * size_.k);
    column_ = floats(2 * size_.k);
    dk_ = floats(p.k.heads / units_ * kChunk * size_.k);
    dv_ = floats(p.v.heads / units_ * kChunk * size_.v);
    dg_ = floats(p.gate == GateKind::kNone ? 0 : p.g.heads / units_ * kChunk * size_.k);
    bytes_ = arena.used();
  }
  int64_t bytes() const { return bytes_; }

  void run(int64_t n, int64_t unit) {
    sequence_ = sequence_at(p_, n);
    unit_ = unit;
    const int64_t first = n * p_.states + unit * per_unit_, length = sequence_.end - sequence_.begin;
    load_states(grads_.grad_s, grads_.grad_z, first, dstate_);
    const int64_t segments = ceil_div(length, kSegment);
    if (segments > 0) load_states(p_.s0, p_.z0, first, segment_states_);
    for (int64_t t = 0; t + kSegment < segments * kSegment; t += kChunk) {
      const int64_t block = t / kChunk % kSegmentBlocks;
      float* to = block + 1 < kSegmentBlocks ? block_states_ : states_at(t + kChunk);
      advance_unit(t, block > 0 ? block_states_ : states_at(t), to);
    }
    for (int64_t segment = segments - 1; segment >= 0; --segment) {
      const int64_t begin = segment * kSegment, end = smaller(length, begin + kSegment);
      for (int64_t t = begin; t + kChunk < end; t += kChunk) advance_unit(t, states_at(t), states_at(t + kChunk));
      for (int64_t t = begin + (end - begin - 1) / kChunk * kChunk; t >= begin; t -= kChunk)
        block(t, smaller(kChunk, end - t), states_at(t));
    }
    store_states(first);
  }

 private:
  // ------------------------------------------------------------------------------------------------------------ states

  /// The unit's states before token t, a multiple of kChunk: of one segment at a time, but for its first.
  float* states_at(int64_t t) const {
    const int64_t block = t / kChunk % kSegmentBlocks;
    return block == 0 ? segment_states_ + t / kSegment * per_unit_ * state_size_
                      : block_states_ + (block - 1) * per_unit_ * state_size_;
  }

  void load_states(const float* s, const float* z, int64_t first, float* to) const {
    zero_words(to, per_unit_ * state_size_);
    for (int64_t j = 0; j < per_unit_; ++j, to += state_size_) {
      for (int64_t c = 0; c < p_.dk && s != nullptr; ++c)
        for (int64_t i = 0; i < p_.dv; ++i) to[i * size_.k + c] = s[((first + j) * p_.dk + c) * p_.dv + i];
      if (z != nullptr) std::memcpy(z_of(to), z + (first + j) * p_.dk, static_cast<size_t>(p_.dk) * sizeof(float));
    }
  }

  void store_states(int64_t first) const {
    const float* from = dstate_;
    for (int64_t j = 0; j < per_unit_; ++j, from += state_size_) {
      for (int64_t c = 0; c < p_.dk && grads_.ds0 != nullptr; ++c)
        for (int64_t i = 0; i < p_.dv; ++i) grads_.ds0[((first + j) * p_.dk + c) * p_.dv + i] = from[i * size_.k + c];
      if (grads_.dz0 != nullptr)
        std::memcpy(grads_.dz0 + (first + j) * p_.dk, from + size_.k * size_.v,
                    static_cast<size_t>(p_.dk) * sizeof(float));
    }
  }

  float* z_of(float* state) const { return state + size_.k * size_.v; }

  void scale(float* row, const float* factor) const {
    for (int64_t c = 0; c < size_.k; c += kLanes) vec_store(row + c, vec_mul(vec_load(row + c), vec_load(factor + c)));
  }

  template <int N>
  static void update_tile(Left a, const float* b, int64_t n, const float* from, const float* before, const float* after,
                          float* to, int64_t stride) {
    Vec sums[kTileRows][N];
    for (int r = 0; r < kTileRows; ++r)
      for (int i = 0; i < N; ++i) {
        sums[r][i] = vec_load(from + r * stride + i * kLanes);
        if (before != nullptr) sums[r][i] = vec_mul(sums[r][i], vec_load(before + i * kLanes));
      }
    for (int64_t t = 0; t < n; ++t) {
      Vec right[N];
      for (int i = 0; i < N; ++i) right[i] = vec_load(b + t * stride + i * kLanes);
      for (int r = 0; r < kTileRows; ++r) {
        const Vec left = vec_set(a.words[r * a.row_stride + t * a.depth_stride]);
        for (int i = 0; i < N; ++i) sums[r][i] = vec_fma(left, right[i], sums[r][i]);
      }
    }
    for (int r = 0; r < kTileRows; ++r)
      for (int i = 0; i < N; ++i) {
        const Vec sum = after == nullptr ? sums[r][i] : vec_mul(sums[r][i], vec_load(after + i * kLanes));
        vec_store(to + r * stride + i * kLanes, sum);
      }
  }

  /// to = (from * before + a^T b) * after without z, for a [n, V] and b [n, K]; factors [K] may be null.
  void update(const float* from, const float* before, const float* a, const float* b, int64_t n, const float* after,
              float* to) {
    const auto at = [](const float* factor, int64_t c) { return factor == nullptr ? nullptr : factor + c; };
    for (int64_t i = 0; i < size_.v; i += kTileRows) {
      const Left left{a + i, 1, size_.v};
      const int64_t row = i * size_.k;
      int64_t c = 0;
      for (; c + kTileCols <= size_.k; c += kTileCols)
        update_tile<kTileVecs>(left, b + c, n, from + row + c, at(before, c), at(after, c), to + row + c, size_.k);
      for (; c < size_.k; c += kLanes)
        update_tile<1>(left, b + c, n, from + row + c, at(before, c), at(after, c), to + row + c, size_.k);
      ahead_.fetch();
    }
  }

  /// A whole chunk from token t on.
  void advance_unit(int64_t t, const float* from, float* to) {
    for (int64_t j = 0; j < per_unit_; ++j) {
      aim(j + 1 < per_unit_ ? j + 1 : 0, j + 1 < per_unit_ ? t : t + kChunk, RowsAhead<T>::What::kState);
      advance(unit_ * per_unit_ + j, t, kChunk, from + j * state_size_, to + j * state_size_);
    }
  }

  /// What comes next: the block at token t of state head j of the unit, if there is one.
  void aim(int64_t j, int64_t t, typename RowsAhead<T>::What what) {
    const int64_t n = t < 0 ? 0 : smaller(kChunk, sequence_.end - sequence_.begin - t);
    ahead_.aim(sequence_.b, unit_ * per_unit_ + j, sequence_.begin + t, n, what, &grads_);
  }

  void advance(int64_t s, int64_t t, int64_t n, const float* from, float* to) {
    if (!chunk_.load(sequence_, s, sequence_.begin + t, n, Rows::kKeys)) {
      const int64_t half = (n + 1) / 2;
      advance(s, t, half, from, to);
      advance(s, t + half, n - half, to, to);
      return;
    }
    const float *head = gated() ? chunk_.head : nullptr, *tail = gated() ? chunk_.tail : nullptr;
    update(from, head, chunk_.v, chunk_.kb, n, tail, to);
    float* z = z_of(to);
    if (from != to) std::memcpy(z, from + size_.k * size_.v, static_cast<size_t>(size_.k) * sizeof(float));
    scale(z, chunk_.head);
    for (int64_t i = 0; i < n; ++i) add(chunk_.kb + i * size_.k, size_.k, z);
    scale(z, chunk_.tail);
  }

  static void add(const float* x, int64_t n, float* to) {
    for (int64_t c = 0; c < n; c += kLanes) vec_store(to + c, vec_add(vec_load(to + c), vec_load(x + c)));
  }

  // ------------------------------------------------------------------------------------------------------------ blocks

  void block(int64_t t, int64_t n, float* states) {
    block_ = t;
    zero_words(dk_, p_.k.heads / units_ * kChunk * size_.k);
    zero_words(dv_, p_.v.heads / units_ * kChunk * size_.v);
    if (p_.gate != GateKind::kNone) zero_words(dg_, p_.g.heads / units_ * kChunk * size_.k);
    for (int64_t j = 0; j < per_unit_; ++j) {
      aim(j + 1 < per_unit_ ? j + 1 : 0, j + 1 < per_unit_ ? t : t - kChunk, RowsAhead<T>::What::kGradients);
      back(j, t, n, states + j * state_size_, 0);
    }
    store_block(t, n);
  }

  /// Tokens [t, t + n) of state head j of the unit; `state` is the one before them, and is spent.
  void back(int64_t j, int64_t t, int64_t n, float* state, int64_t depth) {
    const int64_t s = unit_ * per_unit_ + j;
    if (!load(s, t, n)) {
      const int64_t half = (n + 1) / 2;
      float* middle = halves_ + depth * state_size_;
      advance(s, t, half, state, middle);
      back(j, t + half, n - half, middle, depth + 1);
      back(j, t, half, state, depth + 1);
      return;
    }
    float* dstate = dstate_ + j * state_size_;
    state_ = state;
    if (gated()) enter(state, dstate);
    const int64_t padded = chunk_rows(n), computed = round_up(n, kTileRows);
    transpose_words(chunk_.kb, padded, size_.k, pairs_.transposed, padded);
    transpose_words(chunk_.v, padded, size_.v, v_transposed_, padded);
    product<Floats>(computed, size_.k, p_.dv, Left{chunk_.v, size_.v, 1}, Block{dstate, size_.k},
                    Block{dk_inter_, size_.k}, false);
    if (normalised())
      for (int64_t i = 0; i < n; ++i) add(z_of(dstate), size_.k, dk_inter_ + i * size_.k);
    product<Floats>(size_.v, padded, p_.dk, Left{dstate, size_.k, 1}, Block{pairs_.transposed, padded},
                    Block{dv_rows_, padded}, false);
    transpose_words(dv_rows_, size_.v, padded, dv_chunk_, size_.v);
    if (gated()) zero_words(gate_terms_, n * size_.k);
    for (int64_t h = 0; h < size_.per_state; ++h) query_head(s, t, h, n, padded, computed, h > 0);
    for (int64_t h = 0; h < size_.per_state; ++h) {
      const float* head = gated() && h + 1 == size_.per_state ? chunk_.head : nullptr;
      update(dstate, nullptr, grad_n_ + h * kChunk * size_.v, chunk_.q(h), n, head, dstate);
    }
    scale(z_of(dstate), chunk_.head);
    accumulate(j, t, n);
  }

  bool normalised() const { return p_.den != nullptr; }

  /// The chunk, and its gradients of the numerators. False when it must be halved.
  bool load(int64_t s, int64_t t, int64_t n) {
    if (!chunk_.load(sequence_, s, sequence_.begin + t, n)) return false;
    const int64_t padded = chunk_rows(n);
    for (int64_t h = 0; h < size_.per_state; ++h) {
      float *grad = grad_n_ + h * kChunk * size_.v, *inverse = inverse_ + h * kChunk;
      Magnitude far;
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = row(s, t + i, h);
        inverse[i] = normalised() ? 1.0f / (p_.den[at] + p_.eps) : 1.0f;
        for_lanes(static_cast<const T*>(grads_.grad_o) + at * p_.dv, p_.dv, size_.v, [&](int64_t c, Vec x) {
          x *= inverse[i];
          far.add(x);
          vec_store(grad + i * size_.v + c, x);
        });
      }
      zero_words(grad + n * size_.v, (padded - n) * size_.v);
      if (n > 1 && !far.within(kModerate)) return false;
    }
    return true;
  }

  int64_t row(int64_t s, int64_t t, int64_t h) const {
    return (sequence_.b * p_.tokens + sequence_.begin + t) * p_.q.heads + s * size_.per_state + h;
  }

  void query_head(int64_t s, int64_t t, int64_t h, int64_t n, int64_t padded, int64_t computed, bool more) {
    const float *qb = chunk_.q(h), *grad = grad_n_ + h * kChunk * size_.v;
    float *scores = pairs_.scores, *dstate_z = z_of(dstate_ + (s % per_unit_) * state_size_);
    for (int64_t row = 0; row < computed; row += kTileRows) {
      lower_products(row, qb, size_.k, p_.dk, pairs_.transposed, padded, scores);
      lower_products(row, grad, size_.v, p_.dv, v_transposed_, padded, dscores_);
      ahead_.fetch();
    }
    product<Floats>(computed, size_.k, p_.dv, Left{grad, size_.v, 1}, Block{state_, size_.k}, Block{dq_inter_, size_.k},
                    false);
    if (normalised()) {
      for (int64_t i = 0; i < n; ++i) {
        const float* q = qb + i * size_.k;
        float* dq = dq_inter_ + i * size_.k;
        // The numerator's product with its gradient, from parts at hand: o need not be kept.
        const float along = dot(scores + i * padded, dscores_ + i * padded, padded) + dot(q, dq, p_.dk);
        const float dden = -along * inverse_[h * kChunk + i];
        for (int64_t j = 0; j <= i; ++j) dscores_[i * padded + j] += dden;
        const Vec d = vec_set(dden);
        const float* z = z_of(state_);
        for (int64_t c = 0; c < size_.k; c += kLanes) vec_store(dq + c, vec_fma(d, vec_load(z + c), vec_load(dq + c)));
        denominator_grads_[i] = dden;
      }
    }
    zero_words(dq_intra_, computed * size_.k);
    for (int64_t row = 0; row < computed; row += kTileRows) {
      upper_product(row, scores, padded, n, grad, size_.v, dv_chunk_, true);
      upper_product(row, dscores_, padded, n, qb, size_.k, dk_intra_, more);
      add_lower(row, dscores_, padded, n, chunk_.kb, size_.k, dq_intra_);
      ahead_.fetch();
    }
    const Vec scale = vec_set(p_.scale);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t offset = i * size_.k;
      for (int64_t c = offset; c < offset + size_.k; c += kLanes) {
        Vec dq = vec_add(vec_load(dq_inter_ + c), vec_load(dq_intra_ + c));
        if (gated()) {
          vec_store(gate_terms_ + c, vec_fma(vec_load(qb + c), dq, vec_load(gate_terms_ + c)));
          dq = vec_mul(dq, vec_load(chunk_.up + c));
        }
        vec_store(dq_intra_ + c, vec_mul(dq, scale));
      }
      round_row(dq_intra_ + offset, p_.dk, 1.0f, static_cast<T*>(grads_.dq) + row(s, t + i, h) * p_.dk);
    }
    if (!normalised()) return;
    // Into dz only after the keys' share of it was read: dk_inter has it already.
    for (int64_t i = 0; i < n; ++i) {
      const Vec d = vec_set(denominator_grads_[i]);
      for (int64_t c = 0; c < size_.k; c += kLanes)
        vec_store(dstate_z + c, vec_fma(d, vec_load(qb + i * size_.k + c), vec_load(dstate_z + c)));
    }
  }

  bool gated() const { return p_.gate != GateKind::kNone; }

  /// state *= the chunk's head, dstate *= its tail, and column_ = the sums of their products over the rows, z included
  /// where there is one.
  void enter(float* state, float* dstate) const {
    const int64_t end = normalised() ? state_size_ : state_size_ - size_.k;
    constexpr int kChains = 4;  // sums that do not wait for one another
    for (int64_t c = 0; c < size_.k; c += kLanes) {
      const Vec head = vec_load(chunk_.head + c), tail = vec_load(chunk_.tail + c);
      const auto scaled = [&](int64_t row, Vec sum) {
        const Vec a = vec_mul(vec_load(state + row), head), b = vec_mul(vec_load(dstate + row), tail);
        vec_store(state + row, a);
        vec_store(dstate + row, b);
        return vec_fma(a, b, sum);
      };
      Vec sum[kChains] = {vec_zero(), vec_zero(), vec_zero(), vec_zero()};
      int64_t row = c;
      for (; row + (kChains - 1) * size_.k < end; row += kChains * size_.k)
        for (int i = 0; i < kChains; ++i) sum[i] = scaled(row + i * size_.k, sum[i]);
      for (; row < end; row += size_.k) sum[0] = scaled(row, sum[0]);
      vec_store(column_ + c, vec_add(vec_add(sum[0], sum[1]), vec_add(sum[2], sum[3])));
    }
  }

  /// The chunk's gradients of k, v and g into the block's.
  void accumulate(int64_t j, int64_t t, int64_t n) {
    const int64_t s = unit_ * per_unit_ + j, at = t - block_;
    const auto local = [&](int64_t heads) { return s * heads / p_.states - unit_ * (heads / units_); };
    float* dv = dv_ + (local(p_.v.heads) * kChunk + at) * size_.v;
    for (int64_t i = 0; i < n; ++i) add(dv_chunk_ + i * size_.v, size_.v, dv + i * size_.v);
    if (gated()) gate_gradient(dg_ + (local(p_.g.heads) * kChunk + at) * size_.k, n);
    float* dk = dk_ + (local(p_.k.heads) * kChunk + at) * size_.k;
    for (int64_t c = 0; c < n * size_.k; c += kLanes) {
      Vec sum = vec_add(vec_load(dk_inter_ + c), vec_load(dk_intra_ + c));
      if (gated()) sum = vec_mul(sum, vec_load(chunk_.down + c));
      vec_store(dk + c, vec_add(vec_load(dk + c), sum));
    }
  }

  /// dg_i = what crosses the decay of token i: queries from i on with what came before, keys before i with what comes
  /// after, and the state that passes through.
  void gate_gradient(float* dg, int64_t n) {
    float *before = column_, *after = column_ + size_.k;
    zero_words(after, size_.k);
    const Vec minus = vec_set(-1.0f);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < size_.k; c += kLanes) {
        const int64_t at = i * size_.k + c;
        const Vec kb = vec_load(chunk_.kb + at), through = vec_load(before + c);
        vec_store(dg + at, vec_add(vec_load(dg + at), through));
        vec_store(before + c, vec_fma(kb, vec_load(dk_inter_ + at), through));
      }
    for (int64_t i = n - 1; i >= 0; --i)
      for (int64_t c = 0; c < size_.k; c += kLanes) {
        const int64_t at = i * size_.k + c;
        const Vec keys = vec_mul(vec_load(chunk_.kb + at), minus);
        const Vec own = vec_fma(keys, vec_load(dk_intra_ + at), vec_load(gate_terms_ + at));
        const Vec sum = vec_add(vec_load(after + c), own);
        vec_store(after + c, sum);
        vec_store(dg + at, vec_add(vec_load(dg + at), sum));
      }
  }

  void store_block(int64_t t, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t token = sequence_.b * p_.tokens + sequence_.begin + t + i;
      store_heads(dk_, p_.k.heads, size_.k, p_.dk, i, token, static_cast<T*>(grads_.dk));
      store_heads(dv_, p_.v.heads, size_.v, p_.dv, i, token, static_cast<T*>(grads_.dv));
      if (!gated()) continue;
      if (p_.gate_is_float) {
        store_gate(i, token, static_cast<float*>(grads_.dg));
      } else {
        store_gate(i, token, static_cast<T*>(grads_.dg));
      }
    }
  }

  template <class E>
  void store_heads(const float* from, int64_t heads, int64_t padded, int64_t width, int64_t i, int64_t token,
                   E* to) const {
    const int64_t own = heads / units_;
    for (int64_t h = 0; h < own; ++h)
      round_row(from + (h * kChunk + i) * padded, width, 1.0f, to + (token * heads + unit_ * own + h) * width);
  }

  template <class E>
  void store_gate(int64_t i, int64_t token, E* to) const {
    if (p_.gate == GateKind::kChannel) return store_heads(dg_, p_.g.heads, size_.k, p_.dk, i, token, to);
    const int64_t own = p_.g.heads / units_;
    for (int64_t h = 0; h < own; ++h)
      to[token * p_.g.heads + unit_ * own + h] = from_float<E>(sum_of(dg_ + (h * kChunk + i) * size_.k, p_.dk));
  }

  const GatedLinearAttentionParams& p_;
  const GatedLinearAttentionGrads& grads_;
  Sizes size_;
  int64_t units_;
  Chunk<T> chunk_;
  Pairs2D pairs_;
  RowsAhead<T> ahead_;
  Sequence sequence_{};
  int64_t per_unit_ = 1, state_size_ = 0, unit_ = 0, block_ = 0, bytes_ = 0;
  float denominator_grads_[kChunk];
  float *state_ = nullptr, *dstate_, *segment_states_, *block_states_, *halves_, *dv_rows_, *v_transposed_;
  float *dscores_, *grad_n_, *inverse_, *dq_inter_, *dq_intra_, *dk_inter_, *dk_intra_, *dv_chunk_, *gate_terms_;
  float *column_, *dk_, *dv_, *dg_;
};

}  // namespace subquad::cpu::SUBQUAD_ISA::gla
