// The CATS MLP on weights in few bits for 1..16 tokens: the four launches of ops/cats_mlp/cuda.cuh with other weights.
//
// A code becomes fp32 in registers and x is not rounded: products are of the dequantised weights. Neighbouring
// lanes take neighbouring words of a gate or up row, and with them neighbouring elements of x. Where 32 neurons share
// the scales of the down projection, these are loaded once for a block of neurons.
#pragma once

#include "cuda/quantised.cuh"
#include "ops/cats_mlp/cuda.cuh"
#include "ops/quantised_cats_mlp/params.h"

namespace subquad::cuda {

/// As kCatsBlocksPerSm, which sixteen tokens miss by a few registers.
template <int NB, bool kAligned>
constexpr int kQuantisedBlocksPerSm = NB > 4 ? 1 : kCatsBlocksPerSm<kAligned>;

constexpr int kCodeWord = 4;  // bytes of a gate or up row that a lane takes at once: all in one group

/// Rows of codes, scales and minima, as the gate and up kernels read them.
template <QuantisedFormat kFormat, bool kAligned>
struct QuantisedRows {
  const uint8_t* data;

  /// out[r] = <row neurons[r], x[n]> in lane n, for r < count, n < tokens.
  /// A lane owns words lane, lane + 32, ... and adds its products in ascending order, whatever NB and kAligned are.
  template <int NB, class T>
  __device__ __forceinline__ void dot(const int64_t (&neurons)[kCatsRows], int count, const T* x, int64_t width,
                                      int tokens, int lane, float (&out)[kCatsRows]) const {
    constexpr int K = kCodeWord, kHalves = kFormat == QuantisedFormat::kInt8 ? 1 : 2;
    constexpr int kWords = static_cast<int>(code_bytes(kFormat)) / kCodeWord;  // of a group
    constexpr int kInFlight = NB > 4 ? 1 : 4;                                  // many tokens need the registers
    const int64_t groups = width / kQuantisedGroup;
    const int words = static_cast<int>(groups * kWords);
    const uint8_t* rows[kCatsRows];
    float acc[kCatsRows][NB];
    SQ_UNROLL
    for (int r = 0; r < kCatsRows; ++r) {
      rows[r] = data + neurons[r] * groups * group_bytes(kFormat);
      SQ_UNROLL
      for (int n = 0; n < NB; ++n) acc[r][n] = 0.0f;
    }
    SQ_UNROLL_BY(kInFlight)
    for (int word = lane; word < words; word += kWarp) {
      const int group = word / kWords;
      sq::Vec<uint8_t, K> raw[kCatsRows];
      float scale[kCatsRows], minimum[kCatsRows];
      SQ_UNROLL
      for (int r = 0; r < kCatsRows; ++r) {
        rows[r] = running_pointer(rows[r]);  // else there would be one for scales and one for minima too
        const uint8_t* scales = rows[r] + groups * code_bytes(kFormat);
        raw[r] = load_chunk<Reuse::kStream, kAligned, K>(rows[r] + int64_t{word} * K, r < count ? K : 0);
        scale[r] = load_half<kAligned>(scales, group, r < count);
        minimum[r] = load_minimum<kFormat, kAligned>(scales, groups, group, r < count);
      }
      SQ_UNROLL_BY(kInFlight)
      for (int half = 0; half < kHalves; ++half) {
        float w[kCatsRows][K];
        SQ_UNROLL
        for (int r = 0; r < kCatsRows; ++r) {
          SQ_UNROLL
          for (int j = 0; j < K; ++j) w[r][j] = fmaf(code_in<kFormat>(raw[r].v[j], half), scale[r], minimum[r]);
        }
        const T* token = x + int64_t{group} * kQuantisedGroup + word % kWords * K + half * (kQuantisedGroup / 2);
        SQ_UNROLL
        for (int n = 0; n < NB; ++n) {
          if (n >= tokens) break;
          float v[K];
          to_floats(load_chunk<Reuse::kKeep, kAligned, K>(token, K), v);
          token = running_pointer(token + width);
          SQ_UNROLL
          for (int r = 0; r < kCatsRows; ++r) {
            SQ_UNROLL
            for (int j = 0; j < K; ++j) acc[r][n] = fmaf(w[r][j], v[j], acc[r][n]);
          }
        }
      }
    }
    SQ_UNROLL
    for (int r = 0; r < kCatsRows; ++r) out[r] = cats_sum_to_lane(acc[r], lane);
  }
};

template <class T, int NB, QuantisedFormat kFormat, bool kAligned>
__global__ void __launch_bounds__(kCatsThreads, kQuantisedBlocksPerSm<NB, kAligned>)
    quantised_cats_gate_kernel(QuantisedCatsMlpParams p, CatsMlpWorkspace ws) {
  cats_gate<T, NB>(p, ws, QuantisedRows<kFormat, kAligned>{p.w_gate}, p.mask);
}

template <class T, int NB, QuantisedFormat kFormat, bool kAligned>
__global__ void __launch_bounds__(kCatsThreads, kQuantisedBlocksPerSm<NB, kAligned>)
    quantised_cats_up_kernel(QuantisedCatsMlpParams p, CatsMlpWorkspace ws) {
  cats_up<T, NB>(p, ws, QuantisedRows<kFormat, kAligned>{p.w_up});
}

/// Columns that a lane of the down kernel owns, all in one group.
template <int NB>
constexpr int kQuantisedColumns = NB > 4 ? 4 : 8;

/// Bytes of their codes.
template <QuantisedFormat kFormat, int K>
constexpr int kLaneBytes = K * static_cast<int>(code_bytes(kFormat)) / kQuantisedGroup;

/// w_down as a lane sees it, from the byte of a row on at which its codes are.
template <QuantisedFormat kFormat, int K, bool kShared, bool kAligned>
struct QuantisedDown {
  static constexpr bool kBlocks = kShared;
  static constexpr int kBytes = kLaneBytes<kFormat, K>;
  struct Raw {
    sq::Vec<uint8_t, kBytes> codes;
    float scale, minimum;  // of the row; kShared: none
  };
  const uint8_t* data;    // the lane's codes of row 0
  const uint8_t* scales;  // of row 0, or of block 0
  int64_t row_bytes, hidden;
  int64_t column;  // the lane's first
  bool inside;
  float scale[kShared ? K : 1], minimum[kShared ? K : 1];  // of the block's columns

