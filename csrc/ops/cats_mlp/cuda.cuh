// CATS sparse gated MLP for 1..16 tokens, a decode step: four launches, no atomics, no host synchronisation.
//
//   gate    hidden = act(x Wg^T + bg) and, per neuron, a word whose bit b says that token b keeps it
//   up      hidden *= x Wu^T + bu, reading only the rows of Wu that some token keeps
//   down    partial[split] = sum over the split's kept neurons of hidden * column of Wd      (neuron-major w_down)
//   reduce  y = sum of the partials in split order + bd
//
// A row-major w_down takes one kernel in place of the last two; it cannot skip memory, only the dead products.
//
// A dead (token, neuron) pair is skipped by its bit and never multiplied by zero, so an Inf or NaN in a weight that
// only dead pairs touch does not reach y. Splits, lanes and the order of additions depend on the shape alone: results
// are reproducible, and with per-token masks a row of y has the same bits in any batch.
//
// What a kernel does apart from reading its weights is a function of its own, for the MLP on quantised weights does the
// same. Its `Params` are a call's, its `Weight` has dot(), its `Rows` load() and floats().
#pragma once

#include <algorithm>

#include "cuda/chunk.cuh"
#include "cuda/portable.cuh"
#include "ops/cats_mlp/params.h"

namespace subquad::cuda {

constexpr int kCatsWarps = 8;
constexpr int kCatsThreads = kCatsWarps * kWarp;
constexpr int kCatsRows = 4;                          // weight rows a warp keeps in flight
constexpr int kCatsNeurons = kCatsWarps * kCatsRows;  // neurons of a gate or up block
static_assert(kCatsNeurons == kWarp, "the up kernel finds its rows with one ballot");

/// Resident blocks the compiler allots registers for; the element-by-element path needs more than half of them.
template <bool kAligned>
constexpr int kCatsBlocksPerSm = kAligned ? 2 : 1;

/// Scratch of one call; every word that is read was written before.
struct CatsMlpWorkspace {
  float* hidden;    // [intermediate, token tile]: neuron-major, so that one access fetches all tokens of a neuron
  float* partial;   // [splits, tokens, hidden]
  uint32_t* alive;  // [intermediate], bit b: token b keeps the neuron
};

/// Sum over the warp of values[n], returned in lane n, for n < NB.
template <int NB>
__device__ __forceinline__ float cats_sum_to_lane(const float (&values)[NB], int lane) {
  float mine = 0.0f;
  SQ_UNROLL
  for (int n = 0; n < NB; ++n) {
    const float sum = warp_sum(values[n]);
    if (lane == n) mine = sum;
  }
  return mine;
}

/// out[r] = <rows[r], x[n]> in lane n, for r < count, n < tokens.
/// A lane owns chunks lane, lane + 32, ... and adds its products in ascending order, whatever NB and kAligned are.
template <int NB, bool kAligned, class T>
__device__ __forceinline__ void cats_dot_rows(const T* const (&rows)[kCatsRows], int count, const T* x, int64_t width,
                                              int tokens, int lane, float (&out)[kCatsRows]) {
  constexpr int K = kVecElems<T>;
  float acc[kCatsRows][NB];
  SQ_UNROLL
  for (int r = 0; r < kCatsRows; ++r) {
    SQ_UNROLL
    for (int n = 0; n < NB; ++n) acc[r][n] = 0.0f;
  }
  for (int64_t k = lane * K; k < width; k += kWarp * K) {
    sq::Vec<T, K> raw[kCatsRows];
    SQ_UNROLL
    for (int r = 0; r < kCatsRows; ++r) {
      raw[r] = load_chunk<Reuse::kStream, kAligned, K>(rows[r] + k, r < count ? width - k : 0);
    }
    float w[kCatsRows][K];
    SQ_UNROLL
    for (int r = 0; r < kCatsRows; ++r) to_floats(raw[r], w[r]);
    const T* token = x + k;
    SQ_UNROLL
    for (int n = 0; n < NB; ++n) {
      if (n >= tokens) break;
      float v[K];
      to_floats(load_chunk<Reuse::kKeep, kAligned, K>(token, width - k), v);
      token = running_pointer(token + width);
      SQ_UNROLL
      for (int r = 0; r < kCatsRows; ++r) {
        SQ_UNROLL
        for (int j = 0; j < K; ++j) acc[r][n] = fmaf(w[r][j], v[j], acc[r][n]);
      }
    }
  }
  SQ_UNROLL
  for (int r = 0; r < kCatsRows; ++r) out[r] = cats_sum_to_lane(acc[r], lane);
}

/// A weight of rows `ld` apart.
template <class T, bool kAligned>
struct CatsDense {
  const T* data;
  int64_t ld;

