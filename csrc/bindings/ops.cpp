// The operators of torch.ops.floe that are written in C++: every schema, and the CPU kernels
// of the Fisher sums (ops_moe_lora*.cpp have the linear's).
// floe_triton defines the routed linear and the dropout in the same namespace, hence a fragment.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "bindings/checks.h"
#include "fisher/fisher.h"

namespace floe::bindings {
namespace {

using torch::stable::parallel_for;

// float64 [S, units], the gradients before rounding.
Tensor unit_gradients(const FisherArguments& arguments) {
  const fisher::Extent& extent = arguments.extent;
  const Tensor partial = arguments.new_partial();
  Tensor gradient = torch::stable::new_empty(arguments.activation, {extent.samples, extent.units},
                                             ScalarType::Double);
  with_float_type(arguments.activation.scalar_type(), [&]<typename T>(T) {
    auto* sums = static_cast<Accumulator<T>*>(partial.mutable_data_ptr());
    auto* gradients = static_cast<double*>(gradient.mutable_data_ptr());
    const fisher::Site<T> site = arguments.site<T>();
    parallel_for(0, extent.samples * extent.splits, 1, [&](std::int64_t first, std::int64_t last) {
      fisher::sum_tokens(site, sums, first, last);
    });
    parallel_for(0, extent.samples * extent.units,
                 kElementsPerThread / (extent.splits * extent.group_size) + 1,
                 [&](std::int64_t first, std::int64_t last) {
                   fisher::sum_splits(sums, extent, gradients, first, last);
                 });
  });
  return gradient;
}

Tensor mask_gradients_cpu(const Tensor& activation, const Tensor& gradient, std::int64_t group_size,
                          const std::optional<Tensor>& token_mask) {
  const FisherArguments arguments = check_fisher(activation, gradient, group_size, token_mask);
  if (arguments.empty()) {
    return torch::stable::new_empty(activation, {arguments.extent.samples, arguments.extent.units},
                                    accumulator_type(activation));
  }
  return torch::stable::to(unit_gradients(arguments), accumulator_type(activation));
}

void accumulate_fisher_cpu(const Tensor& total, const Tensor& activation, const Tensor& gradient,
                           std::int64_t group_size, const std::optional<Tensor>& token_mask,
                           const std::optional<Tensor>& sample_scale) {
  const FisherArguments arguments = check_fisher(activation, gradient, group_size, token_mask);
  const std::optional<Tensor> scale = check_accumulate(total, sample_scale, arguments);
  if (arguments.empty()) return;
  const Tensor gradients = unit_gradients(arguments);
  const auto* factors = scale ? static_cast<const double*>(scale->const_data_ptr()) : nullptr;
  fisher::add_squares(static_cast<const double*>(gradients.const_data_ptr()), factors,
                      arguments.extent.samples, arguments.extent.units,
                      static_cast<double*>(total.mutable_data_ptr()), 0, arguments.extent.units);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(floe, m) {
  m.def(
      "mask_gradients(Tensor activation, Tensor gradient, int group_size, Tensor? token_mask) -> "
      "Tensor");
  m.def(
      "accumulate_fisher_(Tensor(a!) fisher, Tensor activation, Tensor gradient, int group_size, "
      "Tensor? token_mask, Tensor? sample_scale) -> ()");
  m.def(
      "moe_lora_experts(Tensor x, Tensor[] shrink_weights, Tensor[] expand_weights, "
      "Tensor?[] router_biases, Tensor?[] biases, Tensor[] base_outputs, float scaling, "
      "float temperature, float dropout_p, Tensor? seed, Tensor[] gates, int top_k) -> "
      "(Tensor[] ys, Tensor hidden, Tensor gate, Tensor z)");
  m.def(
      "moe_lora_experts_backward(Tensor[] grad_ys, Tensor x, Tensor[] shrink_weights, "
      "Tensor[] expand_weights, Tensor hidden, Tensor gate, Tensor z, float scaling, "
      "float temperature, float dropout_p, Tensor? seed, bool needs_x, bool needs_shrink, "
      "bool needs_expand, bool gated) -> (Tensor grad_x, Tensor[] grad_shrink, "
      "Tensor[] grad_expand, Tensor grad_products, Tensor grad_gates)");
}

STABLE_TORCH_LIBRARY_IMPL(floe, CPU, m) {
  m.impl("mask_gradients", TORCH_BOX(&mask_gradients_cpu));
  m.impl("accumulate_fisher_", TORCH_BOX(&accumulate_fisher_cpu));
}

}  // namespace floe::bindings
