// What the operators of the MoE-LoRA linear share: argument checks, and running calls' steps.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <iterator>
#include <optional>
#include <vector>

#include "bindings/checks.h"
#include "moe_lora/linear_bf16_dot.h"
#include "moe_lora/linear_cpu.h"

namespace floe::bindings {

using moe_lora::Dropout;
using moe_lora::Step;
using Sizes = std::initializer_list<std::int64_t>;
using OptionalTensors = std::vector<std::optional<Tensor>>;

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

// These two spend their time on torch's dispatcher only where they must: by name, it takes as long
// as all else that a call on few tokens does.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Of an element of a Tensor?[]: torch resolves lazily negated views and zeros without memory in all
// other arguments. A copy does.
inline Tensor resolved(const Tensor& tensor) { return as_contiguous(torch::stable::clone(tensor)); }

inline Tensor new_tensor(Sizes sizes, ScalarType type) {
  std::vector<std::int64_t> strides(sizes.size());
  std::int64_t stride = 1;
  for (std::size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    STD_TORCH_CHECK(
        !__builtin_mul_overflow(stride, std::max<std::int64_t>(1, std::data(sizes)[d]), &stride),
        "floe: a result would have more than 2^63 elements");
  }
  const auto dtype = torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<std::int64_t>(sizes.size()),
                                                         std::data(sizes), strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

inline void check_shape(const char* name, const Tensor& tensor, Sizes sizes) {
  bool matches = tensor.defined() && tensor.is_cpu() &&  // None comes as undefined
                 tensor.dim() == static_cast<std::int64_t>(sizes.size());
  std::int64_t d = 0;
  for (const std::int64_t size : sizes) {
    matches = matches && tensor.size(d++) == size;
  }
  STD_TORCH_CHECK(matches, "floe: ", name, " has a wrong shape or device");
}

inline void check_type(const char* name, const Tensor& tensor, ScalarType type) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, "floe: ", name, " has a wrong dtype");
}

inline std::int64_t value_of_seed(const Tensor& seed) {
  STD_TORCH_CHECK(
      seed.defined() && seed.dim() == 0 && seed.scalar_type() == ScalarType::Long && seed.is_cpu(),
      "floe: seed must be a 0-dimensional int64 tensor on x's device");
  return *data<std::int64_t>(seed);
}

inline Dropout check_dropout(double p, const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "floe: dropout_p must be in [0, 1), got ", p);
  if (p == 0.0) return {};
  STD_TORCH_CHECK(seed.has_value(), "floe: dropout_p > 0 needs a seed");
  return {true, p, value_of_seed(*seed)};
}

// What both directions of a group of linears take, checked and contiguous. Holds the tensors that
// the raw pointers of a call point into.
struct GroupArguments {
  Tensor x;                            // [T, K]
  std::vector<Tensor> shrink, expand;  // of each linear [H + Q, K] and [N, M, r]
  moe_lora::Group group;
  double scaling, temperature;
  Dropout dropout;

  std::int64_t tokens() const { return x.size(0); }
  std::int64_t columns() const { return x.size(1); }
  std::int64_t features(std::size_t linear) const { return expand[linear].size(0); }
  // N of all linears.
  std::int64_t all_features() const {
    std::int64_t sum = 0;
    for (const Tensor& weight : expand) sum += weight.size(0);
    return sum;
  }
  ScalarType type() const { return x.scalar_type(); }
  ScalarType wide() const { return accumulator_type(x); }

  template <typename T>
  moe_lora::Parameter<T> parameter(const Tensor& stored) const {
    return {stored.const_data_ptr(), stored.scalar_type() != type()};
  }
  template <typename T>
  std::vector<moe_lora::Parameter<T>> shrink_parameters() const {
    std::vector<moe_lora::Parameter<T>> parameters;
    for (const Tensor& weight : shrink) parameters.push_back(parameter<T>(weight));
    return parameters;
  }
};

// A parameter has x's dtype, in which it is used, or that of sums.
inline Tensor check_parameter(const char* name, const Tensor& tensor, Sizes sizes,
                              const Tensor& x) {
  check_shape(name, tensor, sizes);
  STD_TORCH_CHECK(
      tensor.scalar_type() == x.scalar_type() || tensor.scalar_type() == accumulator_type(x),
      "floe: ", name, " must have x's dtype or float32 (float64 for float64 x)");
  return as_contiguous(tensor);
}