  /// out[r] = <row neurons[r], x[n]> in lane n, for r < count, n < tokens.
  template <int NB>
  __device__ __forceinline__ void dot(const int64_t (&neurons)[kCatsRows], int count, const T* x, int64_t width,
                                      int tokens, int lane, float (&out)[kCatsRows]) const {
    const T* rows[kCatsRows];
    SQ_UNROLL
    for (int r = 0; r < kCatsRows; ++r) rows[r] = data + neurons[r] * ld;
    cats_dot_rows<NB, kAligned>(rows, count, x, width, tokens, lane, out);
  }
};

/// `mask`: where to write [tokens, intermediate], or null.
template <class T, int NB, class Params, class Weight>
__device__ __forceinline__ void cats_gate(const Params& p, const CatsMlpWorkspace& ws, const Weight& weight,
                                          bool* mask) {
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int tokens = static_cast<int>(p.tokens);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kCatsNeurons + warp * kCatsRows;
  if (first >= p.intermediate) return;
  const int count = static_cast<int>(min(static_cast<int64_t>(kCatsRows), p.intermediate - first));

  int64_t neurons[kCatsRows];
  SQ_UNROLL
  for (int r = 0; r < kCatsRows; ++r) neurons[r] = first + r;
  float z[kCatsRows];
  weight.template dot<NB>(neurons, count, static_cast<const T*>(p.x), p.hidden, tokens, lane, z);

  SQ_UNROLL
  for (int r = 0; r < kCatsRows; ++r) {
    if (r >= count) break;
    const int64_t i = first + r;
    float pre = z[r];
    if (p.b_gate != nullptr) pre += sq::to_float(sq::load_nc(static_cast<const T*>(p.b_gate) + i));
    const float s = activate(p.activation, pre);
    const float t = sq::load_nc(p.threshold + i * p.threshold_stride);
    unsigned alive = __ballot_sync(kFullWarp, lane < tokens && is_active(s, t, p.inclusive));
    if (p.union_mask && alive != 0) alive = (1u << tokens) - 1;
    if (lane < NB) sq::store(ws.hidden + i * NB + lane, (alive >> lane & 1) != 0 ? s : 0.0f);
    if (lane == 0) sq::store(ws.alive + i, static_cast<uint32_t>(alive));
    if (mask != nullptr && lane < tokens) sq::store(mask + lane * p.intermediate + i, (alive >> lane & 1) != 0);
  }
}

template <class T, int NB, bool kAligned>
__global__ void __launch_bounds__(kCatsThreads, kCatsBlocksPerSm<kAligned>)
    cats_gate_kernel(CatsMlpParams p, CatsMlpWorkspace ws) {
  cats_gate<T, NB>(p, ws, CatsDense<T, kAligned>{static_cast<const T*>(p.w_gate), p.ld_gate}, nullptr);
}

template <class T, int NB, class Params, class Weight>
__device__ __forceinline__ void cats_up(const Params& p, const CatsMlpWorkspace& ws, const Weight& weight) {
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t base = static_cast<int64_t>(blockIdx.x) * kCatsNeurons;
  const uint32_t alive = base + lane < p.intermediate ? sq::load(ws.alive + base + lane) : 0;
  const unsigned live = __ballot_sync(kFullWarp, alive != 0);

  // The live rows of the block are dealt out to its warps, so that no warp waits beside dead ones.
  const int rank = alive != 0 ? __popc(live & ((1u << lane) - 1)) : -1;
  int source[kCatsRows];
  int64_t neurons[kCatsRows];
  int count = 0;
  SQ_UNROLL
  for (int r = 0; r < kCatsRows; ++r) {
    const unsigned owner = __ballot_sync(kFullWarp, rank == warp + r * kCatsWarps);
    count += owner != 0;
    source[r] = owner != 0 ? __ffs(static_cast<int>(owner)) - 1 : 0;
    neurons[r] = base + source[r];
  }
  if (count == 0) return;

  float u[kCatsRows];
  weight.template dot<NB>(neurons, count, static_cast<const T*>(p.x), p.hidden, static_cast<int>(p.tokens), lane, u);

  SQ_UNROLL
  for (int r = 0; r < kCatsRows; ++r) {
    if (r >= count) break;
    const int64_t i = base + source[r];
    const uint32_t keep = __shfl_sync(kFullWarp, alive, source[r]);
    float up = u[r];
    if (p.b_up != nullptr) up += sq::to_float(sq::load_nc(static_cast<const T*>(p.b_up) + i));
    float* h = ws.hidden + i * NB + lane;
    if (lane < NB && (keep >> lane & 1) != 0) sq::store(h, sq::load(h) * up);
  }
}

template <class T, int NB, bool kAligned>
__global__ void __launch_bounds__(kCatsThreads, kCatsBlocksPerSm<kAligned>)
    cats_up_kernel(CatsMlpParams p, CatsMlpWorkspace ws) {
  cats_up<T, NB>(p, ws, CatsDense<T, kAligned>{static_cast<const T*>(p.w_up), p.ld_up});
}

/// All tokens of neuron i: h[n] for n < NB.
template <int NB>
__device__ __forceinline__ void cats_load_hidden(const float* hidden, int64_t i, float (&h)[NB]) {
  constexpr int K = NB < 4 ? NB : 4;
  SQ_UNROLL
  for (int n = 0; n < NB; n += K) {
    const sq::Vec<float, K> part = sq::load_vec<K>(hidden + i * NB + n);
    SQ_UNROLL
    for (int j = 0; j < K; ++j) h[n + j] = part.v[j];
  }
}

/// Columns a lane of the down kernel owns: 16 bytes, or fewer when the tokens need the registers.
template <class T, int NB>
constexpr int kCatsColumns = NB > 4 ? 4 : kVecElems<T>;

/// A neuron-major w_down as a lane sees it: K columns from `column` on of rows `ld` apart.
template <class T, int K, bool kAligned>
struct CatsDenseDown {
  static constexpr bool kBlocks = false;
  using Raw = sq::Vec<T, K>;
  const T* data;
  int64_t ld, column, width;

