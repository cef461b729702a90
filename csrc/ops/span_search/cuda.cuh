// The search for spans, for a few queries (decoding): blocks score shares of the stripes, a warp chooses the best of a
// head's share and, where there are several shares, of what these chose. Forward only; correct for any number of
// queries, whose launches follow each other over one bounded scratch.
#pragma once

#include "cuda/rows.cuh"
#include "ops/span_search/params.h"

namespace subquad::cuda {

constexpr int kSearchWarps = 4;
constexpr int kSearchThreads = kSearchWarps * kWarp;
constexpr int kSearchHeads = 4;        // whose products are under way together
constexpr int64_t kHeldHeads = 32;     // whose queries are in shared memory at once
constexpr int64_t kHeldScores = 8192;  // likewise, unless there are more heads to a key
static_assert(kSpanSearchMaxDim == kMaxLaneRow && kSpanSearchMaxSpans <= kWarp);

/// From shapes alone.
struct SearchPlan {
  int lanes;       // of a warp that share a key
  int64_t share;   // stripes of a block
  int64_t splits;  // shares
  int64_t tokens;  // of a launch
};

/// What a share chose: `rank` decides, and of equals the farther stripe; `score` is the head's own.
struct alignas(16) SearchCandidate {
  float rank, score;
  int64_t stripe;  // -1: none
};

inline SearchPlan search_plan(const SpanSearchParams& p) {
  constexpr int64_t kBlocks = 528, kLeast = 32, kMost = 256;  // wanted: four for each of 132 processors
  const int64_t tokens = p.batch * p.tokens, group = p.heads / p.kv_heads;
  SearchPlan plan{};
  plan.lanes = lanes_of(p.d);
  plan.share = clamp(ceil_div(p.stripes * p.kv_heads * tokens, kBlocks), kLeast, kMost);
  plan.share = smaller(plan.share, larger(kHeldScores / larger(group, 1), 1));
  plan.splits = larger(ceil_div(p.stripes, plan.share), 1);
  const int64_t candidates = plan.splits == 1 ? 0 : p.heads * plan.splits * p.spans;
  plan.tokens = tokens_at_once(tokens, candidates * static_cast<int64_t>(sizeof(SearchCandidate)));
  return plan;
}

inline int64_t search_scratch_floats(const SpanSearchParams& p) {
  const SearchPlan plan = search_plan(p);
  if (plan.splits == 1) return 0;
  return smaller(plan.tokens, p.batch * p.tokens) * p.heads * plan.splits * p.spans *
         static_cast<int64_t>(sizeof(SearchCandidate) / sizeof(float));
}

/// Floats of shared memory: queries, scores, and the ranks of a group.
inline int64_t search_shared_floats(const SpanSearchParams& p, const SearchPlan& plan) {
  const int64_t group = p.heads / p.kv_heads, held = round_up(smaller(group, kHeldHeads), kSearchHeads);
  return held * plan.lanes * kLaneElems + (group + (p.per_group ? 1 : 0)) * plan.share;
}

// --- choosing

/// An entry of a list, `at`, with what orders it.
struct Ranked {
  float rank;
  int64_t stripe, at;

  /// NaN is before nothing, and nothing before it.
  __device__ bool before(const Ranked& other) const {
    return rank > other.rank || (rank == other.rank && stripe > other.stripe);
  }
};

/// The best of a list of n that is after `last`, for the whole warp; `entry(i)` is its rank and stripe. -inf and NaN
/// are not chosen: where nothing is left the stripe is -1.
template <class Entry>
__device__ __forceinline__ Ranked best_after(const Ranked& last, int64_t n, const Entry& entry) {
  Ranked best{-INFINITY, -1, 0};
  for (int64_t i = threadIdx.x % kWarp; i < n; i += kWarp) {
    const Ranked mine = entry(i);
    if (mine.rank > -INFINITY && mine.before(best) && last.before(mine)) best = mine;
  }
  SQ_UNROLL
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const Ranked other{__shfl_xor_sync(kFullWarp, best.rank, offset), __shfl_xor_sync(kFullWarp, best.stripe, offset),
                       __shfl_xor_sync(kFullWarp, best.at, offset)};
    if (other.before(best)) best = other;
  }
  return best;
}

/// The `spans` best of a list, in order: `chosen(s, entry)` is called by lane s, and by no other for that s.
template <class Entry, class Chosen>
__device__ __forceinline__ void choose(int64_t spans, int64_t n, const Entry& entry, const Chosen& chosen) {
  Ranked last{INFINITY, INT64_MAX, 0};
  for (int64_t s = 0; s < spans; ++s) {
    if (last.stripe >= 0) last = n > 0 ? best_after(last, n, entry) : Ranked{-INFINITY, -1, 0};
    if (threadIdx.x % kWarp == s) chosen(s, last);
  }
}

// --- rows

/// A query.
struct SearchRow {
  int64_t b, row;       // row: of [B, T]
  int64_t next, first;  // the key after its position; the first that it sees

