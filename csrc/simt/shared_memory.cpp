#include "shared_memory.h"

#include <algorithm>
#include <cstdint>

#include "sanitizer.h"

namespace simt::detail {
namespace {

constexpr std::size_t kRedzone = 256;
constexpr std::size_t kMaxArrays = 64;
constexpr std::size_t kMaxAlignment = 128;
constexpr std::size_t kArenaBytes = SharedMemory::kCapacity + (kMaxArrays + 1) * (2 * kRedzone + 3 * kMaxAlignment);

constexpr char poison_byte(std::size_t offset) { return offset % 2 == 0 ? '\xff' : '\x7f'; }

void poison(char* arena, std::size_t begin, std::size_t end) {
  for (std::size_t i = begin; i < end; ++i) arena[i] = poison_byte(i);
}

}  // namespace

SharedMemory::SharedMemory() : arena_(new char[kArenaBytes]) {}

SharedMemory::~SharedMemory() { asan_unpoison(arena_.get(), kArenaBytes); }

void SharedMemory::begin_launch(std::size_t dynamic_bytes) {
  arrays_.clear();
  static_bytes_ = 0;
  used_ = 0;
  asan_poison(arena_.get(), kArenaBytes);
  place(nullptr, "dynamic shared memory", dynamic_bytes, 16);
}

void SharedMemory::begin_block() {
  for (const Array& array : arrays_) poison(arena_.get(), array.offset, array.offset + array.bytes);
}

const char* SharedMemory::overrun() const {
#ifndef SIMT_ASAN
  const char* before = arrays_.front().name;
  std::size_t i = 0;
  for (const Array& array : arrays_) {
    for (; i < array.offset; ++i) {
      if (arena_[i] != poison_byte(i)) return before;
    }
    before = array.name;
    i = array.offset + array.bytes;
  }
  for (; i < used_; ++i) {
    if (arena_[i] != poison_byte(i)) return before;
  }
#endif
  return nullptr;
}

void* SharedMemory::static_array(const void* identity, const char* name, std::size_t bytes, std::size_t alignment) {
  for (const Array& array : arrays_) {
    if (array.identity == identity) return arena_.get() + array.offset;
  }
  const std::size_t total = arrays_.front().bytes + static_bytes_ + bytes;
  if (static_bytes_ + bytes > kStaticLimit || total > kCapacity || arrays_.size() == kMaxArrays) return nullptr;
  static_bytes_ += bytes;
  return place(identity, name, bytes, alignment);
}

bool SharedMemory::contains(const void* address) const {
  return reinterpret_cast<std::uintptr_t>(address) - reinterpret_cast<std::uintptr_t>(arena_.get()) < kArenaBytes;
}

// Aligned to what the declaration promises and no further, so that a wider access through a cast shows as misaligned.
// (AddressSanitizer's redzones end on multiples of 8, hence the minimum.)
void* SharedMemory::place(const void* identity, const char* name, std::size_t bytes, std::size_t alignment) {
  alignment = std::clamp<std::size_t>(alignment, 8, kMaxAlignment);
  char* const arena = arena_.get();
  const std::size_t earliest = reinterpret_cast<std::uintptr_t>(arena) + used_ + kRedzone;
  const std::size_t step = 2 * alignment;
  const std::size_t offset = (earliest + step - 1) / step * step + alignment - reinterpret_cast<std::uintptr_t>(arena);
  const std::size_t end = offset + bytes;
  asan_unpoison(arena + used_, end + kRedzone - used_);
  poison(arena, used_, end + kRedzone);
  asan_poison(arena + used_, offset - used_);
  asan_poison(arena + end, kRedzone);
  arrays_.push_back({identity, name, offset, bytes});
  used_ = end + kRedzone;
  return arena + offset;
}

}  // namespace simt::detail
