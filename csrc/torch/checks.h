// Checks of arguments that protect memory, and results: what the bindings of every op and device share. Errors read
// `name: expected ..., got ...`, with the names that Python has. Torch's stable headers only.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

#include "torch/dtype.h"

namespace subquad {

using OptionalTensor = std::optional<Tensor>;
using Shape = std::initializer_list<int64_t>;

/// Memory that was given up while the tensor lives on, as sharded parameters have it between their uses.
inline void check_memory(const Tensor& t, const char* name) {
  int64_t bytes = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  STD_TORCH_CHECK(bytes > 0 || t.numel() == 0, name,
                  ": expected a tensor with memory, got one whose storage was freed");
}

/// The tensor that the others of a call must fit, and its name.
struct Anchor {
  const Tensor& tensor;
  const char* name;

  Anchor(const Tensor& of, const char* called) : tensor(of), name(called) { check_memory(of, called); }
  ScalarType dtype() const { return tensor.scalar_type(); }
};

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string text = "[";
  for (const int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

inline void check_dims(const Tensor& t, const char* name, int64_t dims) {
  STD_TORCH_CHECK(t.dim() == dims, name, ": expected ", dims, " dimensions, got ", t.dim());
}

inline void check_shape(const Tensor& t, const char* name, Shape shape) {
  STD_TORCH_CHECK(std::ranges::equal(t.sizes(), shape), name, ": expected shape ", shape_text(shape), ", got ",
                  shape_text(t.sizes()));
}

inline void check_contiguous(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor, got strides ", shape_text(t.strides()));
}

/// Whether neighbours along `dim` are neighbours in memory; the stride of a single one means nothing.
inline bool unit_stride(const Tensor& t, int64_t dim) { return t.size(dim) <= 1 || t.stride(dim) == 1; }

inline void check_last_contiguous(const Tensor& t, const char* name) {
  const int64_t last = t.dim() - 1;
  STD_TORCH_CHECK(unit_stride(t, last), name, ": expected a contiguous last dimension, got stride ", t.stride(last));
}

inline void check_dtype(const Tensor& t, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": expected ", dtype_name(dtype), ", got ",
                  dtype_name(t.scalar_type()));
}

inline void check_device(const Tensor& t, const char* name, const Anchor& anchor) {
  check_memory(t, name);
  STD_TORCH_CHECK(t.device() == anchor.tensor.device(), name, ": expected the device of ", anchor.name,
                  ", got another");
}

inline void check_same_dtype(const Tensor& t, const char* name, const Anchor& anchor) {
  STD_TORCH_CHECK(t.scalar_type() == anchor.dtype(), name, ": expected the dtype of ", anchor.name, ", ",
                  dtype_name(anchor.dtype()), ", got ", dtype_name(t.scalar_type()));
}

/// True for float32, false for the dtype of the anchor; anything else is refused.
inline bool is_wide(const Tensor& t, const char* name, const Anchor& anchor) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == anchor.dtype(), name,
                  ": expected float32 or the dtype of ", anchor.name, ", ", dtype_name(anchor.dtype()), ", got ",
                  dtype_name(t.scalar_type()));
  return t.scalar_type() == ScalarType::Float;
}

/// The data of a contiguous tensor with this dtype and shape, on the anchor's device.
inline const void* data_of(const Tensor& t, const char* name, Shape shape, ScalarType dtype, const Anchor& anchor) {
  check_device(t, name, anchor);
  check_dtype(t, name, dtype);
  check_shape(t, name, shape);
  check_contiguous(t, name);
  return t.const_data_ptr();
}

/// The same with the anchor's dtype.
inline const void* data_of(const Tensor& t, const char* name, Shape shape, const Anchor& anchor) {
  check_same_dtype(t, name, anchor);
  return data_of(t, name, shape, anchor.dtype(), anchor);
}

/// Null where the tensor is absent.
inline const void* data_of(const OptionalTensor& t, const char* name, Shape shape, ScalarType dtype,
                           const Anchor& anchor) {
  return t.has_value() ? data_of(*t, name, shape, dtype, anchor) : nullptr;
}

inline const void* data_of(const OptionalTensor& t, const char* name, Shape shape, const Anchor& anchor) {
  return t.has_value() ? data_of(*t, name, shape, anchor) : nullptr;
}

template <class T>
const float* floats_of(const T& t, const char* name, Shape shape, const Anchor& anchor) {
  return static_cast<const float*>(data_of(t, name, shape, ScalarType::Float, anchor));
}

template <class T>
const int32_t* int32_of(const T& t, const char* name, Shape shape, const Anchor& anchor) {
  return static_cast<const int32_t*>(data_of(t, name, shape, ScalarType::Int, anchor));
}

template <class T>
const int64_t* int64_of(const T& t, const char* name, Shape shape, const Anchor& anchor) {
  return static_cast<const int64_t*>(data_of(t, name, shape, ScalarType::Long, anchor));
}

/// A new contiguous tensor on the device of `beside`.
inline Tensor empty_on(const Tensor& beside, Shape shape, ScalarType dtype) {
  return torch::stable::empty(shape, dtype, std::nullopt, beside.device());
}

/// The same, or an empty one where nobody wants it.
inline Tensor empty_if(bool wanted, const Tensor& beside, Shape shape, ScalarType dtype) {
  return wanted ? empty_on(beside, shape, dtype) : empty_on(beside, {0}, dtype);
}

/// Where a result of float32 is written.
inline float* floats_in(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

}  // namespace subquad
