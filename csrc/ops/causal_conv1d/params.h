// POD arguments of the causal convolution: what a binding fills in and a torch-free kernel reads. All strides are in
// elements.
#pragma once

#include <cstdint>

namespace subquad {

constexpr int kConvMaxTaps = 8;
constexpr int64_t kConvBlock = 64;  // tokens whose share of dweight and dbias is one partial sum

/// y[b, t, c] = act(bias[c] + sum_j weight[c, taps - 1 - j] x[b, t - j, map(c)]) + residual[b, t, c], where output
/// channel c = (h * groups + g) * head_dim + e reads input channel map(c) = h * head_dim + e. Tensors named `void*`
/// share one element type (fp32, bf16 or fp16). Every row of the batch is a sequence; with cu_seqlens batch is 1 and
/// holds `sequences` of them. Numbers in cu_seqlens and sequence are clamped before they become addresses.
struct CausalConv1dParams {
  const void* x;              // [batch, time, inputs], tokens x_stride_t apart, last dimension contiguous
  const void* weight;         // [channels, taps], contiguous
  const void* bias;           // [channels] or null
  const void* state;          // [sequences, inputs, taps - 1], contiguous, or null
  const void* residual;       // [batch, time, channels] with strides of its own, or null
  const int32_t* cu_seqlens;  // [sequences + 1] or null
  const int32_t* sequence;    // [time], the sequence of every token; with cu_seqlens only
  void* y;                    // [batch, time, channels], contiguous; forward only
  void* final_state;          // [sequences, inputs, taps - 1], contiguous, or null; forward only
  const void* grad_y;         // [batch, time, channels], contiguous; from here on backward only
  const void* grad_final;     // [sequences, inputs, taps - 1], contiguous, or null
  void* dx;                   // [batch, time, inputs], contiguous
  void* dweight;              // [channels, taps]
  void* dbias;                // [channels], or null without bias
  void* dstate;               // [sequences, inputs, taps - 1], or null without state
  float* partial;             // [batch, blocks(), taps + 1, channels]: sums of one block, the last row for dbias
  int64_t batch;
  int64_t time;
  int64_t channels;
  int64_t inputs;
  int64_t sequences;
  int64_t groups;
  int64_t head_dim;
  int64_t x_stride_b, x_stride_t;
  int64_t residual_stride_b, residual_stride_t;
  int taps;
  bool silu;

  int64_t blocks() const { return (time + kConvBlock - 1) / kConvBlock; }
};

/// One decoding step of `tokens` tokens for each of `batch` rows; the state is a shift register or, with seqlens, a
/// ring.
struct CausalConv1dUpdateParams {
  const void* x;           // [batch, tokens, inputs], contiguous
  void* state;             // [states, inputs, length], any strides
  const void* weight;      // [channels, taps], contiguous
  const void* bias;        // [channels] or null
  const void* residual;    // [batch, tokens, channels], contiguous, or null
  const int32_t* seqlens;  // [batch] or null
  const int32_t* indices;  // [batch] or null: the state of each row; out of range skips it
  void* y;                 // [batch, tokens, channels], contiguous
  int64_t batch;
  int64_t tokens;
  int64_t channels;
  int64_t inputs;
  int64_t states;
  int64_t length;  // >= taps - 1
  int64_t groups;
  int64_t head_dim;
  int64_t state_stride_n, state_stride_c, state_stride_l;
  int taps;
  bool silu;
};

}  // namespace subquad
