// One option for every layer under a shared budget: the multiple-choice knapsack problem.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "masks/units.h"

namespace floe::masks {

// Gains and costs are [layers, options], row by row.
struct Choices {
  std::span<const double> gain;        // at most 2**900 / layers in size
  std::span<const std::int64_t> cost;  // >= 0
  std::size_t layers = 0;
  std::size_t options = 0;

  double gain_of(std::size_t layer, std::size_t option) const {
    return gain[layer * options + option];
  }
  std::int64_t cost_of(std::size_t layer, std::size_t option) const {
    return cost[layer * options + option];
  }
};

// lambda * budget + sum over the layers of max(gain - lambda * cost): no feasible choice gains
// more. `lambda` minimises it, so it is the value of the linear program.
struct AllocateBound {
  double value = 0.0;
  double lambda = 0.0;
};

// Throws std::invalid_argument if even the cheapest options exceed the budget.
AllocateBound allocate_bound(const Choices& choices, std::int64_t budget);

// Writes the option of every layer: the most gain with total cost <= budget; of equal gains the
// least cost, then the lower options, the first layer first. Dynamic programming over every cost
// from 0 to the budget, layers * (budget + 1) numbers, after options that the bound rules out have
// gone. `poll` is told the layers done. Throws std::invalid_argument.
void allocate(const Choices& choices, std::int64_t budget, const Poll& poll,
              std::span<std::int64_t> index);

}  // namespace floe::masks
