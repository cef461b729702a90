// The dense path of the CATS MLP: all neurons, many tokens, the mask fused between the products. One instruction set.
//
// h is kept in the type the down product multiplies: float here, bf16 where the CPU has bf16 products (cpu_pairs.h), as
// a dense bf16 model rounds it. 0 * w_down enters the sum, so a non-finite w_down reaches every token, as in any dense
// layer.
#pragma once

#include "common/activations.h"
#include "common/integers.h"
#include "cpu/simd/products.h"
#include "ops/cats_mlp/cpu.h"

namespace subquad::cpu::SUBQUAD_ISA::cats {

using namespace products;

// The down product adds kOuterRows neurons at a time to kColumns output columns: y stays in L2, the weights' tile in
// L1.
constexpr int64_t kColumns = 256;
constexpr int kOuterRows = 32;

/// a[j] = act(z[j] + offset) for one neuron and all tokens of a block: a plain loop that vectorises.
template <Activation kAct>
inline void activate_block(const float* z, float offset, float* a) {
  for (int j = 0; j < kMaxTokens; ++j) a[j] = activate<kAct>(z[j] + offset);
}

inline void activate_block(Activation activation, const float* z, float offset, float* a) {
  switch (activation) {
    case Activation::kSilu:
      return activate_block<Activation::kSilu>(z, offset, a);
    case Activation::kGeluTanh:
      return activate_block<Activation::kGeluTanh>(z, offset, a);
    case Activation::kGelu:
      return activate_block<Activation::kGelu>(z, offset, a);
    default:
      return activate_block<Activation::kRelu>(z, offset, a);
  }
}

/// a = f(z + bias) of neuron i for kMaxTokens tokens, and which of them are active.
template <class W>
inline void gate_block(const CatsMlpParams& p, int64_t i, const float* z, float* a, uint8_t* active) {
  const float limit = p.threshold[i * p.threshold_stride];
  activate_block(p.activation, z, bias<W>(p.b_gate, i), a);
  for (int j = 0; j < kMaxTokens; ++j) active[j] = is_active(a[j], limit, p.inclusive);
}

/// A neuron that one token wants is active for all of them.
inline void unite(int64_t tokens, uint8_t* active) {
  uint8_t any = 0;
  for (int64_t t = 0; t < tokens; ++t) any |= active[t];
  std::memset(active, any, static_cast<size_t>(tokens));
}

/// u = h of neuron i, 0 where it is not active, from its up products u.
template <class W>
inline void hidden_block(const CatsMlpParams& p, int64_t i, const float* a, const uint8_t* active, float* u) {
  const float offset = bias<W>(p.b_up, i);
  for (int j = 0; j < kMaxTokens; ++j) {
    const float value = a[j] * (u[j] + offset);
    u[j] = active[j] ? value : 0.0f;
  }
}

/// h[:, begin:end]; begin is a multiple of kGroup.
template <class W>
inline void dense_hidden(const CatsMlpParams& p, const CatsMlpScratch& s, int64_t begin, int64_t end) {
  float a[kGroup][kDenseTokens], u[kGroup * kMaxTokens] = {};
  uint8_t active[kGroup][kDenseTokens];
  for (int64_t i = begin; i < end; i += kGroup) {
    const int count = static_cast<int>(end - i < kGroup ? end - i : kGroup);
    const auto products = [&](const void* weight, int64_t ld, int64_t t, int here) {
      dense_products(Rows<W>::consecutive(weight, ld, i, count, i + count), row<float>(s.x, t, s.ld_hidden),
                     s.ld_hidden, here, p.hidden, u);
    };
    const auto by_blocks = [&](const auto& block) {
      for (int64_t t = 0; t < p.tokens; t += kMaxTokens)
        block(t, static_cast<int>(p.tokens - t < kMaxTokens ? p.tokens - t : kMaxTokens));
    };
    by_blocks([&](int64_t t, int here) {
      products(p.w_gate, p.ld_gate, t, here);
      for (int r = 0; r < count; ++r) gate_block<W>(p, i + r, u + r * kMaxTokens, a[r] + t, active[r] + t);
    });
    for (int r = 0; r < count && p.union_mask; ++r) unite(p.tokens, active[r]);
    by_blocks([&](int64_t t, int here) {
      products(p.w_up, p.ld_up, t, here);
      for (int r = 0; r < count; ++r) hidden_block<W>(p, i + r, a[r] + t, active[r] + t, u + r * kMaxTokens);
      for (int j = 0; j < here; ++j) {
        float* h = static_cast<float*>(s.h) + (t + j) * s.ld_neurons;
        for (int r = 0; r < count; ++r) h[p.neuron_major ? i + r : packed_index<W>(i + r)] = u[r * kMaxTokens + j];
      }
    });
  }
}

/// y[:, begin:end] for a row-major w_down: dot products along the neurons.
template <class W>
inline void dense_down_dots(const CatsMlpParams& p, const CatsMlpScratch& s, int64_t begin, int64_t end) {
  float sums[kGroup * kMaxTokens];
  for (int64_t o = begin; o < end; o += kGroup) {
    const int count = static_cast<int>(end - o < kGroup ? end - o : kGroup);
    for (int64_t t = 0; t < p.tokens; t += kMaxTokens) {
      const int here = static_cast<int>(p.tokens - t < kMaxTokens ? p.tokens - t : kMaxTokens);
      dense_products(Rows<W>::consecutive(p.w_down, p.ld_down, o, count, o + count), row<float>(s.h, t, s.ld_neurons),
                     s.ld_neurons, here, p.intermediate, sums);
      for (int r = 0; r < count; ++r) {
        const float offset = bias<W>(p.b_down, o + r);
        for (int j = 0; j < here; ++j)
          static_cast<W*>(p.y)[(t + j) * p.hidden + o + r] = from_float<W>(sums[r * kMaxTokens + j] + offset);
      }
    }
  }
}

/// Calls add<T>(t) for tokens t, t + T, ... so that all are covered, the widest tiles first.
template <int T, class F>
inline void by_tokens(int64_t tokens, const F& add) {
  int64_t t = 0;
  for (; t + T <= tokens; t += T) add.template operator()<T>(t);
  for (; t < tokens; ++t) add.template operator()<1>(t);
}

/// Outer products of up to kOuterRows weight rows with h, added to y [tokens, columns], whose columns are padded and
/// packed.
template <class W>
inline void add_outer(const W* const* rows, int count, int64_t columns, const float* h, int64_t ldh, float* y,
                      int64_t ldy, int64_t tokens) {
  constexpr int kV = kLanes == 16 ? 4 : 2;
  float tile[kOuterRows * kColumns];
  for (int r = 0; r < count; ++r) widen_row(rows[r], columns, tile + r * kColumns);
  const int64_t n = round_up(columns, kBlock);
  int64_t k = 0;
  const auto whole = [&]<int T>(int64_t t) {
    outer_tile<kV, T>(tile + k, kColumns, count, h + t * ldh, ldh, y + t * ldy + k, ldy);
  };
  const auto rest = [&]<int T>(int64_t t) {
    outer_tile<1, T>(tile + k, kColumns, count, h + t * ldh, ldh, y + t * ldy + k, ldy);
  };
  for (; k + kV * kLanes <= n; k += kV * kLanes) by_tokens<4>(tokens, whole);
  for (; k < n; k += kLanes) by_tokens<4>(tokens, rest);
}

/// y[:, begin:end] for a neuron-major w_down: outer products, a group of neurons at a time, in neuron order.
template <class W>
inline void dense_down_outer(const CatsMlpParams& p, const CatsMlpScratch& s, int64_t begin, int64_t end) {
  for (int64_t o = begin; o < end; o += kColumns) {
    const int64_t columns = end - o < kColumns ? end - o : kColumns;
    float* y = s.partial + o;
    const int64_t padded = round_up(columns, kBlock);
    for (int64_t t = 0; t < p.tokens; ++t)
      std::memset(y + t * s.ld_hidden, 0, static_cast<size_t>(padded) * sizeof(float));
    for (int64_t i = 0; i < p.intermediate; i += kOuterRows) {
      const int count = static_cast<int>(p.intermediate - i < kOuterRows ? p.intermediate - i : kOuterRows);
      const W* rows[kOuterRows];
      for (int r = 0; r < count; ++r) {
        rows[r] = row<W>(p.w_down, i + r, p.ld_down) + o;
        if (i + kOuterRows + r >= p.intermediate) continue;
        for (int64_t k = 0; k < columns; k += kBlock) prefetch_block(rows[r] + kOuterRows * p.ld_down, k);
      }
      add_outer(rows, count, columns, static_cast<const float*>(s.h) + i, s.ld_neurons, y, s.ld_hidden, p.tokens);
    }
    for (int64_t t = 0; t < p.tokens; ++t) {
      W* out = static_cast<W*>(p.y) + t * p.hidden + o;
      for (int64_t c = 0; c < columns; ++c) {
        out[c] = from_float<W>(y[t * s.ld_hidden + packed_index<W>(c)] + bias<W>(p.b_down, o + c));
      }
    }
  }
}

template <class W>
inline void dense_down(const CatsMlpParams& p, const CatsMlpScratch& s, int64_t begin, int64_t end) {
  p.neuron_major ? dense_down_outer<W>(p, s, begin, end) : dense_down_dots<W>(p, s, begin, end);
}

}  // namespace subquad::cpu::SUBQUAD_ISA::cats
