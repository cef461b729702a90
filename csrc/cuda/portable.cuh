// The CUDA dialect of this project. Kernels include this header only and compile in two ways:
//   nvcc                     real device code;
//   g++ -DSUBQUAD_SIMT       the SIMT emulator of csrc/simt runs them on the CPU.
// See csrc/simt/README.md for what the emulator checks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#ifdef SUBQUAD_SIMT
#include <bit>
#include <cstring>

#include "../simt/simt.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

/// Unrolls the loop that follows, whole or by a constant (nvcc only; g++ would warn about `#pragma unroll`).
#ifdef SUBQUAD_SIMT
#define SQ_UNROLL
#define SQ_UNROLL_BY(n)
#else
#define SQ_UNROLL _Pragma("unroll")
#define SQ_UNROLL_BY(n) SQ_PRAGMA(unroll(n))
#define SQ_PRAGMA(text) _Pragma(#text)
#endif

/// SQ_SHARED(T, name, count): static shared array `T name[count]`; count is a constant expression.
/// SQ_DYNAMIC_SHARED(T, name): `T* name`, the dynamic shared memory of the launch, 16-byte aligned.
#ifdef SUBQUAD_SIMT
#define SQ_SHARED(T, name, count)  \
  static char name##_identity = 0; \
  T(&name)                         \
  [count] =                        \
      *static_cast<T(*)[count]>(::simt::detail::static_shared(&name##_identity, #name, sizeof(T[count]), alignof(T)))
#define SQ_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(::simt::detail::dynamic_shared())
#else
#define SQ_SHARED(T, name, count) __shared__ T name[count]
#define SQ_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char sq_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(sq_dynamic_shared)
#endif

/// SQ_LAUNCH((kernel<...>), grid, block, shared_bytes, stream, args...): checked launch. grid and block are a dim3 or
/// an integer of any width. Throws std::runtime_error naming the kernel when the launch is refused.
#define SQ_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                                  \
  ::sq::detail::launch(#kernel, kernel, ::sq::detail::extent(#kernel, grid), ::sq::detail::extent(#kernel, block), \
                       shared_bytes, stream __VA_OPT__(, ) __VA_ARGS__)

namespace sq {

// ---------------------------------------------------------------------------------------------------- storage types

/// bfloat16 storage; arithmetic happens in float.
struct bf16 {
  std::uint16_t bits;
};

/// IEEE binary16 storage; arithmetic happens in float.
struct fp16 {
  std::uint16_t bits;
};

/// N values of T that are loaded and stored as one word, hence aligned to their full size.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T v[N];
};

namespace detail {

template <class To, class From>
__host__ __device__ __forceinline__ To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, from);
}

// fp32 bits -> bf16 bits, to nearest even; every NaN becomes 0x7fff, as the GPU's conversion does.
__host__ __device__ __forceinline__ std::uint16_t bf16_bits(std::uint32_t f) {
  if ((f & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<std::uint16_t>((f + 0x7fffu + ((f >> 16) & 1u)) >> 16);
}

// fp32 bits -> fp16 bits, to nearest even; every NaN becomes 0x7fff.
__host__ __device__ __forceinline__ std::uint16_t fp16_bits(std::uint32_t f) {
  const std::uint32_t sign = (f >> 16) & 0x8000u, magnitude = f & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // rounds to 2^16 or more
  if (magnitude >= 0x38800000u) {                                                   // a normal fp16: rebias by 112
    return static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
  }
  if (magnitude < 0x33000000u) return static_cast<std::uint16_t>(sign);  // below 2^-25: rounds to zero
  const std::uint32_t significand = (magnitude & 0x7fffffu) | 0x800000u;
  const std::uint32_t shift = 126u - (magnitude >> 23);  // 14..24: to units of 2^-24
  const std::uint32_t half = (1u << (shift - 1)) - 1u, kept = significand >> shift;
  return static_cast<std::uint16_t>(sign | ((significand + half + (kept & 1u)) >> shift));
}

// fp16 bits -> fp32 bits, exact.
__host__ __device__ __forceinline__ std::uint32_t fp32_bits(std::uint16_t h) {
  const std::uint32_t sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x400u) return sign | ((magnitude << 13) + 0x38000000u);
  return sign | bit_cast<std::uint32_t>(static_cast<float>(magnitude) * 0x1p-24f);
}

}  // namespace detail

__host__ __device__ __forceinline__ float to_float(float x) { return x; }
__host__ __device__ __forceinline__ float to_float(bf16 x) {
  return detail::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16);
}
__host__ __device__ __forceinline__ float to_float(fp16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  return detail::bit_cast<float>(detail::fp32_bits(x.bits));
#endif
}

/// Rounds to the nearest even T (float, bf16 or fp16). NaN stays NaN, overflow gives infinity.
template <class T>
__host__ __device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, bf16>) {
#ifdef __CUDA_ARCH__
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
    return {detail::bf16_bits(detail::bit_cast<std::uint32_t>(x))};
#endif
  } else {
    static_assert(std::is_same_v<T, fp16>, "from_float<T>: T is float, bf16 or fp16");
#ifdef __CUDA_ARCH__
    return {__half_as_ushort(__float2half_rn(x))};
#else
    return {detail::fp16_bits(detail::bit_cast<std::uint32_t>(x))};
#endif
  }
}

