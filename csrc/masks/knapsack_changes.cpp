#include "masks/knapsack_changes.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

namespace floe::masks {
namespace {

using Index = std::uint32_t;

constexpr Index kRoot = std::numeric_limits<Index>::max();

// A set of changes: one more than `parent`'s.
struct Set {
  double cost;
  double value;
  double loss;
  Index parent;
  Index change;
};

// All sets of changes that lose less than `reach`, the empty one first; changes ascend in loss. An
// empty list stands for more than `most`.
std::vector<Set> sets_of(const std::vector<Change>& changes, double reach, std::size_t most) {
  std::vector<Set> sets{{0.0, 0.0, 0.0, kRoot, kRoot}};
  for (std::size_t i = 0; i < sets.size(); ++i) {
    const Set set = sets[i];
    for (std::size_t next = set.change == kRoot ? 0 : set.change + 1; next < changes.size();
         ++next) {
      const Change& change = changes[next];
      if (!(set.loss + change.loss < reach)) break;
      if (sets.size() == most) return {};
      sets.push_back({set.cost + change.cost, set.value + change.value, set.loss + change.loss,
                      static_cast<Index>(i), static_cast<Index>(next)});
    }
  }
  return sets;
}

void append(std::vector<std::size_t>& positions, const std::vector<Set>& sets, Index set,
            const std::vector<Change>& changes) {
  for (; sets[set].parent != kRoot; set = sets[set].parent)
    positions.push_back(changes[sets[set].change].position);
}

// Sets by cost.
std::vector<std::pair<double, Index>> by_cost(const std::vector<Set>& sets) {
  std::vector<std::pair<double, Index>> order(sets.size());
  for (Index i = 0; i < order.size(); ++i) order[i] = {sets[i].cost, i};
  std::ranges::sort(order);
  return order;
}

}  // namespace

BestChanges best_pair(std::vector<Change> changes, double room, double least) {
  constexpr std::size_t kNone = std::numeric_limits<std::size_t>::max();
  changes.push_back({0.0, 0.0, 0.0, kNone});  // so that a pair can be a single change
  std::ranges::stable_sort(changes, {}, &Change::cost);
  // The two most valuable of the changes up to each: the best second change may be the first.
  std::vector<std::array<Index, 2>> best_two(changes.size());
  for (Index i = 1; i < changes.size(); ++i) {
    auto [one, two] = best_two[i - 1];
    if (changes[i].value > changes[one].value) {
      two = std::exchange(one, i);
    } else if (one == two || changes[i].value > changes[two].value) {
      two = i;
    }
    best_two[i] = {one, two};
  }
  BestChanges best{.gain = least};
  best.states = static_cast<std::int64_t>(changes.size());
  std::size_t fitting = changes.size();
  for (std::size_t i = 0; i < changes.size(); ++i) {
    while (fitting > 0 && changes[i].cost + changes[fitting - 1].cost > room) --fitting;
    if (fitting == 0) break;
    const auto [one, two] = best_two[fitting - 1];
    const std::size_t j = one == i ? two : one;
    if (i == j || !(changes[i].value + changes[j].value > best.gain)) continue;
    best.gain = changes[i].value + changes[j].value;
    best.positions = {changes[i].position, changes[j].position};
  }
  std::erase(best.positions, kNone);
  return best;
}

BestChanges best_join(const std::vector<Change>& changes, double room, double reach, double least,
                      std::size_t most) {
  std::array<std::vector<Change>, 2> half;
  for (std::size_t i = 0; i < changes.size() && changes[i].loss < reach; ++i)
    half[i % 2].push_back(changes[i]);
  BestChanges best{.gain = least};
  const std::vector<Set> first = sets_of(half[0], reach, most);
  const std::vector<Set> second = sets_of(half[1], reach, most);
  best.states = static_cast<std::int64_t>(first.size() + second.size());
  if (first.empty() || second.empty()) return best;
  const auto second_order = by_cost(second);
  std::vector<Index> most_valuable(second.size());  // of the cheapest
  for (std::size_t i = 0; i < second.size(); ++i) {
    const Index one = second_order[i].second;
    const Index before = i == 0 ? one : most_valuable[i - 1];
    most_valuable[i] = second[one].value > second[before].value ? one : before;
  }
  std::pair<Index, Index> found{0, 0};
  std::size_t fitting = second.size();
  for (const auto& [cost, i] : by_cost(first)) {
    while (fitting > 0 && cost + second_order[fitting - 1].first > room) --fitting;
    if (fitting == 0) break;
    const Index j = most_valuable[fitting - 1];
    if (!(first[i].value + second[j].value > best.gain)) continue;
    best.gain = first[i].value + second[j].value;
    found = {i, j};
  }
  append(best.positions, first, found.first, half[0]);
  append(best.positions, second, found.second, half[1]);
  best.exhausted = true;
  return best;
}

}  // namespace floe::masks
