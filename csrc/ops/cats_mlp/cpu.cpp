// subquad::cats_mlp_fwd on CPU tensors: scratch memory and threads. The arithmetic is in cats_mlp.isa.cpp.
#include "ops/cats_mlp/cpu.h"

#include <algorithm>

#include "common/integers.h"
#include "cpu/simd/arena.h"
#include "cpu/threads.h"
#include "ops/cats_mlp/arguments.h"
#include "torch/register.h"

namespace subquad::cpu {
namespace {

constexpr int64_t kSmallBytes = 1 << 18;  // below this many bytes of weights, waking a thread costs more than it saves
constexpr int64_t kNeuronsPerChunk = 16;
constexpr int64_t kWideColumns = 512;

/// A call's scratch memory: one tensor, so that torch's allocator reuses it.
struct Memory {
  CatsMlpScratch scratch{};
  Tensor bytes;

  Memory(const CatsMlpParams& p, const CatsMlpKernels& kernels, const Tensor& x) {
    const bool dense = p.tokens > kCatsMaxTokens;
    scratch.ld_hidden = round_up(p.hidden, kernels.block) + kernels.block;
    scratch.ld_neurons = round_up(p.intermediate, kernels.block) + kernels.block;
    scratch.chunks = dense ? 1 : std::clamp<int64_t>(p.intermediate / kNeuronsPerChunk, 1, kMaxChunks);
    const int64_t h_size = dense ? kernels.input_size : static_cast<int64_t>(sizeof(float));
    const int64_t rows = dense ? round_up(p.tokens, kTokenBlock) : p.tokens;
    const auto carve = [&](Arena arena) {
      scratch.x = arena.take<char>(rows * scratch.ld_hidden * kernels.input_size);
      scratch.partial = arena.take<float>(p.neuron_major ? scratch.chunks * rows * scratch.ld_hidden : 0);
      scratch.h = arena.take<char>(dense || !p.neuron_major ? rows * scratch.ld_neurons * h_size : 0);
      scratch.alive = arena.take<uint8_t>(!dense && !p.neuron_major ? p.tokens * p.intermediate : 0);
      return arena.used();
    };
    bytes = empty_on(x, {carve(Arena(nullptr))}, ScalarType::Byte);
    carve(Arena(bytes.mutable_data_ptr()));
  }
};

/// range(begin, end) over [0, n) in at most `pieces` ranges whose borders are multiples of `grain`.
template <class F>
void parallel_ranges(int64_t n, int64_t grain, int64_t pieces, bool small, const F& range) {
  const int64_t units = ceil_div(n, grain), count = std::min(units, pieces);
  parallel_items(count, small,
                 [&](int64_t i) { range(units * i / count * grain, std::min(n, units * (i + 1) / count * grain)); });
}

void run_sparse(const CatsMlpParams& p, const CatsMlpKernels& kernels, const Tensor& x, bool small) {
  const Memory memory(p, kernels, x);
  const CatsMlpScratch& scratch = memory.scratch;
  kernels.pack(p, scratch);
  parallel_items(scratch.chunks, small, [&](int64_t c) { kernels.chunk(p, scratch, c); });
  if (p.neuron_major) {
    parallel_items(p.tokens, small, [&](int64_t token) { kernels.reduce(p, scratch, token); });
  } else {
    parallel_ranges(p.hidden, 16, kMaxChunks, small, [&](int64_t b, int64_t e) { kernels.down(p, scratch, b, e); });
  }
}

void run_dense(const CatsMlpParams& p, const CatsMlpKernels& kernels, const Tensor& x) {
  const Memory memory(p, kernels, x);
  const CatsMlpScratch& scratch = memory.scratch;
  kernels.pack(p, scratch);
  parallel_ranges(p.intermediate, 16, 4 * kMaxChunks, false,
                  [&](int64_t b, int64_t e) { kernels.dense_hidden(p, scratch, b, e); });
  // No sum depends on where columns are cut: wide ranges, for memory is read in long runs, but one for each thread.
  const int64_t pieces = std::max(ceil_div(p.hidden, kWideColumns), thread_count());
  parallel_ranges(p.hidden, kernels.block, pieces, false,
                  [&](int64_t b, int64_t e) { kernels.dense_down(p, scratch, b, e); });
}

/// The dense path of v4_bf16 rounds h to bf16: harmless in a long sum, visible in a short one.
constexpr int64_t kLongSum = 64;

CatsMlpKernels kernels_for(const CatsMlpParams& p, DType dtype) {
  const bool rounds = p.tokens > kCatsMaxTokens && p.intermediate < kLongSum;
  const Isa level = rounds && current_isa() == Isa::kV4Bf16 ? Isa::kV4 : current_isa();
  return SQ_DISPATCH_ISA_AT(level, cats_mlp_kernels, dtype);
}

struct Cpu {
  static void run(const CatsMlpParams& p, DType dtype, const Tensor& x, const auto&...) {
    STD_TORCH_CHECK(!p.union_mask || p.tokens <= kDenseTokens, "union_mask: expected at most ", kDenseTokens,
                    " rows of x, got ", p.tokens);
    if (p.tokens == 0 || p.hidden == 0) return;
    const CatsMlpKernels kernels = kernels_for(p, dtype);
    const int64_t element_size = static_cast<int64_t>(x.element_size());
    if (p.tokens <= kCatsMaxTokens) {
      return run_sparse(p, kernels, x, 3 * p.hidden * p.intermediate * element_size < kSmallBytes);
    }
    const int64_t tokens = p.tokens, row_bytes = p.hidden * element_size;
    for (int64_t t = 0; t < tokens; t += kDenseTokens) {  // the last panel may be short, but stays on this path
      const int64_t begin = std::max<int64_t>(0, std::min(t, tokens - (kCatsMaxTokens + 1)));
      CatsMlpParams panel = p;
      panel.tokens = std::min(kDenseTokens, tokens - begin);
      panel.x = static_cast<const char*>(p.x) + begin * row_bytes;
      panel.y = static_cast<char*>(p.y) + begin * row_bytes;
      run_dense(panel, kernels, x);
    }
  }
};

}  // namespace

SQ_REGISTER_OPS(m) { m.impl("cats_mlp_fwd", TORCH_BOX(&cats_mlp_fwd<Cpu>)); }

}  // namespace subquad::cpu
