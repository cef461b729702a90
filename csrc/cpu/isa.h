// Run-time choice of the instruction set. Torch-free.
#pragma once

namespace subquad::cpu {

enum class Isa : int { kBaseline = 0, kV3 = 1, kV4 = 2 };

/// The level in use: the best that both the CPU and the build have, unless set otherwise.
Isa current_isa();

/// Calls the function of the level in use. Levels that this build lacks are never current.
#if defined(__x86_64__)
#define SQ_DISPATCH_ISA(function, ...)                                           \
  (::subquad::cpu::current_isa() == ::subquad::cpu::Isa::kV4                     \
       ? ::subquad::cpu::v4::function(__VA_ARGS__)                               \
       : (::subquad::cpu::current_isa() == ::subquad::cpu::Isa::kV3 ? ::subquad::cpu::v3::function(__VA_ARGS__) \
                                                                    : ::subquad::cpu::baseline::function(__VA_ARGS__)))
#else
#define SQ_DISPATCH_ISA(function, ...) ::subquad::cpu::baseline::function(__VA_ARGS__)
#endif

}  // namespace subquad::cpu
