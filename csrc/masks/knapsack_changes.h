// Better choices by changing a few units of a greedy one: a unit behind the break enters, or one
// before it leaves.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace floe::masks {

struct Change {
  double cost;   // of the choice, what it changes by: < 0 if the unit leaves
  double value;  // likewise
  double loss;   // how much of the linear bound the change gives up, >= 0
  std::size_t position;
};

// The most valuable set of changes that was found, in the order in which they were added.
struct BestChanges {
  double gain;
  std::vector<std::size_t> positions = {};
  std::int64_t states = 0;  // examined
  bool exhausted = false;   // no other set of changes is worth more
};

// The best one or two changes that cost no more than `room` and gain more than `least`; empty if
// there are none. For every first change the best second one is the most valuable among the
// cheapest. O(n log n).
BestChanges best_pair(std::vector<Change> changes, double room, double least);

// The best set of changes that costs no more than `room`, loses less than `reach` and gains more
// than `least`; changes ascend in loss. Lists the sets within two halves of the changes and joins
// the lists like best_pair: about the square root of the sets that there are. Gives up, not
// exhausted, if either list would exceed `most` sets.
BestChanges best_join(const std::vector<Change>& changes, double room, double reach, double least,
                      std::size_t most);

}  // namespace floe::masks
