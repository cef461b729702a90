// Shared memory of a block: poisoned arrays between redzones.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

namespace simt::detail {

/// Places the arrays of one launch in a fixed arena. Every block starts with all of it poisoned: halfwords 0x7fff,
/// which are NaN as fp16, bf16, fp32 and fp64 and large as integers. Redzones between the arrays catch what runs over:
/// at once under AddressSanitizer, else at the end of the block.
class SharedMemory {
 public:
  static constexpr std::size_t kCapacity = 227 * 1024;    // what a block of sm_90 and sm_100 can opt in to
  static constexpr std::size_t kStaticLimit = 48 * 1024;  // what ptxas accepts

  SharedMemory();
  ~SharedMemory();

  void begin_launch(std::size_t dynamic_bytes);
  void begin_block();
  /// Name of an array whose redzone was written to, or null.
  const char* overrun() const;

  /// The array of a declaration, the same for every thread of the block; null when it does not fit.
  void* static_array(const void* identity, const char* name, std::size_t bytes, std::size_t alignment);
  void* dynamic() const { return arena_.get() + arrays_.front().offset; }
  bool contains(const void* address) const;

 private:
  struct Array {
    const void* identity;
    const char* name;
    std::size_t offset;  // into the arena
    std::size_t bytes;
  };

  void* place(const void* identity, const char* name, std::size_t bytes, std::size_t alignment);

  std::unique_ptr<char[]> arena_;
  std::vector<Array> arrays_;
  std::size_t used_ = 0;          // of the arena, redzones included
  std::size_t static_bytes_ = 0;  // of the static arrays
};

}  // namespace simt::detail
