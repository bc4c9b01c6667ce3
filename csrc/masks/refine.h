// Refinement of masks by single moves (Algorithm 2 of the FLoE paper), with a cost for every unit.
#pragma once

#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>

#include "masks/units.h"

namespace floe::masks {

// Which retained and masked units may change places.
enum class Pairs {
  kSameLayerCross,  // a head and a neuron of one layer (Eq. 14)
  kSameLayer,       // any two units of one layer
  kAll,
};

// Throws std::invalid_argument for another name than same_layer_cross, same_layer or all.
inline Pairs pairs_from(const std::string& name) {
  if (name == "same_layer_cross") return Pairs::kSameLayerCross;
  if (name == "same_layer") return Pairs::kSameLayer;
  if (name == "all") return Pairs::kAll;
  throw std::invalid_argument("pairs must be 'same_layer_cross', 'same_layer' or 'all', got '" +
                              name + "'");
}

// Units are numbered heads first: head h of layer l is l * heads + h, neuron j of layer l is
// layers * heads + l * neurons + j.
struct Layout {
  std::int64_t layers = 1;
  std::int64_t heads = 0;
  std::int64_t neurons = 0;
};

struct RefineOptions {
  Pairs pairs = Pairs::kSameLayerCross;
  // Algorithm 2 as printed: no budget; a masked unit is retained and a retained one masked if the
  // masked value falls and the masked cost does not rise.
  bool literal = false;
  std::int64_t max_moves = 1'000'000;
  Poll poll;  // told the moves made, about every 100 ms; may throw to cancel
};

struct RefineSolution {
  double value = 0.0;  // of the retained units
  double cost = 0.0;
  double masked_value = 0.0;
  double masked_cost = 0.0;
  std::int64_t repairs = 0;  // units masked because the start exceeded the budget
  std::int64_t adds = 0;
  std::int64_t swaps = 0;
  bool converged = false;  // no move improves; false if max_moves ended it
};

// Changes `mask` (true = retained) in place. First repair: while the cost exceeds the budget the
// retained unit of smallest value / cost is masked (ties: larger cost, then higher index). Then
// moves, the best first: retain a masked unit that fits the slack, or let it replace a retained one
// whose cost makes room. A move must gain more than 1e-12 of the value; ties: more budget freed,
// then the lower retained, then the lower masked unit. O(n log n) to start; a move takes O(log n)
// where pruning works and never more than O(n). Throws std::invalid_argument.
RefineSolution refine(std::span<const double> value, std::span<const double> cost, double budget,
                      const Layout& layout, const RefineOptions& options, std::span<bool> mask);

}  // namespace floe::masks
