// The CATS gated MLP for one CPU instruction set. See cats_mlp.h for the plan; x86-64 levels are chosen at run time.
#include "ops/cats_mlp/cpu.h"

#include "common/activations.h"
#include "cpu/simd/products.h"
#include "ops/cats_mlp/cpu_dense.h"
#include "ops/cats_mlp/cpu_pairs.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using namespace cats;
using namespace products;

static_assert(kMaxTokens == kCatsMaxTokens);

constexpr int kRound = 512;  // neurons per round of the single-token path: bounds its lists

/// Records h of one active neuron for the row-major down pass.
template <class W>
void keep(const CatsMlpScratch& s, const CatsMlpParams& p, int64_t token, int64_t neuron, float h) {
  static_cast<float*>(s.h)[token * s.ld_neurons + packed_index<W>(neuron)] = h;
  s.alive[token * p.intermediate + neuron] = 1;
}

template <class W, int R>
void single_up_down(const CatsMlpParams& p, const CatsMlpScratch& s, const int64_t* index, const float* activation,
                    int64_t left, float* y) {
  const W *up[R], *down[R], *next[R];
  Vec acc[R];
  for (int r = 0; r < R; ++r) {
    up[r] = row<W>(p.w_up, index[r], p.ld_up);
    down[r] = p.neuron_major ? row<W>(p.w_down, index[r], p.ld_down) : up[r];
    next[r] = row<W>(p.w_up, index[r + R < left ? r + R : r], p.ld_up);
    acc[r] = vec_zero();
  }
  const auto* x = row<typename Input<W>::Type>(s.x, 0, 0);
  dot_tile<W, R, 1>(up, down, &x, p.hidden, acc, 1);
  float h[R];
  for (int r = 0; r < R; ++r) h[r] = activation[r] * (vec_sum(acc[r]) + bias<W>(p.b_up, index[r]));
  if (p.neuron_major) {
    axpy_rows<W, R>(down, next, h, y, p.hidden);
  } else {
    for (int r = 0; r < R; ++r) keep<W>(s, p, 0, index[r], h[r]);
  }
}

template <class W>
void single_token(const CatsMlpParams& p, const CatsMlpScratch& s, int64_t begin, int64_t end, float* y) {
  int64_t index[kRound];
  float activation[kRound], z[kGroup * kMaxTokens];
  for (int64_t base = begin; base < end; base += kRound) {
    const int64_t stop = base + kRound < end ? base + kRound : end;
    int64_t active = 0;
    for (int64_t i = base; i < stop; i += kGroup) {
      const int count = static_cast<int>(stop - i < kGroup ? stop - i : kGroup);
      dense_products(Rows<W>::consecutive(p.w_gate, p.ld_gate, i, count, stop), row<typename Input<W>::Type>(s.x, 0, 0),
                     s.ld_hidden, 1, p.hidden, z);
      for (int r = 0; r < count; ++r) {
        const float a = activate(p.activation, z[r * kMaxTokens] + bias<W>(p.b_gate, i + r));
        if (!is_active(a, p.threshold[(i + r) * p.threshold_stride], p.inclusive)) continue;
        index[active] = i + r;
        activation[active++] = a;
      }
    }
    int64_t j = 0;
    for (; j + kRows <= active; j += kRows) single_up_down<W, kRows>(p, s, index + j, activation + j, active - j, y);
    for (; j < active; ++j) single_up_down<W, 1>(p, s, index + j, activation + j, active - j, y);
  }
}

/// The active neurons of one round: which token wants which, and their rows.
struct Round {
  int rows;  // neurons that at least one token wants
  int64_t neuron[kGroup];
  int wanting[kGroup];                   // tokens per row
  int token[kGroup][kMaxTokens];         // which ones, ascending
  float activation[kGroup][kMaxTokens];  // by token
  float h[kGroup][kMaxTokens];           // by token
};

