// The CATS gated MLP for one CPU instruction set. See cats_mlp.h for the plan; x86-64 levels are chosen at run time.
#include "cpu/cats_mlp.h"

#include "common/cats_math.h"
#include "cpu/dot.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

constexpr int kRows = 4;                               // weight rows in flight: enough streams to reach memory bandwidth
constexpr int kTokens = Vec::kLanes == 16 ? 4 : 2;     // tokens per tile of the dense products; bounded by registers
constexpr int kMaxTokens = static_cast<int>(kCatsMaxTokens);
constexpr int kGroup = 16;                             // neurons per round of the batched path: their rows stay in L2
constexpr int kRound = 512;                            // neurons per round of the single-token path: bounds its lists

/// Elements of the hidden dimension per pass: the tokens' slices of that length share L1 with the weights.
int64_t slice_length(int64_t tokens, int64_t n) {
  if (tokens == 1) return n;
  return tokens <= 2 ? 2048 : tokens <= 4 ? 1024 : tokens <= 8 ? 512 : 256;
}

template <class W>
const W* row(const void* base, int64_t index, int64_t ld) {
  return static_cast<const W*>(base) + index * ld;
}

template <class W>
float bias(const void* b, int64_t index) {
  return b == nullptr ? 0.0f : to_float(static_cast<const W*>(b)[index]);
}

/// out[r * kMaxTokens + t] += rows[r] . x[t] over [0, n), for `count` rows and all tokens. next[r]: fetched meanwhile.
template <class W, int R>
void dots_of_rows(const W* const* rows, const W* const* next, const float* x, int64_t ldx, int tokens, int64_t n, Vec* acc) {
  const float* at[kTokens];
  int t = 0;
  for (; t + kTokens <= tokens; t += kTokens) {
    for (int j = 0; j < kTokens; ++j) at[j] = x + (t + j) * ldx;
    if (t == 0) {
      dot_tile<W, R, kTokens, true>(rows, next, at, n, acc, kMaxTokens);
    } else {
      dot_tile<W, R, kTokens, false>(rows, next, at, n, acc + t, kMaxTokens);
    }
  }
  for (; t < tokens; ++t) {
    at[0] = x + t * ldx;
    if (t == 0) {
      dot_tile<W, R, 1, true>(rows, next, at, n, acc, kMaxTokens);
    } else {
      dot_tile<W, R, 1, false>(rows, next, at, n, acc + t, kMaxTokens);
    }
  }
}

/// out[r * kMaxTokens + t] = base[r-th row] . x[t] for up to kGroup consecutive rows and all tokens.
template <class W>
void dense_products(const W* base, int64_t ld, int count, int following, const float* x, int64_t ldx, int tokens, int64_t n,
                    float* out) {
  Vec acc[kGroup * kMaxTokens];
  for (int r = 0; r < count; ++r)
    for (int t = 0; t < tokens; ++t) acc[r * kMaxTokens + t] = vec_zero();
  const int64_t slice = slice_length(tokens, n);
  for (int64_t k = 0; k < n; k += slice) {
    const int64_t length = n - k < slice ? n - k : slice;
    const bool last = k + length == n;
    for (int r = 0; r < count;) {
      const int here = count - r >= kRows ? kRows : 1;
      const W *rows[kRows], *next[kRows];
      for (int j = 0; j < here; ++j) {
        rows[j] = base + (r + j) * ld + k;
        const int ahead = r + j + here < count + following ? r + j + here : r + j;
        next[j] = tokens == 1 ? base + ahead * ld : last ? base + (r + j + (following >= count ? count : 0)) * ld : rows[j] + slice;
      }
      Vec* sums = acc + r * kMaxTokens;
      if (here == kRows) {
        dots_of_rows<W, kRows>(rows, next, x + k, ldx, tokens, length, sums);
      } else {
        dots_of_rows<W, 1>(rows, next, x + k, ldx, tokens, length, sums);
      }
      r += here;
    }
  }
  for (int r = 0; r < count; ++r)
    for (int t = 0; t < tokens; ++t) out[r * kMaxTokens + t] = vec_sum(acc[r * kMaxTokens + t]);
}