// ---------------------------------------------------------------------------------------------------- global memory

namespace detail {

enum class Cache { plain, read_only, stream };

#ifndef SUBQUAD_SIMT
template <std::size_t Bytes>
struct WordOf;
template <>
struct WordOf<1> : std::type_identity<unsigned char> {};
template <>
struct WordOf<2> : std::type_identity<unsigned short> {};
template <>
struct WordOf<4> : std::type_identity<unsigned int> {};
template <>
struct WordOf<8> : std::type_identity<uint2> {};
template <>
struct WordOf<16> : std::type_identity<uint4> {};
#endif

template <class Value>
constexpr bool is_word =
    std::is_trivially_copyable_v<Value> && sizeof(Value) <= 16 && (sizeof(Value) & (sizeof(Value) - 1)) == 0;

template <class Value, Cache cache>
__device__ __forceinline__ Value read(const void* address) {
  static_assert(is_word<Value>, "a global load moves 1, 2, 4, 8 or 16 bytes");
#ifdef SUBQUAD_SIMT
  simt::detail::global_access(address, sizeof(Value), /*is_store=*/false);
  Value value;
  std::memcpy(&value, address, sizeof(Value));
  return value;
#else
  const auto* word = static_cast<const typename WordOf<sizeof(Value)>::type*>(address);
  if constexpr (cache == Cache::read_only) return bit_cast<Value>(__ldg(word));
  if constexpr (cache == Cache::stream) return bit_cast<Value>(__ldcs(word));
  return bit_cast<Value>(*word);
#endif
}

template <class Value>
__device__ __forceinline__ void write(void* address, const Value& value) {
  static_assert(is_word<Value>, "a global store moves 1, 2, 4, 8 or 16 bytes");
#ifdef SUBQUAD_SIMT
  simt::detail::global_access(address, sizeof(Value), /*is_store=*/true);
  std::memcpy(address, &value, sizeof(Value));
#else
  using Word = typename WordOf<sizeof(Value)>::type;
  *static_cast<Word*>(address) = bit_cast<Word>(value);
#endif
}

}  // namespace detail

/// Global loads of one value. `load_nc` reads through the read-only path: no thread of the launch may write there.
/// `load_stream` marks the line evict-first, for data that is read once.
template <class T>
__device__ __forceinline__ T load(const T* p) {
  return detail::read<T, detail::Cache::plain>(p);
}
template <class T>
__device__ __forceinline__ T load_nc(const T* p) {
  return detail::read<T, detail::Cache::read_only>(p);
}
template <class T>
__device__ __forceinline__ T load_stream(const T* p) {
  return detail::read<T, detail::Cache::stream>(p);
}

/// Global loads of N values as one word of at most 16 bytes; p is aligned to that word.
template <int N, class T>
__device__ __forceinline__ Vec<T, N> load_vec(const T* p) {
  return detail::read<Vec<T, N>, detail::Cache::plain>(p);
}
template <int N, class T>
__device__ __forceinline__ Vec<T, N> load_vec_nc(const T* p) {
  return detail::read<Vec<T, N>, detail::Cache::read_only>(p);
}
template <int N, class T>
__device__ __forceinline__ Vec<T, N> load_vec_stream(const T* p) {
  return detail::read<Vec<T, N>, detail::Cache::stream>(p);
}

/// Global stores of one value, or of N values as one word of at most 16 bytes.
template <class T>
__device__ __forceinline__ void store(T* p, std::type_identity_t<T> value) {
  detail::write(p, value);
}
template <int N, class T>
__device__ __forceinline__ void store_vec(T* p, const Vec<T, N>& value) {
  detail::write(p, value);
}

// ---------------------------------------------------------------------------------------------------------- launches

#ifdef SUBQUAD_SIMT
/// Stands in for cudaStream_t: emulated launches are synchronous.
using stream_t = void*;
#else
using stream_t = cudaStream_t;
#endif

namespace detail {

inline dim3 extent(const char*, dim3 d) { return d; }

// Integers go through here, so that a 64-bit count is refused where dim3 would silently truncate it.
template <class Int>
  requires std::is_integral_v<Int>
dim3 extent(const char* kernel, Int n) {
  if (n < Int{1} || static_cast<unsigned long long>(n) > 0x7fffffffull) {
    throw std::runtime_error("launch of " + std::string(kernel) + ": extent must be in [1, 2^31), got " +
                             std::to_string(n));
  }
  return dim3(static_cast<unsigned>(n));
}

#ifdef SUBQUAD_SIMT

template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes, stream_t,
            Args&&... args) {
  simt::launch({name, grid, block, shared_bytes}, kernel, std::forward<Args>(args)...);
}

#else

inline void check_launch(const char* name, cudaError_t status) {
  if (status != cudaSuccess) {
    throw std::runtime_error("launch of " + std::string(name) + ": " + cudaGetErrorString(status));
  }
}

template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes,
            stream_t stream, Args&&... args) {
  constexpr std::size_t without_opt_in = 48 * 1024;
  if (shared_bytes > without_opt_in) {
    check_launch(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            static_cast<int>(shared_bytes)));
  }
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Params>(std::forward<Args>(args))...);
  check_launch(name, cudaGetLastError());
}

#endif

}  // namespace detail
}  // namespace sq
