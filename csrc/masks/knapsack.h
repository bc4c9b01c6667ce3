// Determination with a cost of its own for every unit: the 0/1 knapsack problem, with a
// certificate.
#pragma once

#include <cstdint>
#include <span>

#include "masks/units.h"

namespace floe::masks {

struct KnapsackLimits {
  // States the exact search may examine; 0 stops after the greedy choice and its bound. A count, so
  // that the same input gives the same masks on every machine.
  std::int64_t max_nodes = 20'000'000;
  double seconds = 0.0;  // wall-clock limit of the exact search; 0 means none
  Poll poll;             // told the states examined, about every 100 ms; may throw to cancel
};

struct KnapsackSolution {
  double value = 0.0;  // of the retained units
  double cost = 0.0;
  double masked_value = 0.0;
  double masked_cost = 0.0;
  // lambda * budget + sum_i max(0, value_i - lambda * cost_i) over the units that fit the budget on
  // their own: no feasible choice is worth more, whatever lambda >= 0 is.
  double upper_bound = 0.0;
  double lambda = 0.0;
  bool optimal = false;  // proven: the bound is met (to 1e-12) or the search was exhausted
  std::int64_t nodes = 0;
};

// Maximises the retained value with retained cost <= budget (to a relative 1e-12). Starts from
// value / cost greedy (descending; zero costs first, then larger value, then lower index), fixes
// units whose reduced cost exceeds the gap, and searches the rest. The greedy choice stays unless
// something strictly better is found. O(n) plus the search. Throws std::invalid_argument.
KnapsackSolution solve_knapsack(std::span<const double> value, std::span<const double> cost,
                                double budget, const KnapsackLimits& limits, std::span<bool> mask);

}  // namespace floe::masks
