// The exact search among the units near the break of a greedy choice: better choices by changing a
// few units of it. A unit behind the break enters, or one before it leaves.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "masks/knapsack.h"
#include "masks/knapsack_order.h"
#include "masks/units.h"

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

using Index = std::uint32_t;

inline constexpr Index kRoot = std::numeric_limits<Index>::max();

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
inline std::vector<Set> sets_of(const std::vector<Change>& changes, double reach,
                                std::size_t most) {
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

inline void append(std::vector<std::size_t>& positions, const std::vector<Set>& sets, Index set,
                   const std::vector<Change>& changes) {
  for (; sets[set].parent != kRoot; set = sets[set].parent)
    positions.push_back(changes[sets[set].change].position);
}

// Sets by cost.
inline std::vector<std::pair<double, Index>> by_cost(const std::vector<Set>& sets) {
  std::vector<std::pair<double, Index>> order(sets.size());
  for (Index i = 0; i < order.size(); ++i) order[i] = {sets[i].cost, i};
  std::ranges::sort(order);
  return order;
}

// The best one or two changes that cost no more than `room` and gain more than `least`; empty if
// there are none. For every first change the best second one is the most valuable among the
// cheapest. O(n log n).
inline BestChanges best_pair(std::vector<Change> changes, double room, double least) {
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

// The best set of changes that costs no more than `room`, loses less than `reach` and gains more
// than `least`; changes ascend in loss. Lists the sets within two halves of the changes and joins
// the lists like best_pair: about the square root of the sets that there are. Gives up, not
// exhausted, if either list would exceed `most` sets.
inline BestChanges best_join(const std::vector<Change>& changes, double room, double reach,
                             double least, std::size_t most) {
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

// Searches for something better than the greedy choice by changing it near the break unit: units
// behind the break may enter, units before it may leave, in turn and nearest first (Pisinger's
// expanding core). A state is a set of such changes; a state that costs no less and is worth no
// more than another, or whose linear bound does not beat the best choice known, is dropped.
class CoreSearch {
 public:
  // `units`: those that may change, the first `end` of them retained; `room`: what the retained
  // ones, and all that may not change, leave of the capacity.
  CoreSearch(const Ordered& units, std::size_t end, double room, double lambda, double tolerance,
             const KnapsackLimits& limits)
      : units_(units),
        end_(end),
        room_(room),
        lambda_(lambda),
        tolerance_(tolerance),
        limits_(limits),
        ticker_(limits.poll),
        start_(std::chrono::steady_clock::now()) {}

  // `best`: the greedy choice's value beyond the prefix; `bound`: the upper bound beyond it.
  // Returns true if the search was exhausted.
  bool run(double best, double bound) {
    bound_ = bound;
    best_ = best;
    const BestChanges pair = best_pair(changes_near(kNear), room_, best);
    nodes_ += pair.states;
    // Just below it, so that the search finds what it would have found without.
    best_ = std::max(best, pair.gain - 2.0 * tolerance_);
    const std::int64_t few = std::min(limits_.max_nodes, nodes_ + kShort);
    const bool exhausted = search(few) || join() || search(limits_.max_nodes);
    if (!improved() && pair.gain > best) take(pair);
    return exhausted;
  }

  std::int64_t nodes() const { return nodes_; }

  // The positions (in `units`) whose choice differs from the prefix; valid when `improved`.
  bool improved() const { return best_node_ != kRoot; }
  std::vector<std::size_t> changes() const {
    std::vector<std::size_t> positions;
    for (std::uint32_t node = best_node_; node != kRoot; node = history_[node].parent)
      positions.push_back(history_[node].position);
    return positions;
  }

 private:
  static constexpr std::size_t kNone = std::numeric_limits<std::size_t>::max();
  struct State {
    double cost;  // both relative to the prefix, so that small differences keep their digits
    double value;
    std::uint32_t node;
  };
  struct Step {
    std::uint32_t parent;
    std::uint32_t position;
  };

  static constexpr std::size_t kNear = 32768;     // units on either side, for the best pair
  static constexpr std::int64_t kShort = 50'000;  // states of the first search
  static constexpr std::size_t kFirst = 32;       // changes of the first joined lists
  static constexpr std::size_t kSets = 1 << 18;   // of changes, in each of the joined lists

  // The changes that single units near the break would make, if they are still worth trying.
  std::vector<Change> changes_near(std::size_t reach) const {
    std::vector<Change> changes;
    const std::size_t last = std::min(units_.size(), end_ + std::min(reach, units_.size()));
    for (std::size_t i = end_ - std::min(end_, reach); i < last; ++i) {
      const double sign = i < end_ ? -1.0 : 1.0;
      if (open(i))
        changes.push_back({sign * units_.cost[i], sign * units_.value[i], reduced_cost(i), i});
    }
    return changes;
  }

  void take(const BestChanges& changes) {
    best_ = changes.gain;
    best_node_ = kRoot;
    for (const std::size_t position : changes.positions) best_node_ = record(best_node_, position);
  }

  // Tries the sets of those changes that lose least, then of half as many more, and so on: each
  // better choice lowers what a set may lose. False if there are too many.
  bool join() {
    std::vector<Change> changes = changes_near(units_.size());
    std::ranges::stable_sort(changes, {}, &Change::loss);
    for (std::size_t count = kFirst;; count += count / 2) {
      if (nodes_ > limits_.max_nodes || out_of_time()) return false;
      ticker_.tick(nodes_);
      const double whole = bound_ - best_ + tolerance_;
      const double reach = count < changes.size() ? std::min(whole, changes[count].loss) : whole;
      const BestChanges found = best_join(changes, room_, reach, best_, kSets);
      nodes_ += found.states;
      if (!found.positions.empty()) take(found);
      if (!found.exhausted) return false;
      const double gap = bound_ - best_;
      if (gap <= tolerance_ || reach >= gap + tolerance_) return true;
    }
  }

  bool search(std::int64_t most) {
    right_ = next_right(end_);
    left_ = next_left(end_);
    states_ = {{0.0, 0.0, kRoot}};
    bool right_turn = true;
    while (!states_.empty() && (right_ != kNone || left_ != kNone)) {
      if (nodes_ > most || out_of_time() || history_full()) return false;
      ticker_.tick(nodes_);
      const bool right = left_ == kNone || (right_turn && right_ != kNone);
      step(right);
      right_turn = !right;
    }
    return true;
  }

  // How much any choice that differs from the prefix in this unit loses against the bound.
  double reduced_cost(std::size_t i) const {
    return std::abs(units_.value[i] - lambda_ * units_.cost[i]);
  }
  bool open(std::size_t i) const { return reduced_cost(i) < bound_ - best_ + tolerance_; }

  std::size_t next_right(std::size_t from) const {
    while (from < units_.size() && !open(from)) ++from;
    return from < units_.size() ? from : kNone;
  }
  std::size_t next_left(std::size_t end) const {  // the last open position before `end`
    while (end > 0 && !open(end - 1)) --end;
    return end > 0 ? end - 1 : kNone;
  }

  bool out_of_time() const {
    if (limits_.seconds <= 0.0) return false;
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start_;
    return spent.count() > limits_.seconds;
  }

  bool history_full() const { return history_.size() + 2 * states_.size() >= kRoot; }

  // An upper bound on what the state can still become, given which units are left to change.
  bool promising(const State& state) const {
    const double room = room_ - state.cost;
    double bound = state.value;
    if (room >= 0.0) {
      if (right_ != kNone) bound += room * ratio_of(units_.value[right_], units_.cost[right_]);
    } else {
      if (left_ == kNone) return false;
      bound += room * ratio_of(units_.value[left_],
                               units_.cost[left_]);  // -inf when only free units are left to mask
    }
    return bound > best_ + tolerance_;
  }

  std::uint32_t record(std::uint32_t parent, std::size_t position) {
    history_.push_back({parent, static_cast<std::uint32_t>(position)});
    return static_cast<std::uint32_t>(history_.size() - 1);
  }

  // Lets one more unit enter (right) or leave (left) and merges the states with and without it.
  void step(bool right) {
    const std::size_t position = right ? right_ : left_;
    if (right) {
      right_ = next_right(position + 1);
    } else {
      left_ = next_left(position);
    }
    if (!open(position)) return;  // the best choice improved since
    const double sign = right ? 1.0 : -1.0;
    const double cost = sign * units_.cost[position];
    const double value = sign * units_.value[position];
    nodes_ += static_cast<std::int64_t>(2 * states_.size());
    for (const State& state : states_) {
      const double changed = state.value + value;
      if (state.cost + cost <= room_ && changed > best_) {
        best_ = changed;
        best_node_ = record(state.node, position);
      }
    }
    merge(position, cost, value);
  }

  // Both lists ascend in cost and value; so does the merged one, without dominated states.
  void merge(std::size_t position, double cost, double value) {
    merged_.clear();
    double highest = -std::numeric_limits<double>::infinity();
    auto old = states_.cbegin();
    auto moved = states_.cbegin();
    for (std::size_t turn = 1; old != states_.cend() || moved != states_.cend(); ++turn) {
      if (turn % 65536 == 0) ticker_.tick(nodes_);
      bool take_old = moved == states_.cend();
      if (!take_old && old != states_.cend()) {
        const double moved_cost = moved->cost + cost;
        take_old = old->cost < moved_cost ||
                   (old->cost == moved_cost && old->value >= moved->value + value);
      }
      State state = take_old ? *old++ : *moved++;
      if (!take_old) state = {state.cost + cost, state.value + value, state.node};
      if (state.value <= highest || !promising(state)) continue;
      highest = state.value;
      if (!take_old) state.node = record(state.node, position);
      merged_.push_back(state);
    }
    states_.swap(merged_);
  }

  const Ordered& units_;
  const std::size_t end_;
  const double room_;
  const double lambda_;
  const double tolerance_;
  const KnapsackLimits& limits_;
  Ticker ticker_;
  const std::chrono::steady_clock::time_point start_;
  double best_ = 0.0;
  double bound_ = 0.0;
  std::size_t right_ = kNone;  // the next position to try on either side
  std::size_t left_ = kNone;
  std::vector<State> states_;
  std::vector<State> merged_;
  std::vector<Step> history_;
  std::uint32_t best_node_ = kRoot;
  std::int64_t nodes_ = 0;
};

}  // namespace floe::masks
