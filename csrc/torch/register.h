// SQ_REGISTER_OPS(m) { m.impl("op", TORCH_BOX(&fn)); }: implementations for CPU or CUDA tensors in `subquad`, or, where
// the emulator runs the CUDA kernels, for CPU tensors in `subquad_simt`. Ops are defined in Python.
#pragma once

#include <torch/csrc/stable/library.h>

#if defined(SUBQUAD_SIMT)
#define SQ_REGISTER_OPS(m) STABLE_TORCH_LIBRARY_IMPL(subquad_simt, CPU, m)
#elif defined(__CUDACC__)
#define SQ_REGISTER_OPS(m) STABLE_TORCH_LIBRARY_IMPL(subquad, CUDA, m)
#else
#define SQ_REGISTER_OPS(m) STABLE_TORCH_LIBRARY_IMPL(subquad, CPU, m)
#endif
