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
    const Exchange exchange = best_exchange(best);
    // Just below it, so that the search finds the choice that it would have found anyway.
    best_ = std::max(best, exchange.gain - 2.0 * tolerance_);
    const bool exhausted = search();
    if (!improved() && exchange.gain > best) {
      best_node_ = record(kRoot, exchange.first);
      if (exchange.second != kNone) best_node_ = record(best_node_, exchange.second);
    }
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
  static constexpr std::size_t kNear = 32768;
  static constexpr std::uint32_t kRoot = std::numeric_limits<std::uint32_t>::max();
  struct State {
    double cost;  // both relative to the prefix, so that small differences keep their digits
    double value;
    std::uint32_t node;
  };
  struct Change {
    std::uint32_t parent;
    std::uint32_t position;
  };

  // One or two changes at once.
  struct Exchange {
    double gain;
    std::size_t first = kNone;
    std::size_t second = kNone;
  };
  struct Step {
    double cost;
    double value;
    std::size_t position;  // kNone: no change
  };

  // The changes of single units near the break, by cost.
  std::vector<Step> single_steps() const {
    const std::size_t first = end_ - std::min(end_, kNear);
    const std::size_t last = std::min(units_.size(), end_ + kNear);
    std::vector<Step> steps{{0.0, 0.0, kNone}};
    for (std::size_t i = first; i < last; ++i) {
      const double sign = i < end_ ? -1.0 : 1.0;
      steps.push_back({sign * units_.cost[i], sign * units_.value[i], i});
    }
    std::ranges::stable_sort(steps, {}, &Step::cost);
    return steps;
  }

  // The best pair of changes, if it is worth more than `least`: a lower bound that leaves the
  // search little to do. For every first change the best second one that fits is the most valuable
  // among the cheapest.
  Exchange best_exchange(double least) {
    const std::vector<Step> steps = single_steps();
    nodes_ += static_cast<std::int64_t>(steps.size());
    const auto more = [&](std::size_t a, std::size_t b) { return steps[a].value > steps[b].value; };
    std::vector<std::pair<std::uint32_t, std::uint32_t>> best_two(steps.size());  // of the cheapest
    for (std::uint32_t i = 1; i < steps.size(); ++i) {
      auto [one, two] = best_two[i - 1];
      if (more(i, one)) {
        two = std::exchange(one, i);
      } else if (one == two || more(i, two)) {
        two = i;
      }
      best_two[i] = {one, two};
    }
    Exchange best{least};
    std::size_t fitting = steps.size();
    for (std::size_t i = 0; i < steps.size(); ++i) {
      while (fitting > 0 && steps[i].cost + steps[fitting - 1].cost > room_) --fitting;
      if (fitting == 0) break;
      const auto [one, two] = best_two[fitting - 1];
      const std::size_t j = one == i ? two : one;
      if (i == j || !(steps[i].value + steps[j].value > best.gain)) continue;
      best = {steps[i].value + steps[j].value, steps[i].position, steps[j].position};
      if (best.first == kNone) std::swap(best.first, best.second);
    }
    return best;
  }

  bool search() {
    right_ = next_right(end_);
    left_ = next_left(end_);
    states_ = {{0.0, 0.0, kRoot}};
    bool right_turn = true;
    while (!states_.empty() && (right_ != kNone || left_ != kNone)) {
      if (nodes_ > limits_.max_nodes || out_of_time() || history_full()) return false;
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
  std::vector<Change> history_;
  std::uint32_t best_node_ = kRoot;
  std::int64_t nodes_ = 0;
};

}  // namespace floe::masks
