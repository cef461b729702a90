// What every binding in this folder needs: argument checks for memory safety, the current stream, dtype dispatch and
// registration, through torch's stable ABI only. Ops are defined in Python; C++ registers implementations.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <list>
#include <optional>
#include <string>

#include "cuda/portable.cuh"

/// SQ_REGISTER_OPS(m) { m.impl("op", TORCH_BOX(&fn)); }: CUDA tensors of `subquad`, or CPU tensors of `subquad_simt`
/// when the emulator runs the kernels.
#ifdef SUBQUAD_SIMT
#define SQ_REGISTER_OPS(m) STABLE_TORCH_LIBRARY_IMPL(subquad_simt, CPU, m)
#else
#define SQ_REGISTER_OPS(m) STABLE_TORCH_LIBRARY_IMPL(subquad, CUDA, m)

// Declared here because the shim hides it from builds against a CPU-only torch; weak, so that the library loads there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);
#endif

namespace subquad::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

/// Around the launches of one op: the device of the first tensor is current, `stream()` is its current stream. The
/// emulator refuses accesses outside the tensors named here, so name all that the kernels touch, scratch and results
/// included.
class LaunchScope {
 public:
#ifdef SUBQUAD_SIMT
  template <class... Tensors>
  explicit LaunchScope(const Tensors&... tensors) {
    (allow(tensors), ...);
  }
  sq::stream_t stream() const { return nullptr; }

 private:
  void allow(const OptionalTensor& t) {
    if (t.has_value()) allow(*t);
  }
  void allow(const Tensor& t) {
    int64_t elements = t.numel() > 0 ? 1 : 0;
    for (int64_t d = 0; d < t.dim() && elements > 0; ++d) elements += (t.size(d) - 1) * t.stride(d);
    memory_.emplace_back(t.const_data_ptr(), static_cast<size_t>(elements) * t.element_size());
  }
  std::list<simt::MemoryScope> memory_;
#else
  template <class... Tensors>
  explicit LaunchScope(const Tensor& first, const Tensors&...) : guard_(first.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "libtorch_cuda is not loaded: this PyTorch has no CUDA");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(first.get_device_index(), &stream));
    stream_ = static_cast<sq::stream_t>(stream);
  }
  sq::stream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  sq::stream_t stream_ = nullptr;
#endif
};

inline Tensor empty_on(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device());
}

inline Tensor empty_contiguous_like(const Tensor& like) {
  return torch::stable::empty(like.sizes(), like.scalar_type(), std::nullopt, like.device());
}

inline void check_dims(const Tensor& t, const char* name, int64_t dims) {
  STD_TORCH_CHECK(t.dim() == dims, name, ": expected ", dims, " dimensions, got ", t.dim());
}

inline void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> expected) {
  const auto text = [](const auto& sizes) {
    std::string out = "[";
    for (const int64_t size : sizes) out += (out.size() > 1 ? ", " : "") + std::to_string(size);
    return out + "]";
  };
  STD_TORCH_CHECK(std::ranges::equal(t.sizes(), expected), name, ": expected shape ", text(expected), ", got ",
                  text(t.sizes()));
}

inline void check_contiguous(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
}

inline void check_same_device(const Tensor& t, const char* name, const Tensor& other, const char* other_name) {
  STD_TORCH_CHECK(t.device() == other.device(), name, ": expected the device of ", other_name);
}

inline void check_same_dtype(const Tensor& t, const char* name, const Tensor& other, const char* other_name) {
  STD_TORCH_CHECK(t.scalar_type() == other.scalar_type(), name, ": expected the dtype of ", other_name);
}

/// A per-channel fp32 vector of 1 or `channels` elements, any stride. Returns the stride to use, 0 to repeat one value.
inline int64_t check_channel_vector(const Tensor& t, const char* name, int64_t channels) {
  check_dims(t, name, 1);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, ": expected float32");
  STD_TORCH_CHECK(t.size(0) == 1 || t.size(0) == channels, name, ": expected shape [1] or [", channels, "], got [",
                  t.size(0), "]");
  return t.size(0) == 1 ? 0 : t.stride(0);
}

/// fn(T{}) with T = float, sq::bf16 or sq::fp16, the element type of `t`.
template <class Fn>
void dispatch_dtype(const Tensor& t, const char* name, Fn&& fn) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return fn(float{});
    case ScalarType::BFloat16:
      return fn(sq::bf16{});
    case ScalarType::Half:
      return fn(sq::fp16{});
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
  }
}

}  // namespace subquad::cuda
