// Arithmetic of sizes and offsets.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace subquad {
SQ_ISA_BEGIN

SQ_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

SQ_HD constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

SQ_HD constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

SQ_HD constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

SQ_HD constexpr int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

SQ_ISA_END
}  // namespace subquad
