// Refinement by block Fisher information: what masking a set of units costs together, not one by
// one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>

namespace floe::masks {

struct BlockSolution {
  double loss_before = 0.0;  // || sum of the masked units' gradients ||^2 of the masks that came
  double loss = 0.0;         // of the masks that are returned; never more
  double slack = 0.0;        // what is left of the given slack
  std::int64_t swaps = 0;
};

// Changes `mask` (true = retained) in place; the number of masked units stays. `gradient` holds
// `samples` numbers for each unit, unit by unit. Every unit retained at the start, in ascending
// order of its own norm (ties: lower index), offers to take a masked unit's place; it takes that of
// the unit whose return leaves the least loss (ties: lower index), if the loss falls by more than
// rounding and the retained cost rises by at most the slack that is left. One pass,
// O(retained * masked * samples) at worst; pairs that cannot gain are skipped by Cauchy-Schwarz.
// `poll` is called about every 100 ms and may throw to cancel. Throws std::invalid_argument.
BlockSolution rearrange(std::span<const double> gradient, std::size_t samples,
                        std::span<const double> cost, double slack,
                        const std::function<void()>& poll, std::span<bool> mask);

}  // namespace floe::masks