  /// Of column j within the tile.
  __device__ __forceinline__ static int place(int lane, int j) { return lane * K + j; }
  __device__ __forceinline__ Raw load(int64_t neuron, bool live) const {
    return load_chunk<Reuse::kStream, kAligned, K>(data + neuron * ld, live ? width - column : 0);
  }
  __device__ __forceinline__ void floats(const Raw& raw, float (&w)[K]) const { to_floats(raw, w); }
};

/// Block (tile of columns, split of neurons). The split's range is cut into one contiguous piece per warp, by neuron
/// number and not by rank among the live ones, so that other tokens' masks cannot move a token's additions.
/// `rows_of(tile)` are the Rows of the tile that begins at that column. Rows with kBlocks share something among kWarp
/// neurons: block() tells them which come next.
template <int NB, int K, class Params, class RowsOf>
__device__ __forceinline__ void cats_down(const Params& p, const CatsMlpWorkspace& ws, const RowsOf& rows_of) {
  constexpr int kTile = K * kWarp;
  constexpr int kInFlight = NB > 2 ? 4 : 8;
  constexpr int kSums = kCatsWarps * kTile;
  SQ_SHARED(float, sums, kSums);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const unsigned tiles = static_cast<unsigned>(ceil_div(p.hidden, kTile)), split = blockIdx.x / tiles;
  const int64_t tile = int64_t{blockIdx.x % tiles} * kTile;
  auto rows = rows_of(tile, lane);
  using Rows = decltype(rows);

  const int64_t piece = ceil_div(p.intermediate, int64_t{gridDim.x / tiles} * kCatsWarps);
  const int64_t begin = (int64_t{split} * kCatsWarps + warp) * piece;
  const int64_t end = min(p.intermediate, begin + piece);
  const int64_t start = Rows::kBlocks ? begin / kWarp * kWarp : begin;

  float acc[NB][K];
  SQ_UNROLL
  for (int n = 0; n < NB; ++n) {
    SQ_UNROLL
    for (int j = 0; j < K; ++j) acc[n][j] = 0.0f;
  }
  uint32_t next = start + lane >= begin && start + lane < end ? sq::load(ws.alive + start + lane) : 0;
  for (int64_t base = start; base < end; base += kWarp) {
    const uint32_t alive = next;
    next = base + kWarp + lane < end ? sq::load(ws.alive + base + kWarp + lane) : 0;
    unsigned live = __ballot_sync(kFullWarp, alive != 0);
    if constexpr (Rows::kBlocks) {
      if (live != 0) rows.block(base / kWarp);
    }
    while (live != 0) {
      typename Rows::Raw raw[kInFlight];
      int source[kInFlight];
      int count = 0;
      SQ_UNROLL
      for (int r = 0; r < kInFlight; ++r) {
        source[r] = live != 0 ? __ffs(static_cast<int>(live)) - 1 : 0;
        count += live != 0;
        raw[r] = rows.load(base + source[r], live != 0);
        live &= live - 1;
      }
      SQ_UNROLL
      for (int r = 0; r < kInFlight; ++r) {
        if (r >= count) break;
        const uint32_t keep = __shfl_sync(kFullWarp, alive, source[r]);
        float w[K], h[NB];
        rows.floats(raw[r], w);
        cats_load_hidden<NB>(ws.hidden, base + source[r], h);
        SQ_UNROLL
        for (int n = 0; n < NB; ++n) {
          if ((keep >> n & 1) == 0) continue;
          SQ_UNROLL
          for (int j = 0; j < K; ++j) acc[n][j] = fmaf(h[n], w[j], acc[n][j]);
        }
      }
    }
  }

  // Add the warps in order, one token at a time to keep the shared tile small.
  SQ_UNROLL
  for (int n = 0; n < NB; ++n) {
    if (n >= p.tokens) break;
    SQ_UNROLL
    for (int j = 0; j < K; ++j) sums[warp * kTile + Rows::place(lane, j)] = acc[n][j];
    __syncthreads();
    const int64_t c = tile + threadIdx.x;
    if (threadIdx.x < kTile && c < p.hidden) {
      float total = 0.0f;
      SQ_UNROLL
      for (int v = 0; v < kCatsWarps; ++v) total += sums[v * kTile + threadIdx.x];
      sq::store(ws.partial + (split * p.tokens + n) * p.hidden + c, total);
    }
    __syncthreads();
  }
}

template <class T, int NB, bool kAligned>
__global__ void __launch_bounds__(kCatsThreads, kCatsBlocksPerSm<kAligned>)
    cats_down_kernel(CatsMlpParams p, CatsMlpWorkspace ws) {
  constexpr int K = kCatsColumns<T, NB>;
  cats_down<NB, K>(p, ws, [&](int64_t tile, int lane) {
    const int64_t column = tile + lane * K;
    return CatsDenseDown<T, K, kAligned>{static_cast<const T*>(p.w_down) + column, p.ld_down, column, p.hidden};
  });
}

template <class T, class Params>
__global__ void __launch_bounds__(kCatsThreads) cats_reduce_kernel(Params p, CatsMlpWorkspace ws, int splits) {
  const int64_t count = p.tokens * p.hidden;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kCatsThreads + threadIdx.x;
  if (i >= count) return;
  float y = 0.0f;
  for (int s = 0; s < splits; ++s) y += sq::load(ws.partial + s * count + i);
  if (p.b_down != nullptr) y += sq::to_float(sq::load_nc(static_cast<const T*>(p.b_down) + i % p.hidden));
  sq::store(static_cast<T*>(p.y) + i, sq::from_float<T>(y));
}

/// A warp per kCatsRows output columns, lanes along the neurons; reads all of w_down.
template <class T, int NB, bool kAligned>
__global__ void __launch_bounds__(kCatsThreads, kCatsBlocksPerSm<kAligned>)
    cats_down_rowmajor_kernel(CatsMlpParams p, CatsMlpWorkspace ws) {
  constexpr int K = kVecElems<T>;
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kCatsWarps + warp) * kCatsRows;
  if (first >= p.hidden) return;
  const int count = static_cast<int>(min(static_cast<int64_t>(kCatsRows), p.hidden - first));

