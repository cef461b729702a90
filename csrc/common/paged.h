// Rows of keys or values, one after the other or in pages.
#pragma once

#include <cstdint>

#include "common/integers.h"

namespace subquad {

/// Where row (b, j, h) of [B, N, H, D] lies, in elements. With a table the tensor is [P, page, H, D], the page a power
/// of two, and rows of b are in the pages that its part of the table names.
struct PagedRows {
  int64_t stride_b, stride_t, stride_h;  // stride_b: from page to page, with a table
  const int32_t* table;                  // [B, pages_per_row] or null; values are not trusted
  int64_t pages_per_row, page_count;
  int page_bits;  // log2 of the page
};

SQ_ISA_BEGIN

SQ_HD int64_t row_offset(const PagedRows& rows, int64_t b, int64_t j, int64_t h) {
  if (rows.table == nullptr) return b * rows.stride_b + j * rows.stride_t + h * rows.stride_h;
  const int64_t page = clamp(rows.table[b * rows.pages_per_row + (j >> rows.page_bits)], 0, rows.page_count - 1);
  const int64_t place = j & ((int64_t{1} << rows.page_bits) - 1);
  return page * rows.stride_b + place * rows.stride_t + h * rows.stride_h;
}

SQ_ISA_END
}  // namespace subquad
