// Guards shared by the CPU and CUDA operators. Python (floe/ops.py, floe_triton/checks.py) explains
// a mistake to its user, in full; torch.ops.floe.* can be called past it, so C++ checks in a word
// what its own arithmetic and memory accesses rely on, and nothing else.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <utility>

#include "fisher/fisher.h"
#include "number.h"

namespace floe::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Waking a thread costs as much as this many elements.
inline constexpr std::int64_t kElementsPerThread = 1 << 16;

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() &&
         a.get_device_index() == b.get_device_index();
}

// Calls function(T{}) with the C++ type of `type`: BFloat16, Float16, float or double.
template <typename Function>
void with_float_type(ScalarType type, Function&& function) {
  switch (type) {
    case ScalarType::BFloat16:
      return function(BFloat16{});
    case ScalarType::Half:
      return function(Float16{});
    case ScalarType::Float:
      return function(float{});
    case ScalarType::Double:
      return function(double{});
    default:
      STD_TORCH_CHECK(false, "floe: dtype must be bfloat16, float16, float32 or float64");
  }
}

// The type of partial sums and of mask gradients: float64 for float64, else float32.
inline ScalarType accumulator_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Arguments of both Fisher operators, checked and contiguous. Holds the tensors that the raw
// pointers of site() point into.
struct FisherArguments {
  Tensor activation, gradient;
  std::optional<Tensor> token_mask;
  fisher::Extent extent;

  template <typename T>
  fisher::Site<T> site() const {
    return {static_cast<const T*>(activation.const_data_ptr()),
            static_cast<const T*>(gradient.const_data_ptr()),
            token_mask ? static_cast<const bool*>(token_mask->const_data_ptr()) : nullptr,
            extent.samples,
            activation.size(1),
            extent.columns()};
  }

  Tensor new_partial() const {
    return torch::stable::new_empty(activation, {extent.samples, extent.splits, extent.columns()},
                                    accumulator_type(activation));
  }

  bool empty() const { return extent.samples == 0 || extent.columns() == 0; }
};

inline FisherArguments check_fisher(const Tensor& activation, const Tensor& gradient,
                                    std::int64_t group_size,
                                    const std::optional<Tensor>& token_mask) {
  STD_TORCH_CHECK(activation.defined() && gradient.defined() &&  // None comes as undefined
                      activation.dim() == 3 && gradient.dim() == 3,
                  "floe: activation and gradient must be [S, T, D]");
  for (std::int64_t d = 0; d < 3; ++d) {
    STD_TORCH_CHECK(activation.size(d) == gradient.size(d),
                    "floe: activation and gradient must have one shape");
  }
  with_float_type(activation.scalar_type(), [](auto) {});  // refuses other dtypes
  STD_TORCH_CHECK(activation.scalar_type() == gradient.scalar_type(),
                  "floe: activation and gradient must have one dtype");
  STD_TORCH_CHECK(same_device(activation, gradient),
                  "floe: activation and gradient must be on one device");
  STD_TORCH_CHECK(group_size >= 1 && activation.size(2) % group_size == 0,
                  "floe: group_size must be >= 1 and divide D = ", activation.size(2), ", got ",
                  group_size);
  FisherArguments arguments{
      torch::stable::contiguous(activation), torch::stable::contiguous(gradient), std::nullopt,
      fisher::Extent{activation.size(0), fisher::splits_of(activation.size(1)),
                     activation.size(2) / group_size, group_size}};
  if (token_mask) {
    STD_TORCH_CHECK(token_mask->dim() == 2 && token_mask->size(0) == activation.size(0) &&
                        token_mask->size(1) == activation.size(1) &&
                        token_mask->scalar_type() == ScalarType::Bool &&
                        same_device(*token_mask, activation),
                    "floe: token_mask must be bool [S, T] on the activation's device");
    arguments.token_mask = torch::stable::contiguous(*token_mask);
  }
  return arguments;
}

// `fisher` is written in place, hence contiguous; the scale, which may lie in its memory, is
// copied.
inline std::optional<Tensor> check_accumulate(const Tensor& fisher,
                                              const std::optional<Tensor>& sample_scale,
                                              const FisherArguments& arguments) {
  STD_TORCH_CHECK(fisher.defined() && fisher.dim() == 1 &&
                      fisher.size(0) == arguments.extent.units &&
                      fisher.scalar_type() == ScalarType::Double && fisher.is_contiguous() &&
                      same_device(fisher, arguments.activation),
                  "floe: fisher must be contiguous float64 [D / group_size] on the activation's "
                  "device");
  if (!sample_scale) return std::nullopt;
  STD_TORCH_CHECK(sample_scale->dim() == 1 && sample_scale->size(0) == arguments.extent.samples &&
                      sample_scale->scalar_type() == ScalarType::Double &&
                      same_device(*sample_scale, arguments.activation),
                  "floe: sample_scale must be float64 [S] on the activation's device");
  return torch::stable::contiguous(torch::stable::clone(*sample_scale));
}

}  // namespace floe::bindings
