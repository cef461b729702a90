// The gated MLP on quantised weights on a CPU: what the binding and the kernels per instruction set agree on.
// Torch-free.
//
// The neurons are cut into fixed ranges ("chunks"). A chunk computes the gates of a round of neurons, lists those that
// are active, then their up products, then adds their down rows into a partial result of its own; a second pass adds
// the partials in chunk order. Chunks may run in any order on any number of threads: the result does not depend on it.
// Nor does a token's result depend on the other tokens: every product runs along the hidden dimension in the same
// chains per lane, and down rows are added in the order of the neurons.
#pragma once

#include "common/dtype.h"
#include "cpu/isa.h"
#include "ops/quantised_cats_mlp/params.h"

namespace subquad::cpu {

/// What a call works in. The leading dimension is off powers of two: rows a multiple of 4 KiB apart would all fall into
/// the same cache sets.
struct QuantisedCatsMlpScratch {
  float* x;        // [tokens, ld]
  float* planes;   // [tokens, ld_planes], see cpu/simd/quantised_planes.h; null where neither gate nor up has four bits
  float* partial;  // [chunks, tokens, ld]
  int64_t ld, ld_planes;
  int64_t chunks;
};

/// Calls on disjoint tokens, chunks or channels may run concurrently.
struct QuantisedCatsMlpKernels {
  void (*pack)(const QuantisedCatsMlpParams&, const QuantisedCatsMlpScratch&,
               int64_t token);  // x to floats, and planes
  void (*chunk)(const QuantisedCatsMlpParams&, const QuantisedCatsMlpScratch&, int64_t chunk, void* own);
  void (*reduce)(const QuantisedCatsMlpParams&, const QuantisedCatsMlpScratch&, int64_t begin, int64_t end);  // to y
  int64_t (*planes_floats)(int64_t groups);                                             // of a token
  int64_t (*own_bytes)(const QuantisedCatsMlpParams&, const QuantisedCatsMlpScratch&);  // of a thread, for `chunk`
};

SQ_KERNELS_BY_ISA(QuantisedCatsMlpKernels, quantised_cats_mlp_kernels, DType dtype)

}  // namespace subquad::cpu
