// Determination with one cost per class (Algorithm 1 of the FLoE paper): which heads and neurons to
// retain when every head costs head_cost and every neuron neuron_cost. Exact, O(n).
#pragma once

#include <cstdint>
#include <span>

#include "masks/units.h"

namespace floe::masks {

enum class Reading {
  kRetain,   // retain the most value with retained cost <= budget (Eq. 3, 5 and 11)
  kLiteral,  // Algorithm 1 as printed: mask the least value, spending the budget on masked units
};

struct TwoClassSolution {
  std::int64_t heads = 0;  // retained heads and neurons
  std::int64_t neurons = 0;
  double value = 0.0;  // of the retained units
  double cost = 0.0;
  double masked_value = 0.0;
  double masked_cost = 0.0;
  double upper_bound = 0.0;  // on the retained value of any feasible choice
  double lambda = 0.0;       // the multiplier that proves it; 0 for the literal reading
};

// Writes true for retained units. Ties: masked first in ascending (value, index); of equally good
// counts of heads the smallest. The number of units a budget pays for is floored with a relative
// tolerance of 1e-12 of the budget and 1e-9 of a unit. Throws std::invalid_argument.
TwoClassSolution solve_two_class(std::span<const double> head_value,
                                 std::span<const double> neuron_value, double head_cost,
                                 double neuron_cost, double budget, Reading reading,
                                 const Poll& poll, std::span<bool> head_mask,
                                 std::span<bool> neuron_mask);

}  // namespace floe::masks
