// The step of a streaming cache: all new tokens attend, then they enter. Launches follow each other on the stream, for
// a place in the ring may be read by any block until attention is over.
#pragma once

#include "ops/sink_attention_step/cuda_read.cuh"
#include "ops/sink_attention_step/cuda_write.cuh"

namespace subquad::cuda {

template <class T, class R>
void sink_attention_step_on(const SinkAttentionStepParams& p, float* scratch, sq::stream_t stream) {
  constexpr int64_t kAlone = 16, kMostWriters = 64;  // rounds of one writer that are worth a launch less; blocks
  const SinkPlan plan = sink_plan(p);
  const int64_t rows = p.batch * p.width * p.heads;
  if (rows > 0) {
    const int64_t blocks = p.batch * p.kv_heads * sink_row_groups(p) * plan.splits;
    const auto launch = [&](auto rows_of_block) {
      constexpr int kRows = decltype(rows_of_block)::value;
      const auto bytes = static_cast<std::size_t>(sink_shared_floats<kRows>(p, plan)) * sizeof(float);
      SQ_LAUNCH((sink_attention_split_kernel<T, R, kRows>), blocks, kSinkThreads, bytes, stream, p, plan, scratch);
    };
    if (few_sink_rows(p)) {
      launch(std::integral_constant<int, kFewRows>{});
    } else {
      launch(std::integral_constant<int, kSinkRows>{});
    }
  }
  const int64_t rounds = ceil_div(p.width * p.kv_heads, kSinkWarps);
  const int64_t writers = rounds <= kAlone ? 1 : smaller(rounds, kMostWriters);
  SQ_LAUNCH((sink_attention_enter_kernel<T, R>), rows + p.batch * writers, kSinkThreads, 0, stream, p,
            static_cast<const float*>(scratch), plan.splits, rows, writers);
  if (writers == 1) return;
  SQ_LAUNCH((sink_attention_advance_kernel<>), ceil_div(p.batch, kSinkThreads), kSinkThreads, 0, stream, p);
}

template <class T>
void sink_attention_step(const SinkAttentionStepParams& p, float* scratch, sq::stream_t stream) {
  if (p.batch == 0) return;
  switch (p.kind) {
    case RingKind::kInt8:
      return sink_attention_step_on<T, std::int8_t>(p, scratch, stream);
    case RingKind::kFloat8:
      return sink_attention_step_on<T, Float8>(p, scratch, stream);
    default:
      return sink_attention_step_on<T, T>(p, scratch, stream);
  }
}

}  // namespace subquad::cuda
