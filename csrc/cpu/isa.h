// Run-time choice of the instruction set. Torch-free.
#pragma once

namespace subquad::cpu {

/// x86-64 micro-architecture levels; v4_bf16 adds AVX512-BF16 and AVX512-VNNI. Elsewhere only the baseline exists.
enum class Isa : int { kBaseline = 0, kV3 = 1, kV4 = 2, kV4Bf16 = 3 };

/// The level in use: the best that both the CPU and the build have, unless set otherwise.
Isa current_isa();

/// Remembers that kernels of this level were called; tests ask for it.
void note_isa(Isa level);

/// Declares `Type name(...)`, which every level defines in its own namespace, in *.isa.cpp.
#define SQ_KERNELS_BY_ISA(Type, name, ...) \
  namespace baseline {                     \
  Type name(__VA_ARGS__);                  \
  }                                        \
  namespace v3 {                           \
  Type name(__VA_ARGS__);                  \
  }                                        \
  namespace v4 {                           \
  Type name(__VA_ARGS__);                  \
  }                                        \
  namespace v4_bf16 {                      \
  Type name(__VA_ARGS__);                  \
  }

/// The level that the files of a level are really compiled for.
SQ_KERNELS_BY_ISA(Isa, compiled_for)

/// Calls the function of the level of this name.
#define SQ_CALL_ISA(level, function, ...) \
  (::subquad::cpu::note_isa(::subquad::cpu::level::compiled_for()), ::subquad::cpu::level::function(__VA_ARGS__))

/// Calls the function of the level `isa`.
#if defined(__x86_64__)
#define SQ_DISPATCH_ISA_AT(isa, function, ...)               \
  ([&] {                                                     \
    switch (isa) {                                           \
      case ::subquad::cpu::Isa::kV4Bf16:                     \
        return SQ_CALL_ISA(v4_bf16, function, __VA_ARGS__);  \
      case ::subquad::cpu::Isa::kV4:                         \
        return SQ_CALL_ISA(v4, function, __VA_ARGS__);       \
      case ::subquad::cpu::Isa::kV3:                         \
        return SQ_CALL_ISA(v3, function, __VA_ARGS__);       \
      default:                                               \
        return SQ_CALL_ISA(baseline, function, __VA_ARGS__); \
    }                                                        \
  }())
#else
#define SQ_DISPATCH_ISA_AT(isa, function, ...) SQ_CALL_ISA(baseline, function, __VA_ARGS__)
#endif

/// Calls the function of the level in use.
#define SQ_DISPATCH_ISA(function, ...) SQ_DISPATCH_ISA_AT(::subquad::cpu::current_isa(), function, __VA_ARGS__)

}  // namespace subquad::cpu