template <class W>
void collect(const CatsMlpParams& p, int64_t first, int count, const float* z, Round& round) {
  const int tokens = static_cast<int>(p.tokens);
  round.rows = 0;
  for (int r = 0; r < count; ++r) {
    const int64_t i = first + r;
    const float limit = p.threshold[i * p.threshold_stride], offset = bias<W>(p.b_gate, i);
    const int slot = round.rows;
    int wanting = 0;
    for (int t = 0; t < tokens; ++t) {
      const float a = activate(p.activation, z[r * kMaxTokens + t] + offset);
      round.activation[slot][t] = a;
      if (is_active(a, limit, p.inclusive)) round.token[slot][wanting++] = t;
    }
    if (wanting == 0) continue;
    if (p.union_mask) {
      for (wanting = 0; wanting < tokens; ++wanting) round.token[slot][wanting] = wanting;
    }
    round.neuron[slot] = i;
    round.wanting[slot] = wanting;
    ++round.rows;
  }
}

/// Calls tile<T>(j) for T = kMost, kMost / 2, ..., 1 so that [0, n) is covered, the widest tiles first.
template <int kMost, class F>
void in_tiles(int n, const F& tile, int begin = 0) {
  int j = begin;
  for (; j + kMost <= n; j += kMost) tile.template operator()<kMost>(j);
  if constexpr (kMost > 1) in_tiles<kMost / 2>(n, tile, j);
}

/// Elements of the hidden dimension per pass over the rows of a round: the tokens' slices of that length stay in L1.
int64_t slice_length(int64_t tokens) { return tokens <= 2 ? 2048 : tokens <= 4 ? 1024 : tokens <= 8 ? 512 : 256; }

/// The up products that somebody wants, row by row: out[r * kMaxTokens + j] for the j-th token wanting row r.
template <class W>
void wanted_products(const CatsMlpParams& p, const CatsMlpScratch& s, const Round& round, const Rows<W>& rows,
                     float* out) {
  using X = typename Input<W>::Type;
  Vec acc[kGroup * kMaxTokens];
  for (Vec& a : acc) a = vec_zero();
  const int64_t slice = slice_length(p.tokens);
  for (int64_t k = 0; k < p.hidden; k += slice) {
    const int64_t length = p.hidden - k < slice ? p.hidden - k : slice;
    for (int r = 0; r < round.rows; ++r) {
      const W* up = rows.at[r] + k;
      const W* next = k + length < p.hidden ? up + slice : rows.at[rows.ahead > 0 ? rows.count + r : r];
      const int* wanting = round.token[r];
      const auto tile = [&]<int T>(int j) {
        const X* x[T];
        for (int t = 0; t < T; ++t) x[t] = row<X>(s.x, wanting[j + t], s.ld_hidden) + k;
        dot_tile<W, 1, T>(&up, &next, x, length, acc + r * kMaxTokens + j, 0);
      };
      in_tiles<kWide>(round.wanting[r], tile);
    }
  }
  for (int i = 0; i < round.rows * kMaxTokens; ++i) out[i] = vec_sum(acc[i]);
}

template <class W>
void batch_up(const CatsMlpParams& p, const CatsMlpScratch& s, Round& round) {
  const int tokens = static_cast<int>(p.tokens);
  Rows<W> rows;
  int wanted = 0;
  rows.count = round.rows;
  rows.ahead = p.neuron_major ? round.rows : 0;
  for (int r = 0; r < round.rows; ++r) {
    rows.at[r] = row<W>(p.w_up, round.neuron[r], p.ld_up);
    rows.at[round.rows + r] = row<W>(p.w_down, p.neuron_major ? round.neuron[r] : 0, p.ld_down);
    wanted += round.wanting[r];
  }
  // Tiles of rows and tokens need half the loads of a single row's: worth computing up to three times as many products.
  const bool dense = 3 * wanted > round.rows * tokens;
  float u[kGroup * kMaxTokens];
  if (dense) {
    dense_products(rows, row<typename Input<W>::Type>(s.x, 0, 0), s.ld_hidden, tokens, p.hidden, u);
  } else {
    wanted_products(p, s, round, rows, u);
  }
  for (int r = 0; r < round.rows; ++r) {
    const float offset = bias<W>(p.b_up, round.neuron[r]);
    for (int j = 0; j < round.wanting[r]; ++j) {
      const int t = round.token[r][j];
      round.h[r][t] = round.activation[r][t] * (u[r * kMaxTokens + (dense ? t : j)] + offset);
    }
  }
}

