// The device and the stream of the launches of one op. Bindings include it, kernels do not.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <list>
#include <optional>

#include "cuda/portable.cuh"
#include "torch/checks.h"

#ifndef SUBQUAD_SIMT
// Declared here because the shim hides it from builds against a CPU-only torch; weak, so that the library loads there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);
#endif

namespace subquad::cuda {

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

/// fn(T{}, stream) where T is float, sq::bf16 or sq::fp16; `tensors` are those of its LaunchScope.
template <class Fn, class... Tensors>
void launch(DType dtype, const Fn& fn, const Tensors&... tensors) {
  const LaunchScope scope(tensors...);
  by_dtype<sq::bf16, sq::fp16>(dtype, [&](auto element) { fn(element, scope.stream()); });
}

}  // namespace subquad::cuda