inline GroupArguments check_group(const Tensor& x, const std::vector<Tensor>& shrink,
                                  const std::vector<Tensor>& expand, double scaling,
                                  double temperature, double dropout_p,
                                  const std::optional<Tensor>& seed, bool gated) {
  STD_TORCH_CHECK(x.defined() && x.is_cpu() && x.dim() == 2, "floe: x must be [T, K]");
  with_float_type(x.scalar_type(), [](auto) {});  // refuses other dtypes
  STD_TORCH_CHECK(!expand.empty() && expand.size() == shrink.size(),
                  "floe: shrink_weights and expand_weights must have one entry per linear");
  STD_TORCH_CHECK(expand[0].defined() && expand[0].dim() == 3 && expand[0].size(1) >= 1 &&
                      expand[0].size(2) >= 1,
                  "floe: expand_weights must be [N, M, r] with M, r >= 1");
  STD_TORCH_CHECK(std::isfinite(scaling), "floe: scaling must be finite, got ", scaling);
  STD_TORCH_CHECK(temperature > 0.0 && std::isfinite(temperature),
                  "floe: temperature must be finite and > 0, got ", temperature);
  const std::int64_t experts = expand[0].size(1), rank = expand[0].size(2);
  const std::int64_t logits = gated ? 0 : experts;
  STD_TORCH_CHECK(!gated || temperature == 1.0,
                  "floe: temperature must be 1 where gates are given, got ", temperature);
  STD_TORCH_CHECK(shrink[0].defined() && shrink[0].dim() == 2,
                  "floe: shrink_weights has a wrong shape or device");
  const std::int64_t rows = shrink[0].size(0);
  const bool shared = rows - logits == rank;  // one A for all experts
  GroupArguments arguments{as_contiguous(x),
                           {},
                           {},
                           {static_cast<std::int64_t>(expand.size()), rank, experts,
                            shared ? rank : experts * rank, logits},
                           scaling,
                           temperature,
                           check_dropout(dropout_p, seed)};
  for (std::size_t g = 0; g < expand.size(); ++g) {
    STD_TORCH_CHECK(expand[g].defined() && expand[g].dim() == 3,
                    "floe: expand_weights must be [N, M, r]");
    arguments.shrink.push_back(check_parameter("shrink_weights", shrink[g],
                                               {arguments.group.stored_rows(), x.size(1)}, x));
    arguments.expand.push_back(
        check_parameter("expand_weights", expand[g], {expand[g].size(0), experts, rank}, x));
    STD_TORCH_CHECK(shrink[g].scalar_type() == shrink[0].scalar_type(),
                    "floe: shrink_weights must have one dtype");
    STD_TORCH_CHECK(expand[g].scalar_type() == expand[0].scalar_type(),
                    "floe: expand_weights must have one dtype");
  }
  return arguments;
}

template <typename Call>
void run_tasks(const Call& call, Step step, std::int64_t first, std::int64_t last) {
#if defined(FLOE_BF16_DOT)
  if constexpr (requires { moe_lora::bf16_dot::run(call, step, first, last); }) {
    if (moe_lora::bf16_dot::available()) return moe_lora::bf16_dot::run(call, step, first, last);
  }
#endif
  moe_lora::run(call, step, first, last);
}

// Steps of several calls side by side, their tasks spread over threads.
class Tasks {
 public:
  // The call must outlive this.
  template <typename Call>
  void add(const Call& call, Step step) {
    const std::int64_t first = count_;
    count_ += call.tasks(step);
    parts_.push_back({first, count_, [&call, step](std::int64_t from, std::int64_t to) {
                        run_tasks(call, step, from, to);
                      }});
  }

  // `elements`: the size of what all tasks read.
  void run(std::int64_t elements) const {
    if (count_ == 0) return;
    const std::int64_t grain = 1 + kElementsPerThread / (1 + elements / count_);
    torch::stable::parallel_for(0, count_, grain, [&](std::int64_t first, std::int64_t last) {
      for (const Part& part : parts_) {
        const std::int64_t from = std::max(first, part.first), to = std::min(last, part.last);
        if (from < to) part.run(from - part.first, to - part.first);
      }
    });
  }

 private:
  struct Part {
    std::int64_t first, last;
    std::function<void(std::int64_t, std::int64_t)> run;
  };
  std::vector<Part> parts_;
  std::int64_t count_ = 0;
};

}  // namespace floe::bindings