/// partial[t] += h[t] * down rows, slice by slice: the rows are widened once into L1 and then added for every token.
template <class W>
void batch_down(const CatsMlpParams& p, const CatsMlpScratch& s, const Round& round, float* partial) {
  constexpr int64_t kTile = 256;
  constexpr int kRun = 8;  // vectors of y in registers
  const int tokens = static_cast<int>(p.tokens);
  int rows_of[kMaxTokens] = {}, wanted[kMaxTokens][kGroup];
  float factor[kMaxTokens][kGroup], tile[kGroup * kTile];
  for (int r = 0; r < round.rows; ++r) {
    for (int j = 0; j < round.wanting[r]; ++j) {
      const int t = round.token[r][j];
      wanted[t][rows_of[t]] = r;
      factor[t][rows_of[t]++] = round.h[r][t];
    }
  }
  for (int64_t k = 0; k < p.hidden; k += kTile) {
    const int64_t length = p.hidden - k < kTile ? p.hidden - k : kTile;
    for (int r = 0; r < round.rows; ++r) {
      widen_row(row<W>(p.w_down, round.neuron[r], p.ld_down) + k, length, tile + r * kTile);
    }
    const int64_t ahead = p.hidden - k - length < kTile ? p.hidden - k - length : kTile;
    for (int t = 0; t < tokens; ++t) {
      for (int r = t; r < round.rows; r += tokens) {  // fetches spread over the tokens, behind their arithmetic
        const W* next = row<W>(p.w_down, round.neuron[r], p.ld_down) + k + length;
        for (int64_t i = 0; i < ahead; i += kBlock) prefetch_block(next, i);
      }
      float* y = partial + t * s.ld_hidden + k;
      for (int64_t c = 0; c < length;) {
        const bool wide = length - c >= kRun * kLanes;
        if (wide) {
          add_rows<kRun>(tile + c, kTile, wanted[t], factor[t], rows_of[t], y + c);
        } else {
          add_rows<2>(tile + c, kTile, wanted[t], factor[t], rows_of[t], y + c);
        }
        c += (wide ? kRun : 2) * kLanes;
      }
    }
  }
}

template <class W>
void batch_tokens(const CatsMlpParams& p, const CatsMlpScratch& s, int64_t begin, int64_t end, float* partial) {
  float z[kGroup * kMaxTokens];
  Round round;
  for (int64_t i = begin; i < end; i += kGroup) {
    const int count = static_cast<int>(end - i < kGroup ? end - i : kGroup);
    dense_products(Rows<W>::consecutive(p.w_gate, p.ld_gate, i, count, end), row<typename Input<W>::Type>(s.x, 0, 0),
                   s.ld_hidden, static_cast<int>(p.tokens), p.hidden, z);
    collect<W>(p, i, count, z, round);
    batch_up<W>(p, s, round);
    if (p.neuron_major) {
      batch_down<W>(p, s, round, partial);
    } else {
      for (int r = 0; r < round.rows; ++r)
        for (int j = 0; j < round.wanting[r]; ++j) {
          const int t = round.token[r][j];
          keep<W>(s, p, t, round.neuron[r], round.h[r][t]);
        }
    }
  }
}

/// Whether the dense path is that of cpu_pairs.h.
template <class W>
constexpr bool kPairs = sizeof(typename Input<W>::Type) == 2;

template <class W>
void pack(const CatsMlpParams& p, const CatsMlpScratch& s) {
  using X = typename Input<W>::Type;
  const bool as_is = sizeof(X) == sizeof(W), dense = p.tokens > kCatsMaxTokens;
#if defined(__AVX512BF16__)
  if constexpr (kPairs<W>) {
    if (dense) return pack_panel(static_cast<const W*>(p.x), p.tokens, p.hidden, static_cast<W*>(s.x));
  }
#endif
  for (int64_t t = 0; t < p.tokens; ++t) {
    X* out = static_cast<X*>(s.x) + t * s.ld_hidden;
    const W* in = row<W>(p.x, t, p.hidden);
    const int64_t whole = p.hidden / kBlock * kBlock;
    std::memset(out + whole, 0, static_cast<size_t>(s.ld_hidden - whole) * sizeof(X));
    for (int64_t i = 0; i < p.hidden; ++i) out[as_is ? i : packed_index<W>(i)] = from_float<X>(to_float(in[i]));
  }
  if (dense || !p.neuron_major) {
    std::memset(s.h, 0, static_cast<size_t>(p.tokens * s.ld_neurons) * sizeof(float));
  }
  if (!dense && !p.neuron_major) std::memset(s.alive, 0, static_cast<size_t>(p.tokens * p.intermediate));
}

