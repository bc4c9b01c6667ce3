// The mask solvers as operators: what floe._native is to numpy, for programs made of tensors.
// Not differentiable, on the CPU. What csrc/masks refuses comes as ValueError.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <tuple>

#include "bindings/moe_lora_calls.h"
#include "masks/knapsack.h"
#include "masks/refine.h"
#include "masks/two_class.h"

namespace floe::bindings {
namespace {

// Holds the memory that a solver reads.
struct Numbers {
  Tensor tensor;

  Numbers(const char* name, const Tensor& given) : tensor(given) {
    STD_TORCH_CHECK(given.defined() && given.is_cpu() && given.dim() == 1 &&
                        given.scalar_type() == ScalarType::Double,
                    "floe: ", name, " must be a float64 vector on the CPU");
    tensor = as_contiguous(given);
  }
  std::span<const double> view() const {
    return {data<double>(tensor), static_cast<std::size_t>(tensor.numel())};
  }
};

// A new mask to write to.
struct Mask {
  Tensor tensor;

  explicit Mask(std::int64_t size) : tensor(new_tensor({size}, ScalarType::Bool)) {}
  std::span<bool> view() const {
    return {mutable_data<bool>(tensor), static_cast<std::size_t>(tensor.numel())};
  }
};

Tensor totals_of(std::initializer_list<double> numbers) {
  Tensor totals = new_tensor({static_cast<std::int64_t>(numbers.size())}, ScalarType::Double);
  std::copy(numbers.begin(), numbers.end(), mutable_data<double>(totals));
  return totals;
}

void never(std::int64_t) {}

std::tuple<Tensor, Tensor, Tensor> solve_two_class(const Tensor& head_value,
                                                   const Tensor& neuron_value, double head_cost,
                                                   double neuron_cost, double budget,
                                                   bool literal) {
  const Numbers heads("head_value", head_value), neurons("neuron_value", neuron_value);
  const Mask head_mask(head_value.numel()), neuron_mask(neuron_value.numel());
  const auto reading = literal ? masks::Reading::kLiteral : masks::Reading::kRetain;
  const masks::TwoClassSolution found =
      masks::solve_two_class(heads.view(), neurons.view(), head_cost, neuron_cost, budget, reading,
                             never, head_mask.view(), neuron_mask.view());
  return {head_mask.tensor, neuron_mask.tensor,
          totals_of({found.value, found.cost, found.masked_value, found.masked_cost,
                     found.upper_bound, found.lambda})};
}

std::tuple<Tensor, Tensor> solve_mask(const Tensor& value, const Tensor& cost, double budget,
                                      std::int64_t max_nodes) {
  STD_TORCH_CHECK(max_nodes >= 0, "floe: max_nodes must be >= 0, got ", max_nodes);
  const Numbers values("value", value), costs("cost", cost);
  const Mask mask(value.numel());
  const masks::KnapsackLimits limits{max_nodes, 0.0, never};
  const masks::KnapsackSolution found =
      masks::solve_knapsack(values.view(), costs.view(), budget, limits, mask.view());
  return {mask.tensor, totals_of({found.value, found.cost, found.masked_value, found.masked_cost,
                                  found.upper_bound, found.lambda, found.optimal ? 1.0 : 0.0,
                                  static_cast<double>(found.nodes)})};
}

std::tuple<Tensor, Tensor> refine_masks(const Tensor& value, const Tensor& cost, double budget,
                                        const Tensor& start, std::int64_t layers,
                                        std::int64_t heads, std::int64_t neurons,
                                        const std::string& pairs, bool literal,
                                        std::int64_t max_moves) {
  STD_TORCH_CHECK(max_moves >= 0, "floe: max_moves must be >= 0, got ", max_moves);
  STD_TORCH_CHECK(start.defined() && start.is_cpu() && start.dim() == 1 &&
                      start.scalar_type() == ScalarType::Bool,
                  "floe: mask must be a bool vector on the CPU");
  const Numbers values("value", value), costs("cost", cost);
  const Mask mask(start.numel());
  const Tensor dense = as_contiguous(start);
  const auto* bytes = static_cast<const std::uint8_t*>(dense.const_data_ptr());
  std::transform(bytes, bytes + start.numel(), mask.view().begin(),
                 [](std::uint8_t byte) { return byte != 0; });
  const masks::RefineOptions options{masks::pairs_from(pairs), literal, max_moves, never};
  const masks::RefineSolution found = masks::refine(values.view(), costs.view(), budget,
                                                    {layers, heads, neurons}, options, mask.view());
  return {mask.tensor,
          totals_of({found.value, found.cost, found.masked_value, found.masked_cost,
                     static_cast<double>(found.repairs), static_cast<double>(found.adds),
                     static_cast<double>(found.swaps), found.converged ? 1.0 : 0.0})};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(floe, m) {
  // totals: value, cost, masked_value, masked_cost, upper_bound, lambda
  m.def(
      "solve_two_class(Tensor head_value, Tensor neuron_value, float head_cost, "
      "float neuron_cost, float budget, bool literal=False) -> (Tensor head_mask, "
      "Tensor neuron_mask, Tensor totals)");
  // totals: the same, then whether proven optimal, and the states examined
  m.def(
      "solve_mask(Tensor value, Tensor cost, float budget, int max_nodes=20000000) -> "
      "(Tensor mask, Tensor totals)");
  // totals: value, cost, masked_value, masked_cost, repairs, adds, swaps, and whether no move is
  // left
  m.def(
      "refine_masks(Tensor value, Tensor cost, float budget, Tensor mask, int layers, int heads, "
      "int neurons, str pairs=\"same_layer_cross\", bool literal=False, int max_moves=1000000) -> "
      "(Tensor refined, Tensor totals)");
}

STABLE_TORCH_LIBRARY_IMPL(floe, CPU, m) {
  m.impl("solve_two_class", TORCH_BOX(&solve_two_class));
  m.impl("solve_mask", TORCH_BOX(&solve_mask));
  m.impl("refine_masks", TORCH_BOX(&refine_masks));
}

}  // namespace floe::bindings
