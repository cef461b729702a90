// subquad::cats_mlp_fwd on CPU tensors: checks, scratch memory, threads. The arithmetic is in cats_mlp.isa.cpp.
#include "cpu/cats_mlp.h"

#include <algorithm>

#include "cpu/binding.h"
#include "cpu/isa.h"

namespace subquad::cpu {
namespace {

constexpr int64_t kSmallBytes = 1 << 18;  // below this many bytes of weights, waking a thread costs more than it saves
constexpr int64_t kNeuronsPerChunk = 16;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

void check_weight(const Tensor& weight, const char* name, const Tensor& x, int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == rows && weight.size(1) == cols, name, ": expected shape [", rows,
                  ", ", cols, "]");
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
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) <= kCatsMaxTokens, "x: expected shape [N, H] with N <= ", kCatsMaxTokens);
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

CatsMlpKernels kernels_for(DType dtype) { return SQ_DISPATCH_ISA(cats_mlp_kernels, dtype); }

Tensor cats_mlp_fwd(const Tensor& x, const Tensor& w_gate, const Tensor& w_up, const Tensor& w_down, const Tensor& threshold,
                    const OptionalTensor& b_gate, const OptionalTensor& b_up, const OptionalTensor& b_down,
                    int64_t activation, bool inclusive, bool union_mask) {
  CatsMlpParams p = make_params(x, w_gate, w_up, w_down, threshold, b_gate, b_up, b_down, activation, inclusive, union_mask);
  Tensor y = empty({p.tokens, p.hidden}, x.scalar_type());
  if (p.tokens == 0 || p.hidden == 0) return y;
  p.y = y.mutable_data_ptr();
  const CatsMlpKernels kernels = kernels_for(dtype_of(x, "x"));

  CatsMlpScratch scratch{};
  scratch.hidden = round_up(p.hidden, kernels.block);
  scratch.neurons = round_up(p.intermediate, kernels.block);
  scratch.chunks = std::clamp<int64_t>(p.intermediate / kNeuronsPerChunk, 1, kMaxChunks);
  const int64_t x_floats = p.tokens * scratch.hidden;
  const int64_t result_floats = p.tokens * (p.neuron_major ? scratch.chunks * scratch.hidden : scratch.neurons);
  const int64_t alive_floats = p.neuron_major ? 0 : round_up(p.tokens * p.intermediate, 4) / 4;
  Tensor memory = empty({x_floats + result_floats + alive_floats}, ScalarType::Float);
  scratch.x = static_cast<float*>(memory.mutable_data_ptr());
  scratch.partial = scratch.h = scratch.x + x_floats;
  scratch.alive = reinterpret_cast<uint8_t*>(scratch.h + result_floats);

  const bool small = 3 * p.hidden * p.intermediate * static_cast<int64_t>(x.element_size()) < kSmallBytes;
  kernels.pack(p, scratch);
  parallel_items(scratch.chunks, small, [&](int64_t c) { kernels.chunk(p, scratch, c); });
  if (p.neuron_major) {
    parallel_items(p.tokens, small, [&](int64_t token) { kernels.reduce(p, scratch, token); });
  } else {
    const int64_t pieces = std::clamp<int64_t>(p.hidden / kNeuronsPerChunk, 1, kMaxChunks);
    parallel_items(pieces, small, [&](int64_t i) {
      kernels.down(p, scratch, p.hidden * i / pieces, p.hidden * (i + 1) / pieces);
    });
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(subquad, CPU, m) { m.impl("cats_mlp_fwd", TORCH_BOX(&cats_mlp_fwd)); }

}  // namespace subquad::cpu