  __device__ SearchRow(const SpanSearchParams& p, int64_t row)
      : b(row / p.tokens),
        row(row),
        next(int64_t{sq::load_nc(p.position + row)} + 1),
        first(larger(sq::load_nc(p.first + row), 0)) {}

  __device__ int64_t stripe(const SpanSearchParams& p, int64_t i) const { return next - sq::load_nc(p.offsets + i); }
};

/// Span s of head h, or none where the stripe is -1.
__device__ __forceinline__ void store_span(const SpanSearchParams& p, const SearchRow& row, int64_t h, int64_t s,
                                           float score, int64_t stripe) {
  const int64_t at = (row.row * p.heads + h) * p.spans + s;
  const bool none = stripe < 0;
  const int64_t anchor = none ? -1 : row.stripe(p, stripe);
  const int64_t start = larger(anchor - sq::load_nc(p.back + row.row), row.first);
  const int64_t end = smaller(anchor + sq::load_nc(p.ahead + row.row), sq::load_nc(p.last + row.row));
  sq::store(p.score + at, none ? -INFINITY : score);
  sq::store(p.anchor + at, static_cast<int32_t>(anchor));
  sq::store(p.start + at, none ? -1 : static_cast<int32_t>(start));
  sq::store(p.end + at, none ? -1 : static_cast<int32_t>(end));
}

// --- a share of the stripes

/// scores[g * share + j] of head g of the group and stripe `begin` + j: -inf where it cannot be chosen.
template <class T, bool kAligned>
__device__ __forceinline__ void score_stripes(const SpanSearchParams& p, const SearchPlan& plan, const SearchRow& row,
                                              int64_t kv_head, int64_t begin, int count, float* query, float* scores) {
  constexpr int kDepth = 4;  // keys of a lane that are under way together
  const RowLane lane(plan.lanes, kSearchWarps);
  const int width = lane.width(), group = static_cast<int>(p.heads / p.kv_heads), share = static_cast<int>(plan.share);
  const T* q = static_cast<const T*>(p.q) + row.b * p.q_stride_b + row.row % p.tokens * p.q_stride_t +
               kv_head * group * p.q_stride_h;
  const bool* key_mask = p.key_mask == nullptr ? nullptr : p.key_mask + row.b * p.keys;
  for (int held = 0; held < group; held += kHeldHeads) {
    const int heads = static_cast<int>(smaller(group - held, kHeldHeads));
    const int padded = static_cast<int>(round_up(heads, kSearchHeads));
    if (held > 0) __syncthreads();  // the last heads' queries may still be being read
    for (int i = static_cast<int>(threadIdx.x); i < padded * width; i += kSearchThreads) {
      const int r = i / width, c = i % width;
      const bool live = r < heads && c < p.d;
      query[r * width + lane_slot<T>(c, width)] =
          live ? sq::to_float(sq::load_nc(q + (held + r) * p.q_stride_h + c)) : 0.0f;
    }
    __syncthreads();
    for (int first = 0; first + lane.first_unit() < count; first += lane.units * kDepth) {
      LaneRow<T> rows[kDepth];
      bool possible[kDepth];
      SQ_UNROLL
      for (int u = 0; u < kDepth; ++u) {
        const int j = first + u * lane.units + lane.unit;
        const int64_t key = j < count ? row.stripe(p, begin + j) : -1;
        possible[u] = key >= row.first && key < p.keys && is_kept(key_mask, key);
        const T* k = static_cast<const T*>(p.k);
        if (possible[u]) k += row_offset(p.keys_at, row.b, key, kv_head);
        rows[u] = load_lane_row<kAligned>(k, possible[u] ? p.d : 0, lane);
      }
      for (int r = 0; r < padded; r += kSearchHeads) {
        float dots[kSearchHeads][kDepth] = {};
        SQ_UNROLL
        for (int n = 0; n < 2; ++n) {
          FloatQuad of_head[kSearchHeads];
          SQ_UNROLL
          for (int i = 0; i < kSearchHeads; ++i) of_head[i] = *lane_quad(query + (r + i) * width, n, lane);
          SQ_UNROLL
          for (int u = 0; u < kDepth; ++u) {
            float k[kLaneElems];
            to_floats(rows[u], k);
            SQ_UNROLL
            for (int i = 0; i < kSearchHeads; ++i) {
              SQ_UNROLL
              for (int e = 0; e < 4; ++e) dots[i][u] = fmaf(of_head[i].v[e], k[n * 4 + e], dots[i][u]);
            }
          }
        }
        for (int offset = lane.lanes / 2; offset > 0; offset /= 2) {
          SQ_UNROLL
          for (int i = 0; i < kSearchHeads; ++i) {
            SQ_UNROLL
            for (int u = 0; u < kDepth; ++u) dots[i][u] += __shfl_xor_sync(kFullWarp, dots[i][u], offset);
          }
        }
        SQ_UNROLL
        for (int i = 0; i < kSearchHeads; ++i) {
          SQ_UNROLL
          for (int u = 0; u < kDepth; ++u) {
            const int j = first + u * lane.units + lane.unit;
            if (lane.sub != i || r + i >= heads || j >= count) continue;
            scores[(held + r + i) * share + j] = possible[u] ? dots[i][u] * p.scale : -INFINITY;
          }
        }
      }
    }
  }
}