  float acc[kCatsRows][NB];
  SQ_UNROLL
  for (int r = 0; r < kCatsRows; ++r) {
    SQ_UNROLL
    for (int n = 0; n < NB; ++n) acc[r][n] = 0.0f;
  }
  for (int64_t i = lane * K; i < p.intermediate; i += kWarp * K) {
    sq::Vec<T, K> w[kCatsRows];
    SQ_UNROLL
    for (int r = 0; r < kCatsRows; ++r) {
      const T* row = static_cast<const T*>(p.w_down) + (first + r) * p.ld_down;
      w[r] = load_chunk<Reuse::kStream, kAligned, K>(row + i, r < count ? p.intermediate - i : 0);
    }
    SQ_UNROLL
    for (int j = 0; j < K; ++j) {
      const uint32_t keep = i + j < p.intermediate ? sq::load(ws.alive + i + j) : 0;
      if (keep == 0) continue;
      float h[NB];
      cats_load_hidden<NB>(ws.hidden, i + j, h);
      SQ_UNROLL
      for (int n = 0; n < NB; ++n) {
        if ((keep >> n & 1) == 0) continue;
        SQ_UNROLL
        for (int r = 0; r < kCatsRows; ++r) acc[r][n] = fmaf(h[n], sq::to_float(w[r].v[j]), acc[r][n]);
      }
    }
  }
  SQ_UNROLL
  for (int r = 0; r < kCatsRows; ++r) {
    if (r >= count) break;
    float y = cats_sum_to_lane(acc[r], lane);
    if (p.b_down != nullptr) y += sq::to_float(sq::load_nc(static_cast<const T*>(p.b_down) + first + r));
    if (lane < p.tokens) sq::store(static_cast<T*>(p.y) + lane * p.hidden + first + r, sq::from_float<T>(y));
  }
}

