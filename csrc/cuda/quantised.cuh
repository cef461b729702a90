// Weights in few bits as the CUDA kernels read them; see common/quantised.h for the formats.
#pragma once

#include <cstdint>

#include "common/quantised.h"
#include "cuda/chunk.cuh"

namespace subquad::cuda {

/// What the code in a byte stands for before its scale; of two codes in it, that of the low or the high half.
template <QuantisedFormat kFormat>
__device__ __forceinline__ float code_in(uint8_t byte, int half) {
  if constexpr (kFormat == QuantisedFormat::kInt8) return static_cast<float>(static_cast<int8_t>(byte));
  const int code = byte >> (4 * half) & 15;
  return static_cast<float>(kFormat == QuantisedFormat::kInt4 ? code - 8 : code);
}

/// fp16 number i of a row of them, 0 if not `live`; kAligned: at an even address, else at any.
template <bool kAligned>
__device__ __forceinline__ float load_half(const uint8_t* halves, int64_t i, bool live = true) {
  if (!live) return 0.0f;
  if constexpr (kAligned) return sq::to_float(sq::load_nc(reinterpret_cast<const sq::fp16*>(halves) + i));
  const int low = sq::load_nc(halves + 2 * i), high = sq::load_nc(halves + 2 * i + 1);
  return sq::to_float(sq::fp16{static_cast<uint16_t>(low | high << 8)});
}

/// What is added to a code times its scale, of group `group` of `groups` whose scales and then minima begin at
/// `scales`.
template <QuantisedFormat kFormat, bool kAligned>
__device__ __forceinline__ float load_minimum(const uint8_t* scales, int64_t groups, int64_t group, bool live = true) {
  if constexpr (has_minimum(kFormat)) return load_half<kAligned>(scales, groups + group, live);
  return 0.0f;
}

}  // namespace subquad::cuda