/// The best stripes of one share, for the heads of one key head.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kSearchThreads, 4)
    span_search_split_kernel(const SpanSearchParams p, const SearchPlan plan, int64_t first_token,
                             SearchCandidate* __restrict__ scratch) {
  SQ_DYNAMIC_SHARED(float, memory);
  const int64_t split = blockIdx.x % plan.splits, kv_head = blockIdx.x / plan.splits % p.kv_heads;
  const int64_t n = blockIdx.x / plan.splits / p.kv_heads, group = p.heads / p.kv_heads, begin = split * plan.share;
  const SearchRow row(p, first_token + n);
  int count = static_cast<int>(clamp(p.stripes - begin, 0, plan.share));
  if (count > 0 && row.stripe(p, begin) < row.first) count = 0;  // nor is any farther one seen
  float* const query = memory;
  float* const scores = query + round_up(smaller(group, kHeldHeads), kSearchHeads) * plan.lanes * kLaneElems;
  float* const ranks = scores + group * plan.share;  // where heads choose together
  if (count > 0) score_stripes<T, kAligned>(p, plan, row, kv_head, begin, count, query, scores);
  __syncthreads();
  if (p.per_group) {
    for (int j = static_cast<int>(threadIdx.x); j < count; j += kSearchThreads) {
      float sum = 0.0f;
      for (int64_t g = 0; g < group; ++g) sum += scores[g * plan.share + j];
      ranks[j] = sum;
    }
    __syncthreads();
  }
  for (int64_t g = threadIdx.x / kWarp; g < group; g += kSearchWarps) {
    const float* const own = scores + g * plan.share;
    const float* const list = p.per_group ? ranks : own;
    const auto entry = [&](int64_t i) { return Ranked{list[i], begin + i, i}; };
    choose(p.spans, count, entry, [&](int64_t s, const Ranked& found) {
      const int64_t h = kv_head * group + g;
      const float score = found.stripe < 0 ? -INFINITY : own[found.at];
      if (plan.splits == 1) {
        store_span(p, row, h, s, score, found.stripe);
      } else {
        sq::store(scratch + ((n * p.heads + h) * plan.splits + split) * p.spans + s,
                  SearchCandidate{found.rank, score, found.stripe});
      }
    });
  }
}

/// The best of all shares' choices; a warp for each of `rows` heads of queries.
template <class = void>
__global__ void __launch_bounds__(kSearchThreads)
    span_search_merge_kernel(const SpanSearchParams p, const SearchPlan plan, int64_t first_token, int rows,
                             const SearchCandidate* __restrict__ scratch) {
  const int at = static_cast<int>(blockIdx.x * kSearchWarps + threadIdx.x / kWarp);
  if (at >= rows) return;
  const int heads = static_cast<int>(p.heads), h = at % heads;
  const SearchRow row(p, first_token + at / heads);
  const SearchCandidate* const list = scratch + at * plan.splits * p.spans;
  const auto entry = [&](int64_t i) {
    const SearchCandidate candidate = sq::load_nc(list + i);
    return Ranked{candidate.rank, candidate.stripe, i};
  };
  choose(p.spans, plan.splits * p.spans, entry, [&](int64_t s, const Ranked& found) {
    store_span(p, row, h, s, sq::load_nc(list + found.at).score, found.stripe);
  });
}

template <class T>
void span_search_forward(const SpanSearchParams& p, float* scratch, sq::stream_t stream) {
  const int64_t tokens = p.batch * p.tokens;
  if (tokens == 0 || p.heads == 0) return;
  const SearchPlan plan = search_plan(p);
  auto* const candidates = reinterpret_cast<SearchCandidate*>(scratch);
  const auto bytes = static_cast<std::size_t>(search_shared_floats(p, plan)) * sizeof(float);
  for (int64_t first = 0; first < tokens; first += plan.tokens) {
    const int64_t n = smaller(plan.tokens, tokens - first), rows = n * p.heads;
    with_flag(rows_aligned<T>(p.k, p.keys_at, p.d), [&](auto by_words) {
      SQ_LAUNCH((span_search_split_kernel<T, decltype(by_words)::value>), n * p.kv_heads * plan.splits, kSearchThreads,
                bytes, stream, p, plan, first, candidates);
    });
    if (plan.splits == 1) continue;
    SQ_LAUNCH((span_search_merge_kernel<>), ceil_div(rows, kSearchWarps), kSearchThreads, 0, stream, p, plan, first,
              static_cast<int>(rows), static_cast<const SearchCandidate*>(candidates));
  }
}

}  // namespace subquad::cuda
