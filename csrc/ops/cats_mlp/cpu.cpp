// subquad::cats_mlp_fwd on CPU tensors: checks, scratch memory, threads. The arithmetic is in cats_mlp.isa.cpp.
#include "ops/cats_mlp/cpu.h"

#include <algorithm>

#include "cpu/binding.h"
#include "cpu/isa.h"

namespace subquad::cpu {
namespace {

constexpr int64_t kSmallBytes = 1 << 18;  // below this many bytes of weights, waking a thread costs more than it saves
constexpr int64_t kNeuronsPerChunk = 16;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

void check_weight(const Tensor& weight, const char* name, const Tensor& x, int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == rows && weight.size(1) == cols, name, ": expected shape [",
                  rows, ", ", cols, "]");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), name, ": expected the dtype of x");
}

const void* bias_pointer(const OptionalTensor& bias, const char* name, const Tensor& x, int64_t size) {
  if (!bias.has_value()) return nullptr;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == size, name, ": expected shape [", size, "]");
  STD_TORCH_CHECK(bias->scalar_type() == x.scalar_type(), name, ": expected the dtype of x");
  STD_TORCH_CHECK(size <= 1 || bias->stride(0) == 1, name, ": expected a contiguous tensor");
  return bias->const_data_ptr();
}

CatsMlpParams make_params(const Tensor& x, const Tensor& w_gate, const Tensor& w_up, const Tensor& w_down,
                          const Tensor& threshold, const OptionalTensor& b_gate, const OptionalTensor& b_up,
                          const OptionalTensor& b_down, int64_t activation, bool inclusive, bool union_mask) {
  STD_TORCH_CHECK(x.dim() == 2, "x: expected shape [N, H]");
  check_contiguous(x, "x");
  STD_TORCH_CHECK(w_gate.dim() == 2, "w_gate: expected shape [I, H]");
  STD_TORCH_CHECK(activation >= 0 && activation < kActivationCount, "activation: unknown code ", activation);
  const int64_t hidden = x.size(1), neurons = w_gate.size(0);
  check_weight(w_gate, "w_gate", x, neurons, hidden);
  check_weight(w_up, "w_up", x, neurons, hidden);
  check_weight(w_down, "w_down", x, hidden, neurons);
  STD_TORCH_CHECK(hidden <= 1 || (w_gate.stride(1) == 1 && w_up.stride(1) == 1),
                  "w_gate, w_up: expected a contiguous last dimension");
  CatsMlpParams p{};
  p.x = x.const_data_ptr();
  p.w_gate = w_gate.const_data_ptr();
  p.w_up = w_up.const_data_ptr();
  p.w_down = w_down.const_data_ptr();
  p.threshold = static_cast<const float*>(threshold.const_data_ptr());
  p.b_gate = bias_pointer(b_gate, "b_gate", x, neurons);
  p.b_up = bias_pointer(b_up, "b_up", x, neurons);
  p.b_down = bias_pointer(b_down, "b_down", x, hidden);
  p.tokens = x.size(0);
  p.hidden = hidden;
  p.intermediate = neurons;
  p.ld_gate = w_gate.stride(0);
  p.ld_up = w_up.stride(0);
  p.neuron_major = w_down.stride(0) == 1 || hidden == 1;
  STD_TORCH_CHECK(p.neuron_major || w_down.stride(1) == 1 || neurons == 1, "w_down: expected strides (1, n) or (n, 1)");
  p.ld_down = p.neuron_major ? w_down.stride(1) : w_down.stride(0);
  p.threshold_stride = threshold_stride(threshold, neurons);
  p.activation = static_cast<Activation>(activation);
  p.inclusive = inclusive;
  p.union_mask = union_mask;
  return p;
}

/// A call's scratch memory: one tensor, so that torch's allocator reuses it.
struct Memory {
  CatsMlpScratch scratch{};
  Tensor bytes;

  Memory(const CatsMlpParams& p, const CatsMlpKernels& kernels) {
    const bool dense = p.tokens > kCatsMaxTokens;
    scratch.ld_hidden = round_up(p.hidden, kernels.block) + kernels.block;
    scratch.ld_neurons = round_up(p.intermediate, kernels.block) + kernels.block;
    scratch.chunks = dense ? 1 : std::clamp<int64_t>(p.intermediate / kNeuronsPerChunk, 1, kMaxChunks);
    const int64_t h_size = dense ? kernels.input_size : static_cast<int64_t>(sizeof(float));
    const int64_t x_bytes = round_up(p.tokens * scratch.ld_hidden * kernels.input_size, 64);
    const int64_t partial_bytes =
        p.neuron_major ? scratch.chunks * p.tokens * scratch.ld_hidden * static_cast<int64_t>(sizeof(float)) : 0;
    const int64_t h_bytes = dense || !p.neuron_major ? round_up(p.tokens * scratch.ld_neurons * h_size, 64) : 0;
    const int64_t alive_bytes = !dense && !p.neuron_major ? p.tokens * p.intermediate : 0;
    bytes = empty({x_bytes + partial_bytes + h_bytes + alive_bytes}, ScalarType::Byte);
    char* base = static_cast<char*>(bytes.mutable_data_ptr());
    scratch.x = base;
    scratch.partial = reinterpret_cast<float*>(base + x_bytes);
    scratch.h = base + x_bytes + partial_bytes;
    scratch.alive = reinterpret_cast<uint8_t*>(base + x_bytes + partial_bytes + h_bytes);
  }
};

