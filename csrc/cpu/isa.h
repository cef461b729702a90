// Run-time choice of the instruction set. Torch-free.
#pragma once

namespace subquad::cpu {

/// x86-64 micro-architecture levels; v4_bf16 adds AVX512-BF16. Elsewhere only the baseline exists.
enum class Isa : int { kBaseline = 0, kV3 = 1, kV4 = 2, kV4Bf16 = 3 };

/// The level in use: the best that both the CPU and the build have, unless set otherwise.
Isa current_isa();

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

/// Calls the function of the level in use.
#if defined(__x86_64__)
#define SQ_DISPATCH_ISA(function, ...)                          \
  ([&] {                                                        \
    switch (::subquad::cpu::current_isa()) {                    \
      case ::subquad::cpu::Isa::kV4Bf16:                        \
        return ::subquad::cpu::v4_bf16::function(__VA_ARGS__);  \
      case ::subquad::cpu::Isa::kV4:                            \
        return ::subquad::cpu::v4::function(__VA_ARGS__);       \
      case ::subquad::cpu::Isa::kV3:                            \
        return ::subquad::cpu::v3::function(__VA_ARGS__);       \
      default:                                                  \
        return ::subquad::cpu::baseline::function(__VA_ARGS__); \
    }                                                           \
  }())
#else
#define SQ_DISPATCH_ISA(function, ...) ::subquad::cpu::baseline::function(__VA_ARGS__)
#endif

}  // namespace subquad::cpu
