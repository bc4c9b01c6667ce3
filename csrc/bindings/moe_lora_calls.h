// What the operators of the MoE-LoRA linear share: argument checks, and running a call's steps.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <type_traits>

#include "bindings/checks.h"
#include "moe_lora/linear_bf16_dot.h"
#include "moe_lora/linear_cpu.h"

namespace floe::bindings {

using moe_lora::Dropout;
using moe_lora::Step;
using Sizes = std::initializer_list<std::int64_t>;

inline constexpr std::int64_t kRoutedPerThread =
    1 << 12;  // as kElementsPerThread, each an exponential

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline Tensor contiguous(const Tensor& tensor, ScalarType type) {
  return torch::stable::contiguous(tensor.scalar_type() == type ? tensor
                                                                : torch::stable::to(tensor, type));
}

inline Tensor empty(const Tensor& like, Sizes sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

inline void check_shape(const char* name, const Tensor& tensor, Sizes sizes) {
  bool matches = tensor.is_cpu() && tensor.dim() == static_cast<std::int64_t>(sizes.size());
  std::int64_t d = 0;
  for (const std::int64_t size : sizes) {
    matches = matches && tensor.size(d++) == size;
  }
  STD_TORCH_CHECK(matches, "floe: ", name, " has a wrong shape or device");
}

inline void check_type(const char* name, const Tensor& tensor, ScalarType type) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, "floe: ", name, " has a wrong dtype");
}

// A parameter: of the activations' dtype, in which it is used, or float32.
inline void check_parameter(const char* name, const Tensor& tensor, ScalarType type) {
  STD_TORCH_CHECK(tensor.scalar_type() == type || tensor.scalar_type() == ScalarType::Float,
                  "floe: ", name, " must have the activations' dtype or float32");
}

inline std::int64_t value_of_seed(const Tensor& seed) {
  STD_TORCH_CHECK(seed.dim() == 0 && seed.scalar_type() == ScalarType::Long && seed.is_cpu(),
                  "floe: seed must be a 0-dimensional int64 tensor on x's device");
  return *data<std::int64_t>(seed);
}

inline Dropout check_dropout(double p, const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "floe: dropout_p must be in [0, 1), got ", p);
  if (p == 0.0) return {};
  STD_TORCH_CHECK(seed.has_value(), "floe: dropout_p > 0 needs a seed");
  return {true, p, value_of_seed(*seed)};
}

// All steps of a call, tasks spread over threads; `elements` is the size of what is read.
template <template <typename> class Call, typename T>
void run_steps(const Call<T>& call, std::int64_t elements) {
  for (const Step step : {Step::kPack, Step::kRun, Step::kFinish}) {
    const std::int64_t tasks = call.tasks(step);
    if (tasks == 0) continue;
    const std::int64_t grain = 1 + kElementsPerThread / (1 + elements / tasks);
    torch::stable::parallel_for(0, tasks, grain, [&](std::int64_t first, std::int64_t last) {
#if defined(FLOE_BF16_DOT)
      if constexpr (std::is_same_v<T, BFloat16>) {
        if (moe_lora::bf16_dot::available()) {
          return moe_lora::bf16_dot::run(call, step, first, last);
        }
      }
#endif
      moe_lora::run(call, step, first, last);
    });
  }
}

}  // namespace floe::bindings