/// range(begin, end) over [0, n) in at most `pieces` ranges whose borders are multiples of `grain`.
template <class F>
void parallel_ranges(int64_t n, int64_t grain, int64_t pieces, bool small, const F& range) {
  const int64_t units = (n + grain - 1) / grain, count = std::min(units, pieces);
  parallel_items(count, small,
                 [&](int64_t i) { range(units * i / count * grain, std::min(n, units * (i + 1) / count * grain)); });
}

void run_sparse(const CatsMlpParams& p, const CatsMlpKernels& kernels, bool small) {
  const Memory memory(p, kernels);
  const CatsMlpScratch& scratch = memory.scratch;
  kernels.pack(p, scratch);
  parallel_items(scratch.chunks, small, [&](int64_t c) { kernels.chunk(p, scratch, c); });
  if (p.neuron_major) {
    parallel_items(p.tokens, small, [&](int64_t token) { kernels.reduce(p, scratch, token); });
  } else {
    parallel_ranges(p.hidden, 16, kMaxChunks, small, [&](int64_t b, int64_t e) { kernels.down(p, scratch, b, e); });
  }
}

void run_dense(const CatsMlpParams& p, const CatsMlpKernels& kernels) {
  const Memory memory(p, kernels);
  const CatsMlpScratch& scratch = memory.scratch;
  kernels.pack(p, scratch);
  parallel_ranges(p.intermediate, 16, 4 * kMaxChunks, false,
                  [&](int64_t b, int64_t e) { kernels.dense_hidden(p, scratch, b, e); });
  parallel_ranges(p.hidden, kernels.block, kMaxChunks, false,
                  [&](int64_t b, int64_t e) { kernels.dense_down(p, scratch, b, e); });
}

/// The dense path of v4_bf16 rounds h to bf16: harmless in a long sum, visible in a short one.
constexpr int64_t kLongSum = 64;

CatsMlpKernels kernels_for(const CatsMlpParams& p, DType dtype) {
#if defined(__x86_64__)
  const bool dense = p.tokens > kCatsMaxTokens;
  if (current_isa() == Isa::kV4Bf16 && dense && p.intermediate < kLongSum) return v4::cats_mlp_kernels(dtype);
#endif
  return SQ_DISPATCH_ISA(cats_mlp_kernels, dtype);
}

Tensor cats_mlp_fwd(const Tensor& x, const Tensor& w_gate, const Tensor& w_up, const Tensor& w_down,
                    const Tensor& threshold, const OptionalTensor& b_gate, const OptionalTensor& b_up,
                    const OptionalTensor& b_down, int64_t activation, bool inclusive, bool union_mask) {
  CatsMlpParams p =
      make_params(x, w_gate, w_up, w_down, threshold, b_gate, b_up, b_down, activation, inclusive, union_mask);
  STD_TORCH_CHECK(!union_mask || p.tokens <= kDenseTokens, "union_mask: expected at most ", kDenseTokens, " tokens");
  Tensor y = empty({p.tokens, p.hidden}, x.scalar_type());
  if (p.tokens == 0 || p.hidden == 0) return y;
  p.y = y.mutable_data_ptr();
  const CatsMlpKernels kernels = kernels_for(p, dtype_of(x, "x"));
  const int64_t element_size = static_cast<int64_t>(x.element_size());
  if (p.tokens <= kCatsMaxTokens) {
    run_sparse(p, kernels, 3 * p.hidden * p.intermediate * element_size < kSmallBytes);
    return y;
  }
  const int64_t tokens = p.tokens, row_bytes = p.hidden * element_size;
  for (int64_t t = 0; t < tokens; t += kDenseTokens) {  // the last panel may be short, but stays on this path
    const int64_t begin = std::max<int64_t>(0, std::min(t, tokens - (kCatsMaxTokens + 1)));
    CatsMlpParams panel = p;
    panel.tokens = std::min(kDenseTokens, tokens - begin);
    panel.x = static_cast<const char*>(p.x) + begin * row_bytes;
    panel.y = static_cast<char*>(p.y) + begin * row_bytes;
    run_dense(panel, kernels);
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(subquad, CPU, m) { m.impl("cats_mlp_fwd", TORCH_BOX(&cats_mlp_fwd)); }

}  // namespace subquad::cpu
