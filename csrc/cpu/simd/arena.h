// One allocation cut into pieces for what a kernel works in.
#pragma once

#include "common/integers.h"

namespace subquad {
SQ_ISA_BEGIN

/// Pieces aligned to 64 bytes where the memory is; without memory it only counts the bytes.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

SQ_ISA_END
}  // namespace subquad
