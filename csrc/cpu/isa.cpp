#include "cpu/isa.h"

#include <atomic>
#include <cstring>

namespace subquad::cpu {
namespace {

constexpr const char* kNames[] = {"baseline", "v3", "v4", "v4_bf16"};

Isa best() {
#if defined(__x86_64__)
  const bool bf16 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  if (__builtin_cpu_supports("x86-64-v4")) return bf16 ? Isa::kV4Bf16 : Isa::kV4;
  if (__builtin_cpu_supports("x86-64-v3")) return Isa::kV3;
#endif
  return Isa::kBaseline;
}

std::atomic<int>& current() {
  static std::atomic<int> value{static_cast<int>(best())};
  return value;
}

std::atomic<int> noted{0};  // a bit per level

}  // namespace

Isa current_isa() { return static_cast<Isa>(current().load(std::memory_order_relaxed)); }

void note_isa(Isa level) {
  const int bit = 1 << static_cast<int>(level);
  if ((noted.load(std::memory_order_relaxed) & bit) == 0) noted.fetch_or(bit, std::memory_order_relaxed);
}

}  // namespace subquad::cpu

// For python/subquad/_native.py.
#define SQ_EXPORT extern "C" __attribute__((visibility("default")))

SQ_EXPORT const char* subquad_cpu_isa() { return subquad::cpu::kNames[static_cast<int>(subquad::cpu::current_isa())]; }

SQ_EXPORT const char* subquad_cpu_isas() {
  constexpr const char* kUpTo[] = {"baseline", "baseline,v3", "baseline,v3,v4", "baseline,v3,v4,v4_bf16"};
  return kUpTo[static_cast<int>(subquad::cpu::best())];
}

SQ_EXPORT int subquad_set_cpu_isa(const char* name) {
  for (int level = 0; level <= static_cast<int>(subquad::cpu::best()); ++level) {
    if (std::strcmp(name, subquad::cpu::kNames[level]) == 0) {
      subquad::cpu::current().store(level, std::memory_order_relaxed);
      return 1;
    }
  }
  return 0;
}

/// The levels whose kernels were called since this was last asked, a bit each.
SQ_EXPORT int subquad_cpu_isas_ran() { return subquad::cpu::noted.exchange(0, std::memory_order_relaxed); }
