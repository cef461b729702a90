// subquad::quantised_cats_mlp_fwd on CPU tensors: scratch memory and threads.
#include "ops/quantised_cats_mlp/cpu.h"

#include <algorithm>

#include "common/integers.h"
#include "cpu/threads.h"
#include "ops/quantised_cats_mlp/arguments.h"
#include "torch/register.h"

namespace subquad::cpu {
namespace {

constexpr int64_t kSmallBytes = 1 << 16;  // below this many bytes of weights, waking a thread costs more than it saves
constexpr int64_t kMaxChunks = 32;
constexpr int64_t kChunkNeurons = 256;  // at least: shorter lists of active neurons leave nothing to fetch ahead
constexpr int64_t kChannels = 256;      // of an item of the last pass, a multiple of a group

struct Cpu {
  static void run(const QuantisedCatsMlpParams& p, DType dtype, const Tensor& x, const auto&...) {
    if (p.tokens == 0 || p.hidden == 0) return;
    const QuantisedCatsMlpKernels kernels = SQ_DISPATCH_ISA(quantised_cats_mlp_kernels, dtype);
    QuantisedCatsMlpScratch scratch{};
    scratch.ld = p.hidden + 16;
    scratch.chunks = std::clamp<int64_t>(p.intermediate / kChunkNeurons, 1, kMaxChunks);
    const bool four_bits = p.gate != QuantisedFormat::kInt8 || p.up != QuantisedFormat::kInt8;
    scratch.ld_planes = four_bits ? kernels.planes_floats(p.groups()) : 0;
    const int64_t floats = scratch.ld * (1 + scratch.chunks) + scratch.ld_planes;
    const Tensor memory = empty_on(x, {p.tokens * floats}, ScalarType::Float);
    scratch.x = floats_in(memory);
    scratch.partial = scratch.x + p.tokens * scratch.ld;
    scratch.planes = scratch.ld_planes > 0 ? scratch.partial + p.tokens * scratch.ld * scratch.chunks : nullptr;
    const int64_t bytes = p.groups() * (group_bytes(p.gate) + group_bytes(p.up)) + p.down_row_bytes();
    const bool small = p.intermediate * bytes < kSmallBytes;
    for (int64_t token = 0; token < p.tokens; ++token) kernels.pack(p, scratch, token);
    parallel_items_with_scratch(scratch.chunks, small, kernels.own_bytes(p, scratch),
                                [&](int64_t chunk, void* own) { kernels.chunk(p, scratch, chunk, own); });
    parallel_items(ceil_div(p.hidden, kChannels), small, [&](int64_t i) {
      kernels.reduce(p, scratch, i * kChannels, std::min(p.hidden, (i + 1) * kChannels));
    });
  }
};

}  // namespace

SQ_REGISTER_OPS(m) { m.impl("quantised_cats_mlp_fwd", TORCH_BOX(&quantised_cats_mlp_fwd<Cpu>)); }

}  // namespace subquad::cpu
