// Which instruction set a file of this level is compiled for, by what the compiler itself says.
#include "cpu/isa.h"

namespace subquad::cpu::SUBQUAD_ISA {

Isa compiled_for() {
#if defined(__AVX512BF16__)
  return Isa::kV4Bf16;
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  return Isa::kV4;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
  return Isa::kV3;
#else
  return Isa::kBaseline;
#endif
}

}  // namespace subquad::cpu::SUBQUAD_ISA
