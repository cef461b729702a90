// What marks functions that several builds share.
#pragma once

// Inline functions shared by files that are compiled once per instruction set go between these two macros: each build
// then has its own symbols, and the linker can never hand an AVX-512 copy of an inline function to an older CPU.
#if defined(SUBQUAD_ISA)
#define SQ_ISA_BEGIN inline namespace SUBQUAD_ISA {
#define SQ_ISA_END }
#else
#define SQ_ISA_BEGIN
#define SQ_ISA_END
#endif

// Functions of the host that nvcc compiles for the device too.
#if defined(__CUDACC__)
#define SQ_HD __host__ __device__ __forceinline__
#else
#define SQ_HD inline
#endif