/// Smallest instantiated token count that holds `tokens`.
inline int cats_token_tile(int64_t tokens) {
  int tile = 1;
  while (tile < tokens) tile *= 2;
  return tile;
}

/// Neuron splits of the down kernel: about 256 blocks, at least 8 neurons for a warp. hidden > 0.
inline int cats_down_splits(int64_t hidden, int64_t intermediate) {
  const int64_t wanted = ceil_div(256, ceil_div(hidden, 256));
  const int64_t available = ceil_div(intermediate, 8 * kCatsWarps);
  return static_cast<int>(std::min<int64_t>({wanted, available, 32}));
}

/// fp32 words of scratch for one call; the block must be aligned to 16 bytes.
inline int64_t cats_mlp_workspace_words(const CatsMlpParams& p) {
  if (p.tokens == 0 || p.hidden == 0) return 0;
  const int64_t partial = p.neuron_major ? cats_down_splits(p.hidden, p.intermediate) * p.tokens * p.hidden : 0;
  return p.intermediate * (cats_token_tile(p.tokens) + 1) + partial;
}

namespace cats_detail {

template <class T>
bool rows_aligned(const void* rows, int64_t ld, int64_t width) {
  return is_aligned16(rows) && ld % kVecElems<T> == 0 && width % kVecElems<T> == 0;
}

template <class T, int NB>
void launch(const CatsMlpParams& p, const CatsMlpWorkspace& ws, sq::stream_t stream) {
  const bool x_aligned = rows_aligned<T>(p.x, p.hidden, p.hidden);
  const int64_t blocks = ceil_div(p.intermediate, kCatsNeurons);
  with_flag(x_aligned && rows_aligned<T>(p.w_gate, p.ld_gate, p.hidden), [&](auto aligned) {
    SQ_LAUNCH((cats_gate_kernel<T, NB, aligned>), blocks, kCatsThreads, 0, stream, p, ws);
  });
  with_flag(x_aligned && rows_aligned<T>(p.w_up, p.ld_up, p.hidden),
            [&](auto aligned) { SQ_LAUNCH((cats_up_kernel<T, NB, aligned>), blocks, kCatsThreads, 0, stream, p, ws); });
  if (p.neuron_major) {
    const int64_t grid = ceil_div(p.hidden, kCatsColumns<T, NB> * kWarp) * cats_down_splits(p.hidden, p.intermediate);
    with_flag(rows_aligned<T>(p.w_down, p.ld_down, p.hidden), [&](auto aligned) {
      SQ_LAUNCH((cats_down_kernel<T, NB, aligned>), grid, kCatsThreads, 0, stream, p, ws);
    });
  } else {
    with_flag(rows_aligned<T>(p.w_down, p.ld_down, p.intermediate), [&](auto aligned) {
      SQ_LAUNCH((cats_down_rowmajor_kernel<T, NB, aligned>), ceil_div(p.hidden, kCatsWarps * kCatsRows), kCatsThreads,
                0, stream, p, ws);
    });
  }
}

}  // namespace cats_detail