  __device__ __forceinline__ QuantisedDown(const QuantisedCatsMlpParams& p, int64_t tile, int lane)
      : row_bytes(p.down_row_bytes()), hidden(p.hidden), column(tile + place(lane, 0)), inside(column < hidden) {
    const int64_t code_row = p.groups() * code_bytes(kFormat);
    data = p.w_down + tile / kQuantisedGroup * code_bytes(kFormat) + lane * kBytes;
    scales = kShared ? p.down_scales : p.w_down + code_row;
  }

  /// Of element j within the tile. The lane's bytes lie in one group, of four bits in either half of it.
  __device__ __forceinline__ static int place(int lane, int j) {
    if constexpr (kFormat == QuantisedFormat::kInt8) return lane * K + j;
    const int byte = lane * kBytes;
    return byte / 16 * kQuantisedGroup + byte % 16 + (j < kBytes ? j : 16 + j - kBytes);
  }

  /// The numbers of neurons kWarp * index on.
  __device__ __forceinline__ void block(int64_t index) {
    const uint8_t* row = scales + index * hidden * (group_bytes(kFormat) - code_bytes(kFormat));
    SQ_UNROLL
    for (int j = 0; j < K; ++j) {
      const int64_t c = column + place(0, j);
      scale[j] = load_half<kAligned>(row, c, inside);
      minimum[j] = load_minimum<kFormat, kAligned>(row, hidden, c, inside);
    }
  }

  __device__ __forceinline__ Raw load(int64_t neuron, bool live) const {
    Raw raw;
    raw.codes = load_chunk<Reuse::kStream, kAligned, kBytes>(data + neuron * row_bytes, live && inside ? kBytes : 0);
    if constexpr (!kShared) {
      const uint8_t* row = scales + neuron * row_bytes;
      const int64_t group = column / kQuantisedGroup;
      raw.scale = load_half<kAligned>(row, group, live && inside);
      raw.minimum = load_minimum<kFormat, kAligned>(row, hidden / kQuantisedGroup, group, live && inside);
    }
    return raw;
  }