/// Records h of one active neuron for the row-major down pass.
template <class W>
void keep(const CatsMlpScratch& s, const CatsMlpParams& p, int64_t token, int64_t neuron, float h) {
  s.h[token * s.neurons + packed_index<W>(neuron)] = h;
  s.alive[token * p.intermediate + neuron] = 1;
}

template <class W, int R>
void single_up_down(const CatsMlpParams& p, const CatsMlpScratch& s, const int64_t* index, const float* activation, int64_t left,
                    float* y) {
  const W *up[R], *down[R], *next[R];
  Vec acc[R];
  for (int r = 0; r < R; ++r) {
    up[r] = row<W>(p.w_up, index[r], p.ld_up);
    down[r] = p.neuron_major ? row<W>(p.w_down, index[r], p.ld_down) : up[r];
    next[r] = row<W>(p.w_up, index[r + R < left ? r + R : r], p.ld_up);
    acc[r] = vec_zero();
  }
  const float* x = s.x;
  dot_tile<W, R, 1, true>(up, down, &x, p.hidden, acc, 1);
  float h[R];
  for (int r = 0; r < R; ++r) h[r] = activation[r] * (vec_sum(acc[r]) + bias<W>(p.b_up, index[r]));
  if (p.neuron_major) {
    axpy_rows<W, R, true>(down, next, h, y, p.hidden);
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
      const int following = static_cast<int>(stop - i - count < kGroup ? stop - i - count : kGroup);
      dense_products(row<W>(p.w_gate, i, p.ld_gate), p.ld_gate, count, following, s.x, s.hidden, 1, p.hidden, z);
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
  int rows;                              // neurons that at least one token wants
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

template <class W>
void batch_up(const CatsMlpParams& p, const CatsMlpScratch& s, Round& round) {
  Vec acc[kGroup * kMaxTokens];
  for (Vec& a : acc) a = vec_zero();
  const int64_t slice = slice_length(p.tokens, p.hidden);
  for (int64_t k = 0; k < p.hidden; k += slice) {
    const int64_t length = p.hidden - k < slice ? p.hidden - k : slice;
    for (int r = 0; r < round.rows; ++r) {
      const W* up = row<W>(p.w_up, round.neuron[r], p.ld_up) + k;
      const W* next = k + length < p.hidden ? up + slice : p.neuron_major ? row<W>(p.w_down, round.neuron[r], p.ld_down) : up;
      const float* x[4];
      const int wanting = round.wanting[r];
      for (int j = 0; j < wanting;) {
        const int here = wanting - j >= 4 ? 4 : 1;
        for (int t = 0; t < here; ++t) x[t] = s.x + round.token[r][j + t] * s.hidden + k;
        Vec* sums = acc + r * kMaxTokens + j;
        if (here == 4 && j == 0) {
          dot_tile<W, 1, 4, true>(&up, &next, x, length, sums, 0);
        } else if (here == 4) {
          dot_tile<W, 1, 4, false>(&up, &next, x, length, sums, 0);
        } else if (j == 0) {
          dot_tile<W, 1, 1, true>(&up, &next, x, length, sums, 0);
        } else {
          dot_tile<W, 1, 1, false>(&up, &next, x, length, sums, 0);
        }
        j += here;
      }
    }
  }
  for (int r = 0; r < round.rows; ++r) {
    const float offset = bias<W>(p.b_up, round.neuron[r]);
    for (int j = 0; j < round.wanting[r]; ++j) {
      const int t = round.token[r][j];
      round.h[r][t] = round.activation[r][t] * (vec_sum(acc[r * kMaxTokens + j]) + offset);
    }
  }
}

template <class W>
void batch_down(const CatsMlpParams& p, const CatsMlpScratch& s, const Round& round, float* partial) {
  const int tokens = static_cast<int>(p.tokens);
  int rows_of[kMaxTokens], wanted[kMaxTokens][kGroup];
  float factor[kMaxTokens][kGroup];
  for (int t = 0; t < tokens; ++t) rows_of[t] = 0;
  for (int r = 0; r < round.rows; ++r) {
    for (int j = 0; j < round.wanting[r]; ++j) {
      const int t = round.token[r][j];
      wanted[t][rows_of[t]] = r;
      factor[t][rows_of[t]++] = round.h[r][t];
    }
  }
  const int64_t slice = slice_length(p.tokens, p.hidden);
  for (int64_t k = 0; k < p.hidden; k += slice) {
    const int64_t length = p.hidden - k < slice ? p.hidden - k : slice;
    const int64_t ahead = p.hidden - k - length < slice ? p.hidden - k - length : slice;
    for (int t = 0; t < tokens; ++t) {
      for (int r = t; r < round.rows; r += tokens) {  // spread over the tokens, so that fetches overlap arithmetic
        const char* from = reinterpret_cast<const char*>(row<W>(p.w_down, round.neuron[r], p.ld_down) + k + length);
        for (int64_t byte = 0; byte < ahead * static_cast<int64_t>(sizeof(W)); byte += 64) prefetch(from + byte);
      }
      float* y = partial + t * s.hidden + k;
      const W* down[kRows];
      for (int j = 0; j < rows_of[t];) {
        const int here = rows_of[t] - j >= kRows ? kRows : 1;
        for (int r = 0; r < here; ++r) down[r] = row<W>(p.w_down, round.neuron[wanted[t][j + r]], p.ld_down) + k;
        if (here == kRows) {
          axpy_rows<W, kRows, false>(down, down, factor[t] + j, y, length);
        } else {
          axpy_rows<W, 1, false>(down, down, factor[t] + j, y, length);
        }
        j += here;
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
    const int following = static_cast<int>(end - i - count < kGroup ? end - i - count : kGroup);
    dense_products(row<W>(p.w_gate, i, p.ld_gate), p.ld_gate, count, following, s.x, s.hidden, static_cast<int>(p.tokens),
                   p.hidden, z);
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

template <class W>
void pack(const CatsMlpParams& p, const CatsMlpScratch& s) {
  for (int64_t t = 0; t < p.tokens; ++t) {
    float* out = s.x + t * s.hidden;
    const W* in = row<W>(p.x, t, p.hidden);
    std::memset(out + p.hidden / kBlock * kBlock, 0, static_cast<size_t>(s.hidden - p.hidden / kBlock * kBlock) * sizeof(float));
    for (int64_t i = 0; i < p.hidden; ++i) out[packed_index<W>(i)] = to_float(in[i]);
  }
  if (!p.neuron_major) {
    std::memset(s.h, 0, static_cast<size_t>(p.tokens * s.neurons) * sizeof(float));
    std::memset(s.alive, 0, static_cast<size_t>(p.tokens * p.intermediate));
  }
}

template <class W>
void chunk(const CatsMlpParams& p, const CatsMlpScratch& s, int64_t c) {
  const int64_t begin = p.intermediate * c / s.chunks, end = p.intermediate * (c + 1) / s.chunks;
  float* partial = nullptr;
  if (p.neuron_major) {
    partial = s.partial + c * p.tokens * s.hidden;
    std::memset(partial, 0, static_cast<size_t>(p.tokens * s.hidden) * sizeof(float));
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
      const float* from = s.partial + (c * p.tokens + token) * s.hidden + k;
      low = vec_add(low, vec_load(from));
      high = vec_add(high, vec_load(from + Vec::kLanes));
    }
    float sum[kBlock];
    vec_store(sum, low);
    vec_store(sum + Vec::kLanes, high);
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
    if (s.alive[token * p.intermediate + i]) sum += to_float(down[i]) * s.h[token * s.neurons + packed_index<W>(i)];
  }
  return sum;
}

template <class W>
void down(const CatsMlpParams& p, const CatsMlpScratch& s, int64_t begin, int64_t end) {
  float sums[kGroup * kMaxTokens];
  for (int64_t o = begin; o < end; o += kGroup) {
    const int count = static_cast<int>(end - o < kGroup ? end - o : kGroup);
    const int following = static_cast<int>(end - o - count < kGroup ? end - o - count : kGroup);
    dense_products(row<W>(p.w_down, o, p.ld_down), p.ld_down, count, following, s.h, s.neurons, static_cast<int>(p.tokens),
                   p.intermediate, sums);
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
  return {kBlock, pack<W>, chunk<W>, reduce<W>, down<W>};
}

}  // namespace

CatsMlpKernels cats_mlp_kernels(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return kernels<BFloat16>();
    case DType::kHalf:
      return kernels<Half>();
    default:
      return kernels<float>();
  }
}

}  // namespace subquad::cpu::SUBQUAD_ISA
