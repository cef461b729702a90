// subquad::sink_attention_step_ on CPU tensors.
#include "ops/sink_attention_step/cpu.h"

#include "cpu/threads.h"
#include "ops/sink_attention_step/arguments.h"
#include "torch/register.h"

namespace subquad::cpu {
namespace {

struct Cpu {
  static int64_t scratch(const SinkAttentionStepParams& p, DType dtype) { return of(p, dtype).shared_floats(p); }

  static void run(const SinkAttentionStepParams& p, DType dtype, float* shared, const auto&...) {
    const SinkAttentionStepKernels kernels = of(p, dtype);
    const int64_t heads = p.batch * p.kv_heads;
    constexpr int64_t kSmallProducts = 1 << 18, kSmallCopy = 1 << 16;
    const int64_t products = p.batch * p.heads * p.width * (p.sinks + p.window + p.width) * (p.d + p.dv);
    if (products > 0) {
      kernels.prepare(p, shared);
      parallel_items_with_scratch(kernels.items(p), products < kSmallProducts, kernels.scratch_bytes(p),
                                  [&](int64_t item, void* own) { kernels.attend(p, shared, item, own); });
      parallel_items(kernels.merges(p), products < kSmallProducts,
                     [&](int64_t item) { kernels.merge(p, shared, item); });
    }
    // Only now: what is overwritten was read above.
    parallel_items(heads, heads * p.width * (p.d + p.dv) < kSmallCopy, [&](int64_t item) { kernels.write(p, item); });
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t before = tokens_before(p, b), after = before + new_tokens(p, b);
      p.written[b] = larger(p.written[b], after);
      p.seen[b] = p.advance ? after : before;
    }
  }

 private:
  static SinkAttentionStepKernels of(const SinkAttentionStepParams& p, DType dtype) {
    return SQ_DISPATCH_ISA(sink_attention_step_kernels, dtype, p.kind);
  }
};

}  // namespace

SQ_REGISTER_OPS(m) { m.impl("sink_attention_step_", TORCH_BOX(&sink_attention_step_<Cpu>)); }

}  // namespace subquad::cpu
