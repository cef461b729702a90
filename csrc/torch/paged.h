// Checks of keys that may lie in pages.
#pragma once

#include <bit>

#include "common/paged.h"
#include "torch/checks.h"

namespace subquad {

/// The number of keys of a row: N of `keys` [B, N, H, D], or, with a table [B, pages], pages * page of [P, page, H, D].
inline int64_t paged_keys(const Tensor& keys, const OptionalTensor& block_table) {
  return block_table.has_value() ? block_table->size(1) * keys.size(1) : keys.size(1);
}

/// `x` is rows of `heads` heads for a batch of `batch`; its last dimension is dense.
inline PagedRows paged_rows(const Tensor& x, const char* name, const OptionalTensor& block_table, int64_t batch,
                            int64_t heads, int64_t head_dim, const Anchor& anchor) {
  check_dims(x, name, 4);
  check_device(x, name, anchor);
  check_same_dtype(x, name, anchor);
  check_last_contiguous(x, name);
  const int64_t rows = block_table.has_value() ? x.size(0) : batch;
  check_shape(x, name, {rows, x.size(1), heads, head_dim});
  PagedRows r{x.stride(0), x.stride(1), x.stride(2), nullptr, 0, 0, 0};
  if (!block_table.has_value()) return r;
  const int64_t page = x.size(1);
  STD_TORCH_CHECK(page > 0 && std::has_single_bit(static_cast<uint64_t>(page)), name,
                  ": expected a page that is a power of two, got ", page);
  STD_TORCH_CHECK(rows > 0, name, ": expected at least one page, got none");
  check_dims(*block_table, "block_table", 2);
  r.pages_per_row = block_table->size(1), r.page_count = rows;
  r.table = int32_of(block_table, "block_table", {batch, r.pages_per_row}, anchor);
  r.page_bits = std::countr_zero(static_cast<uint64_t>(page));
  return r;
}

}  // namespace subquad
