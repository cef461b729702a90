// The CATS gated MLP on a CPU: what the binding and the per-instruction-set kernels agree on. Torch-free.
//
// The neurons are cut into fixed ranges ("chunks"). A chunk computes its gates, keeps the active neurons, computes their up
// products and adds their down rows into a partial result of its own; a second pass adds the partials in chunk order. Chunks
// may run in any order on any number of threads: the result does not depend on it. Nor does a token's result depend on the
// other tokens: every dot product runs along the hidden dimension in one chain per lane, however many tokens share a row.
#pragma once

#include <cstdint>

#include "common/cats_params.h"
#include "cpu/dtype.h"

namespace subquad::cpu {

constexpr int64_t kMaxChunks = 32;

/// Scratch memory of one call, in floats, all [tokens, ...] with rows `hidden` or `neurons` rounded up to a whole block.
struct CatsMlpScratch {
  float* x;         // [tokens, hidden]: widened, in packed order
  float* partial;   // neuron-major: [chunks, tokens, hidden]; row-major: unused
  float* h;         // row-major: [tokens, neurons]: 0 where dead, in packed order
  uint8_t* alive;   // row-major: [tokens, intermediate]: 1 where active
  int64_t hidden;
  int64_t neurons;
  int64_t chunks;
};

/// The kernels of one instruction set and weight type. Ranges are half open; calls on disjoint ranges may run concurrently.
struct CatsMlpKernels {
  int block;                                                                                    // see vec.h
  void (*pack)(const CatsMlpParams&, const CatsMlpScratch&);                                    // x -> scratch.x
  void (*chunk)(const CatsMlpParams&, const CatsMlpScratch&, int64_t chunk);                    // gate, up, own partial or h
  void (*reduce)(const CatsMlpParams&, const CatsMlpScratch&, int64_t token);                   // partials -> y, neuron-major
  void (*down)(const CatsMlpParams&, const CatsMlpScratch&, int64_t begin, int64_t end);        // h -> y[:, begin:end], row-major
};

namespace baseline {
CatsMlpKernels cats_mlp_kernels(DType dtype);
}
namespace v3 {
CatsMlpKernels cats_mlp_kernels(DType dtype);
}
namespace v4 {
CatsMlpKernels cats_mlp_kernels(DType dtype);
}

}  // namespace subquad::cpu