template <class W>
void chunk(const CatsMlpParams& p, const CatsMlpScratch& s, int64_t c) {
  const int64_t begin = p.intermediate * c / s.chunks, end = p.intermediate * (c + 1) / s.chunks;
  float* partial = nullptr;
  if (p.neuron_major) {
    partial = s.partial + c * p.tokens * s.ld_hidden;
    std::memset(partial, 0, static_cast<size_t>(p.tokens * s.ld_hidden) * sizeof(float));
  }
  if (p.tokens == 1) {
    single_token<W>(p, s, begin, end, partial);
  } else {
    batch_tokens<W>(p, s, begin, end, partial);
  }
}

template <class W>
void reduce(const CatsMlpParams& p, const CatsMlpScratch& s, int64_t token) {
  W* y = static_cast<W*>(p.y) + token * p.hidden;
  for (int64_t k = 0; k < p.hidden; k += kBlock) {
    Vec low = vec_zero(), high = vec_zero();
    for (int64_t c = 0; c < s.chunks; ++c) {
      const float* from = s.partial + (c * p.tokens + token) * s.ld_hidden + k;
      low = vec_add(low, vec_load(from));
      high = vec_add(high, vec_load(from + kLanes));
    }
    float sum[kBlock];
    vec_store(sum, low);
    vec_store(sum + kLanes, high);
    const int64_t count = p.hidden - k < kBlock ? p.hidden - k : kBlock;
    for (int64_t i = 0; i < count; ++i) y[k + i] = from_float<W>(sum[packed_index<W>(i)] + bias<W>(p.b_down, k + i));
  }
}

/// The same sum over the active neurons alone: a dense row would let 0 * Inf of a dead one through.
template <class W>
float selected_sum(const CatsMlpParams& p, const CatsMlpScratch& s, int64_t token, int64_t channel) {
  const W* down = row<W>(p.w_down, channel, p.ld_down);
  float sum = 0.0f;
  for (int64_t i = 0; i < p.intermediate; ++i) {
    if (s.alive[token * p.intermediate + i])
      sum += to_float(down[i]) * static_cast<const float*>(s.h)[token * s.ld_neurons + packed_index<W>(i)];
  }
  return sum;
}

template <class W>
void down(const CatsMlpParams& p, const CatsMlpScratch& s, int64_t begin, int64_t end) {
  float sums[kGroup * kMaxTokens];
  for (int64_t o = begin; o < end; o += kGroup) {
    const int count = static_cast<int>(end - o < kGroup ? end - o : kGroup);
    dense_products(Rows<W>::consecutive(p.w_down, p.ld_down, o, count, end), row<float>(s.h, 0, 0), s.ld_neurons,
                   static_cast<int>(p.tokens), p.intermediate, sums);
    for (int r = 0; r < count; ++r) {
      for (int64_t t = 0; t < p.tokens; ++t) {
        float sum = sums[r * kMaxTokens + t];
        if (!__builtin_isfinite(sum)) sum = selected_sum<W>(p, s, t, o + r);
        static_cast<W*>(p.y)[t * p.hidden + o + r] = from_float<W>(sum + bias<W>(p.b_down, o + r));
      }
    }
  }
}

template <class W>
constexpr CatsMlpKernels kernels() {
  CatsMlpKernels all{kBlock, sizeof(typename Input<W>::Type), pack<W>, chunk<W>, reduce<W>, down<W>, nullptr, nullptr};
  if constexpr (kPairs<W>) {
#if defined(__AVX512BF16__)
    all.dense_hidden = pairs_hidden, all.dense_down = pairs_down;
#endif
  } else {
    all.dense_hidden = dense_hidden<W>, all.dense_down = dense_down<W>;
  }
  return all;
}

}  // namespace

CatsMlpKernels cats_mlp_kernels(DType dtype) {
  return by_dtype<BFloat16, Half>(dtype, []<class T>(T) -> CatsMlpKernels { return kernels<T>(); });
}

}  // namespace subquad::cpu::SUBQUAD_ISA
