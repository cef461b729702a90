// The CATS gated MLP on a CPU: what the binding and the per-instruction-set kernels agree on. Torch-free.
//
// Up to kCatsMaxTokens tokens, sparse: the neurons are cut into fixed ranges ("chunks"). A chunk computes its gates,
// keeps the active neurons, computes their up products and adds their down rows into a partial result of its own; a
// second pass adds the partials in chunk order. Chunks may run in any order on any number of threads: the result does
// not depend on it. Nor does a token's result depend on the other tokens: every dot product runs along the hidden
// dimension in one chain per lane, however many tokens share a row. A row-major w_down cannot be skipped by neuron:
// there a chunk stores h, and a dense pass follows.
//
// More tokens, dense: gate and up for ranges of neurons with the mask applied to h, then the down product by output
// columns.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"
#include "ops/cats_mlp/params.h"

namespace subquad::cpu {

constexpr int64_t kMaxChunks = 32;
constexpr int64_t kDenseTokens = 256;  // tokens per panel of the dense path; bounds its scratch memory
constexpr int64_t kTokenBlock = 16;

/// Scratch memory of one call. Leading dimensions are padded to whole blocks, and off powers of two: rows a multiple of
/// 4 KiB apart would all fall into the same cache sets.
/// On the dense path rows are padded to kTokenBlock tokens; in bf16 its x and h are panels, see cpu_pairs.h.
struct CatsMlpScratch {
  void* x;         // [tokens, ld_hidden] Input<W>::Type, see vec.h
  float* partial;  // neuron-major: [chunks or 1, tokens, ld_hidden]
  void* h;  // row-major or dense: [tokens, ld_neurons], 0 where dead; float when sparse, Input<W>::Type when dense
  uint8_t* alive;  // sparse and row-major: [tokens, intermediate], 1 where active
  int64_t ld_hidden;
  int64_t ld_neurons;
  int64_t chunks;
};

/// The kernels of one instruction set and weight type. Calls on disjoint ranges may run concurrently.
struct CatsMlpKernels {
  using Range = void (*)(const CatsMlpParams&, const CatsMlpScratch&, int64_t begin, int64_t end);
  int64_t block;                                                               // leading dimensions are multiples of it
  int64_t input_size;                                                          // bytes of Input<W>::Type
  void (*pack)(const CatsMlpParams&, const CatsMlpScratch&);                   // x -> scratch.x; clears h and alive
  void (*chunk)(const CatsMlpParams&, const CatsMlpScratch&, int64_t chunk);   // sparse: partial of a chunk, or its h
  void (*reduce)(const CatsMlpParams&, const CatsMlpScratch&, int64_t token);  // sparse: partials -> y
  Range down;          // sparse, row-major: h -> y[:, begin:end]
  Range dense_hidden;  // dense: h[:, begin:end]
  Range dense_down;    // dense: h -> y[:, begin:end]
};

SQ_KERNELS_BY_ISA(CatsMlpKernels, cats_mlp_kernels, DType dtype)

}  // namespace subquad::cpu
