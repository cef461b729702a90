// A tile of query rows that share one key head: which rows, which keys they see, key tile by key tile. One instruction
// set.
#pragma once

#include "cpu/simd/arena.h"
#include "cpu/simd/tile.h"
#include "ops/interval_attention/params.h"

namespace subquad::cpu::SUBQUAD_ISA::interval {

constexpr int64_t kRows = 128;  // query rows of a tile: rows of all heads of a group, position by position
constexpr int64_t kKeys = 128;  // keys of a tile
constexpr int64_t kGroups = kRows / kTileRows;  // rows are treated kTileRows at a time

/// Rows [first, first + count) of the (position, head of the group) pairs of one batch entry and key head.
struct RowTile {
  int64_t b, kv_head, per_kv, first, count;

  int64_t position(int64_t row) const { return (first + row) / per_kv; }
  int64_t head(int64_t row) const { return kv_head * per_kv + (first + row) % per_kv; }
  int64_t padded() const { return round_up(count, kTileRows); }
};

/// Columns of a key tile that a group of rows sees: all lie in [begin, end); `full` when every row sees the whole tile.
struct Hull {
  int64_t begin, end;
  bool full;
};

/// The keys of a row tile. `slot` restricts it to one interval of each row; -1 takes all.
class VisibleKeys {
 public:
  /// Keys [begin, end), `begin` a multiple of kKeys. `intervals` holds kRows * mask.intervals, `marks` as many as there
  /// are tiles of these keys, and one more.
  VisibleKeys(const IntervalMaskParams& mask, const RowTile& rows, int64_t slot, int64_t begin, int64_t end,
              Interval* intervals, int32_t* marks)
      : mask_(mask),
        rows_(rows),
        per_row_(slot < 0 ? mask.intervals : 1),
        first_tile_(begin / kKeys),
        intervals_(intervals),
        marks_(marks) {
    const int64_t tiles = ceil_div(end - begin, kKeys);
    for (int64_t tile = 0; tile <= tiles; ++tile) marks[tile] = 0;
    for (int64_t row = 0; row < rows.count; ++row) {
      for (int64_t r = 0; r < per_row_; ++r) {
        const Interval at = row_interval(mask, rows.b, rows.head(row), rows.position(row), slot < 0 ? r : slot);
        intervals[row * per_row_ + r] = at;
        const int64_t from = larger(at.begin, begin) - begin, to = smaller(at.end, end) - begin;
        if (from < to) {
          ++marks[from / kKeys];
          --marks[ceil_div(to, kKeys)];
          any_ = true;
        }
      }
    }
    for (int64_t tile = 1; tile < tiles; ++tile) marks[tile] += marks[tile - 1];
  }

  /// Whether any row sees a key, lifetimes aside; of all keys, and of a tile.
  bool any() const { return any_; }
  bool touches(int64_t tile) const { return marks_[tile - first_tile_] > 0; }

  /// What the rows of `group` see of keys [key, key + count).
  Hull hull(int64_t group, int64_t key, int64_t count) const {
    Hull hull{count, 0, mask_.key_start == nullptr};
    const int64_t end = smaller((group + 1) * kTileRows, rows_.count);
    for (int64_t row = group * kTileRows; row < end; ++row) {
      bool full = false;
      for (int64_t r = 0; r < per_row_; ++r) {
        const Interval at = clipped(row, r, key, count);
        if (at.begin >= at.end) continue;
        hull.begin = smaller(hull.begin, at.begin);
        hull.end = larger(hull.end, at.end);
        full |= at.end - at.begin == count;
      }
      hull.full &= full;
    }
    return hull;
  }

  /// x[j] = value for the columns j of [begin, end) that the row does not see.
  void fill_hidden(int64_t row, int64_t key, int64_t begin, int64_t end, float value, float* x) const {
    if (row >= rows_.count) return;
    int64_t at = begin;
    for (int64_t r = 0; r < per_row_; ++r) {
      const Interval seen = clipped(row, r, key, kKeys);
      if (seen.begin >= seen.end) continue;
      for (; at < smaller(seen.begin, end); ++at) x[at] = value;
      at = larger(at, seen.end);
    }
    for (; at < end; ++at) x[at] = value;
    if (mask_.key_start == nullptr) return;
    const int64_t live = smaller(end, mask_.tk - key);
    for (int64_t j = begin; j < live; ++j) x[j] = alive(row, key + j) ? x[j] : value;
  }

  /// Whether the row sees column j of the tile at `key`.
  bool sees(int64_t row, int64_t key, int64_t j) const {
    bool inside = false;
    for (int64_t r = 0; r < per_row_; ++r) {
      const Interval at = intervals_[row * per_row_ + r];
      inside |= key + j >= at.begin && key + j < at.end;
    }
    return inside && (mask_.key_start == nullptr || alive(row, key + j));
  }

 private:
  Interval clipped(int64_t row, int64_t r, int64_t key, int64_t count) const {
    const Interval at = intervals_[row * per_row_ + r];
    return {clamp(at.begin - key, 0, count), clamp(at.end - key, 0, count)};
  }
  bool alive(int64_t row, int64_t key) const {
    const int64_t at = rows_.b * mask_.key_stride_b + rows_.head(row) * mask_.key_stride_h + key;
    const int64_t t = rows_.position(row);
    return t >= mask_.key_start[at] && t < mask_.key_stop[at];
  }

  const IntervalMaskParams& mask_;
  const RowTile& rows_;
  int64_t per_row_, first_tile_;
  bool any_ = false;
  Interval* intervals_;
  int32_t* marks_;
};

}  // namespace subquad::cpu::SUBQUAD_ISA::interval
