// The exact search among the units near the break of a greedy choice.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "masks/knapsack.h"
#include "masks/knapsack_changes.h"
#include "masks/knapsack_order.h"
#include "masks/units.h"

namespace floe::masks {

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
  static constexpr std::uint32_t kRoot = std::numeric_limits<std::uint32_t>::max();
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