  __device__ __forceinline__ void floats(const Raw& raw, float (&w)[K]) const {
    SQ_UNROLL
    for (int j = 0; j < K; ++j) {
      const float code = code_in<kFormat>(raw.codes.v[j % kBytes], j / kBytes);
      const int i = kShared ? j : 0;
      w[j] = kShared ? fmaf(code, scale[i], minimum[i]) : fmaf(code, raw.scale, raw.minimum);
    }
  }
};

template <int NB, QuantisedFormat kFormat, bool kShared, bool kAligned>
__global__ void __launch_bounds__(kCatsThreads, kCatsBlocksPerSm<kAligned>)
    quantised_cats_down_kernel(QuantisedCatsMlpParams p, CatsMlpWorkspace ws) {
  constexpr int K = kQuantisedColumns<NB>;
  cats_down<NB, K>(p, ws,
                   [&](int64_t tile, int lane) { return QuantisedDown<kFormat, K, kShared, kAligned>(p, tile, lane); });
}

/// The smallest number of tokens, 1, 4 or 16, for which there are kernels that holds `tokens`.
inline int quantised_cats_tile(int64_t tokens) { return tokens <= 1 ? 1 : tokens <= 4 ? 4 : 16; }

/// fp32 words of scratch for one call; the block must be aligned to 16 bytes.
inline int64_t quantised_cats_words(const QuantisedCatsMlpParams& p) {
  const int64_t partial = p.hidden > 0 ? cats_down_splits(p.hidden, p.intermediate) * p.tokens * p.hidden : 0;
  return p.intermediate * (quantised_cats_tile(p.tokens) + 1) + partial;
}

namespace quantised_cats_detail {

/// fn(aligned) of a weight whose rows are `row_bytes` apart and read in words of `word` bytes.
template <class Fn>
void with_rows(const uint8_t* data, int64_t row_bytes, int64_t word, bool others_aligned, const Fn& fn) {
  with_flag(others_aligned && reinterpret_cast<uintptr_t>(data) % word == 0 && row_bytes % word == 0, fn);
}

template <class T, int NB>
void launch(const QuantisedCatsMlpParams& p, const CatsMlpWorkspace& ws, sq::stream_t stream) {
  const bool x_aligned = is_aligned16(p.x);
  const int64_t blocks = ceil_div(p.intermediate, kCatsNeurons);
  by_format(p.gate, [&]<QuantisedFormat kFormat>() {
    with_rows(p.w_gate, p.groups() * group_bytes(kFormat), kCodeWord, x_aligned, [&](auto aligned) {
      SQ_LAUNCH((quantised_cats_gate_kernel<T, NB, kFormat, aligned>), blocks, kCatsThreads, 0, stream, p, ws);
    });
  });
  if (p.hidden == 0) return;  // the gate has written the mask of its biases
  by_format(p.up, [&]<QuantisedFormat kFormat>() {
    with_rows(p.w_up, p.groups() * group_bytes(kFormat), kCodeWord, x_aligned, [&](auto aligned) {
      SQ_LAUNCH((quantised_cats_up_kernel<T, NB, kFormat, aligned>), blocks, kCatsThreads, 0, stream, p, ws);
    });
  });
  constexpr int K = kQuantisedColumns<NB>;
  const int64_t grid = ceil_div(p.hidden, K * kWarp) * cats_down_splits(p.hidden, p.intermediate);
  const bool scales_aligned = reinterpret_cast<uintptr_t>(p.down_scales) % 2 == 0;
  by_format(p.down, [&]<QuantisedFormat kFormat>() {
    with_rows(p.w_down, p.down_row_bytes(), kLaneBytes<kFormat, K>, scales_aligned, [&](auto aligned) {
      with_flag(p.down_scales != nullptr, [&](auto shared) {
        SQ_LAUNCH((quantised_cats_down_kernel<NB, kFormat, shared, aligned>), grid, kCatsThreads, 0, stream, p, ws);
      });
    });
  });
}

}  // namespace quantised_cats_detail

/// The whole call for element type T (float, sq::bf16 or sq::fp16). `scratch` holds quantised_cats_words(p) fp32 words,
/// aligned to 16 bytes; it may be null when that is 0. Nothing is launched for an empty result.
template <class T>
void quantised_cats_forward(const QuantisedCatsMlpParams& p, float* scratch, sq::stream_t stream) {
  if (p.tokens == 0) return;
  const int tile = quantised_cats_tile(p.tokens);
  const int splits = p.hidden > 0 ? cats_down_splits(p.hidden, p.intermediate) : 0;
  CatsMlpWorkspace ws{};
  ws.hidden = scratch;
  ws.partial = ws.hidden + p.intermediate * tile;
  ws.alive = reinterpret_cast<uint32_t*>(ws.partial + splits * p.tokens * p.hidden);
  if (p.intermediate > 0) {
    tile == 1   ? quantised_cats_detail::launch<T, 1>(p, ws, stream)
    : tile == 4 ? quantised_cats_detail::launch<T, 4>(p, ws, stream)
                : quantised_cats_detail::launch<T, 16>(p, ws, stream);
  }
  if (p.hidden == 0) return;
  SQ_LAUNCH((cats_reduce_kernel<T, QuantisedCatsMlpParams>), ceil_div(p.tokens * p.hidden, kCatsThreads), kCatsThreads,
            0, stream, p, ws, splits);
}

}  // namespace subquad::cuda
