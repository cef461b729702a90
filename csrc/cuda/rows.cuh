// Rows of keys and values, by lanes: a few lanes of a warp share a row, and the warp takes several rows at once.
#pragma once

#include <cstdint>

#include "common/paged.h"
#include "cuda/chunk.cuh"

namespace subquad::cuda {

constexpr int kLaneElems = 8;                        // elements of a row that a lane owns, in words of 16 bytes
constexpr int64_t kMaxLaneRow = kWarp * kLaneElems;  // of a row

/// Lanes that share a row of `dim` elements: a power of two in 4 .. 32.
inline int lanes_of(int64_t dim) {
  int lanes = 4;
  while (lanes * kLaneElems < dim) lanes *= 2;
  return lanes;
}

/// What a thread of a block of kWarps warps is among those that share rows: lane `sub` of the row's `lanes`, in group
/// `unit` of `units`.
struct RowLane {
  int lanes, sub, unit, units;

  __device__ RowLane(int lanes, int warps)
      : lanes(lanes),
        sub(static_cast<int>(threadIdx.x) % lanes),
        unit(static_cast<int>(threadIdx.x) / lanes),
        units(warps * kWarp / lanes) {}

  /// The first of the warp's groups: what holds for it decides for the warp.
  __device__ int first_unit() const { return static_cast<int>(threadIdx.x) / kWarp * kWarp / lanes; }
  /// Elements of a row with its padding.
  __device__ int width() const { return lanes * kLaneElems; }
};

/// A lane's elements: word w is elements (w * lanes + sub) * kWord on, so that neighbours read neighbouring words.
template <class T>
struct LaneRow {
  static constexpr int kWord = kVecElems<T>, kWords = kLaneElems / kWord;
  sq::Vec<T, kWord> words[kWords];
};

/// Elements of row[0 .. dim), zeros beyond; dim = 0: nothing is read. kAligned: as of `load_chunk`.
template <bool kAligned, class T>
__device__ __forceinline__ LaneRow<T> load_lane_row(const T* row, int64_t dim, const RowLane& lane) {
  constexpr int kWord = LaneRow<T>::kWord;
  LaneRow<T> mine;
  SQ_UNROLL
  for (int w = 0; w < LaneRow<T>::kWords; ++w) {
    const int c = (w * lane.lanes + lane.sub) * kWord;
    mine.words[w] = load_chunk<Reuse::kKeep, kAligned, kWord>(row + c, dim - c);
  }
  return mine;
}

template <class T>
__device__ __forceinline__ void to_floats(const LaneRow<T>& row, float (&out)[kLaneElems]) {
  constexpr int kWord = LaneRow<T>::kWord;
  SQ_UNROLL
  for (int i = 0; i < kLaneElems; ++i) out[i] = sq::to_float(row.words[i / kWord].v[i % kWord]);
}

/// Where element c of a row of T stands in shared memory: the lanes' first quads, then their second ones, so that
/// neighbouring lanes touch neighbouring quads.
template <class T>
__device__ __forceinline__ int lane_slot(int c, int width) {
  if constexpr (LaneRow<T>::kWords == 2) return c;
  return (c & 4 ? width / 2 : 0) + c / kLaneElems * 4 + (c & 3);
}

using FloatQuad = sq::Vec<float, 4>;

/// Quad n of a lane in such a row.
__device__ __forceinline__ FloatQuad* lane_quad(float* row, int n, const RowLane& lane) {
  return reinterpret_cast<FloatQuad*>(row + n * lane.width() / 2 + lane.sub * 4);
}

/// Whether rows of T may be read by words.
template <class T>
bool rows_aligned(const void* data, const PagedRows& rows, int64_t dim) {
  const auto whole = [](int64_t n) { return n % kVecElems<T> == 0; };
  return is_aligned16(data) && whole(dim) && whole(rows.stride_b) && whole(rows.stride_t) && whole(rows.stride_h);
}

/// Whether a key counts; without a mask all do.
__device__ __forceinline__ bool is_kept(const bool* key_mask, int64_t key) {
  return key_mask == nullptr || sq::load_nc(reinterpret_cast<const std::uint8_t*>(key_mask) + key) != 0;
}

/// Tokens of one launch, whose scratch stays below 64 MiB unless a single token's does not.
inline int64_t tokens_at_once(int64_t tokens, int64_t bytes_per_token) {
  constexpr int64_t kBytes = int64_t{64} << 20;
  return clamp(kBytes / larger(bytes_per_token, 1), 1, larger(tokens, 1));
}

}  // namespace subquad::cuda
