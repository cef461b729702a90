// Checks of arguments that protect memory, and results: what the bindings of every op and device share. Errors read
// `name: expected ..., got ...`, with the names that Python has. Torch's stable headers only.
#pragma once

#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <span>
#include <string>

#include "torch/dtype.h"

namespace subquad {

using OptionalTensor = std::optional<Tensor>;
using Shape = std::initializer_list<int64_t>;

constexpr size_t kMostDims = 64;  // of a tensor of torch

/// Memory that was given up while the tensor lives on, as sharded parameters have it between their uses.
inline void check_memory(const Tensor& t, const char* name) {
  int64_t bytes = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  STD_TORCH_CHECK(bytes > 0 || t.numel() == 0, name,
                  ": expected a tensor with memory, got one whose storage was freed");
}

/// Type and index of a tensor's device, as torch's C interface numbers them.
struct DeviceCode {
  int32_t type = 0, index = 0;

  explicit DeviceCode(const Tensor& t) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &index));
  }
  bool operator==(const DeviceCode&) const = default;
};

/// The tensor that the others of a call must fit, and its name.
struct Anchor {
  const Tensor& tensor;
  const char* name;
  ScalarType dtype;
  DeviceCode device;

  Anchor(const Tensor& of, const char* called) : tensor(of), name(called), dtype(of.scalar_type()), device(of) {
    check_memory(of, called);
  }
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

/// The rows of x [..., C], of at least `least` dimensions.
inline int64_t rows_in(const Tensor& x, const char* name, int64_t least) {
  STD_TORCH_CHECK(x.dim() >= least, name, ": expected at least ", least, " dimensions, got ", shape_text(x.sizes()));
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return rows;
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
  STD_TORCH_CHECK(DeviceCode(t) == anchor.device, name, ": expected the device of ", anchor.name, ", got another");
}

inline void check_same_dtype(const Tensor& t, const char* name, const Anchor& anchor) {
  STD_TORCH_CHECK(t.scalar_type() == anchor.dtype, name, ": expected the dtype of ", anchor.name, ", ",
                  dtype_name(anchor.dtype), ", got ", dtype_name(t.scalar_type()));
}

/// True for float32, false for the dtype of the anchor; anything else is refused.
inline bool is_wide(const Tensor& t, const char* name, const Anchor& anchor) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == anchor.dtype, name, ": expected float32 or the dtype of ",
                  anchor.name, ", ", dtype_name(anchor.dtype), ", got ", dtype_name(dtype));
  return dtype == ScalarType::Float;
}

/// The data of a contiguous tensor of this shape, on the anchor's device.
inline const void* dense_of(const Tensor& t, const char* name, Shape shape, const Anchor& anchor) {
  check_device(t, name, anchor);
  check_shape(t, name, shape);
  check_contiguous(t, name);
  return t.const_data_ptr();
}

/// The same with this dtype.
inline const void* data_of(const Tensor& t, const char* name, Shape shape, ScalarType dtype, const Anchor& anchor) {
  check_dtype(t, name, dtype);
  return dense_of(t, name, shape, anchor);
}

/// The same with the anchor's dtype.
inline const void* data_of(const Tensor& t, const char* name, Shape shape, const Anchor& anchor) {
  check_same_dtype(t, name, anchor);
  return dense_of(t, name, shape, anchor);
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

/// The width W of taps [C, W], or [C, 1, W] as modules have them.
inline int64_t taps_of(const Tensor& t, const char* name) {
  const int64_t dims = t.dim();
  STD_TORCH_CHECK(dims == 2 || (dims == 3 && t.size(1) == 1), name, ": expected shape [C, W] or [C, 1, W], got ",
                  shape_text(t.sizes()));
  return t.size(dims - 1);
}

/// Their data, of this number of channels.
inline const void* taps_in(const Tensor& t, const char* name, int64_t channels, int64_t taps, const Anchor& anchor) {
  return t.dim() == 3 ? data_of(t, name, {channels, 1, taps}, anchor) : data_of(t, name, {channels, taps}, anchor);
}

/// A number that float32 holds.
inline float finite(double value, const char* name) {
  STD_TORCH_CHECK(std::abs(value) <= std::numeric_limits<float>::max(), name, ": expected a finite number, got ",
                  value);
  return static_cast<float>(value);
}

/// A new contiguous tensor on the device of `beside`. Not torch::stable::empty, which takes half a microsecond to find
/// the operator by its name.
inline Tensor empty_on(const Tensor& beside, std::span<const int64_t> shape, ScalarType dtype) {
  std::array<int64_t, kMostDims> strides;
  int64_t next = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = next;
    next *= std::max<int64_t>(shape[i], 1);
  }
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  const DeviceCode device(beside);
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                         strides.data(), code, device.type, device.index, &made));
  return Tensor(made);
}

inline Tensor empty_on(const Tensor& beside, Shape shape, ScalarType dtype) {
  return empty_on(beside, std::span(shape.begin(), shape.size()), dtype);
}

/// A new contiguous tensor of the shape of x but for its last dimension.
inline Tensor empty_rows(const Tensor& x, int64_t columns, ScalarType dtype) {
  std::array<int64_t, kMostDims> shape;
  const size_t dims = x.sizes().size();
  std::ranges::copy(x.sizes(), shape.begin());
  shape[dims - 1] = columns;
  return empty_on(x, std::span<const int64_t>(shape.data(), dims), dtype);
}

/// The same, or an empty one where nobody wants it.
inline Tensor empty_if(bool wanted, const Tensor& beside, Shape shape, ScalarType dtype) {
  return wanted ? empty_on(beside, shape, dtype) : empty_on(beside, {0}, dtype);
}

/// Where a result of float32 is written.
inline float* floats_in(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

}  // namespace subquad