/// The whole call for element type T (float, sq::bf16 or sq::fp16). `scratch` holds cats_mlp_workspace_words(p) fp32
/// words, aligned to 16 bytes; it may be null when that is 0. Nothing is launched for an empty result.
template <class T>
void cats_mlp_forward(const CatsMlpParams& p, float* scratch, sq::stream_t stream) {
  if (p.tokens == 0 || p.hidden == 0) return;
  const int tile = cats_token_tile(p.tokens);
  const int splits = p.neuron_major || p.intermediate == 0 ? cats_down_splits(p.hidden, p.intermediate) : 0;
  CatsMlpWorkspace ws{};
  ws.hidden = scratch;
  ws.partial = ws.hidden + p.intermediate * tile;
  ws.alive = reinterpret_cast<uint32_t*>(ws.partial + splits * p.tokens * p.hidden);
  if (p.intermediate > 0) {
    switch (tile) {
      case 1:
        cats_detail::launch<T, 1>(p, ws, stream);
        break;
      case 2:
        cats_detail::launch<T, 2>(p, ws, stream);
        break;
      case 4:
        cats_detail::launch<T, 4>(p, ws, stream);
        break;
      case 8:
        cats_detail::launch<T, 8>(p, ws, stream);
        break;
      default:
        cats_detail::launch<T, 16>(p, ws, stream);
    }
  }
  if (p.neuron_major || p.intermediate == 0) {
    SQ_LAUNCH((cats_reduce_kernel<T, CatsMlpParams>), ceil_div(p.tokens * p.hidden, kCatsThreads), kCatsThreads, 0,
              stream, p, ws, splits);
  }
}

}  // namespace subquad::cuda
