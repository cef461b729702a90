// Inline functions shared by files that are compiled once per instruction set go between these two macros: each build
// then has its own symbols, and the linker can never hand an AVX-512 copy of an inline function to an older CPU.
#pragma once

#if defined(SUBQUAD_ISA)
#define SQ_ISA_BEGIN inline namespace SUBQUAD_ISA {
#define SQ_ISA_END }
#else
#define SQ_ISA_BEGIN
#define SQ_ISA_END
#endif
