#include "masks/knapsack.h"

#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "masks/units.h"

namespace floe::masks {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

double ratio_of(double value, double cost) { return cost == 0.0 ? kInfinity : value / cost; }

// Units by descending value / cost, with values and costs gathered in that order.
struct Ordered {
  std::vector<std::uint32_t> unit;
  std::vector<double> value;
  std::vector<double> cost;

  std::size_t size() const { return unit.size(); }
  double ratio(std::size_t i) const { return ratio_of(value[i], cost[i]); }
};

// The units that fit the capacity on their own, each as 32 bits that order as its ratio does
// (ascending = best first, distinct ratios may agree) above 32 bits of its index.
std::vector<std::uint64_t> packed_units(std::span<const double> value, std::span<const double> cost,
                                        double capacity) {
  std::vector<std::uint64_t> items(value.size());
  std::uint64_t least = std::numeric_limits<std::uint64_t>::max();
  std::uint64_t most = 0;
  for (std::size_t i = 0; i < items.size(); ++i) {
    items[i] = ~key_of(ratio_of(value[i], cost[i]));
    least = std::min(least, items[i]);
    most = std::max(most, items[i]);
  }
  const int width = items.empty() ? 0 : static_cast<int>(std::bit_width(most - least));
  const int shift = std::max(0, width - 32);
  std::size_t fitting = 0;
  for (std::size_t i = 0; i < items.size(); ++i) {
    const std::uint64_t item = ((items[i] - least) >> shift) << 32 | i;
    items[fitting] = item;
    fitting += cost[i] <= capacity ? 1 : 0;
  }
  items.resize(fitting);
  return items;
}

Ordered order_units(std::span<const double> value, std::span<const double> cost, double capacity) {
  std::vector<std::uint64_t> items = packed_units(value, cost, capacity);
  radix_sort(items, 32);
  Ordered ordered;
  ordered.unit.reserve(items.size());
  for (const std::uint64_t item : items) ordered.unit.push_back(static_cast<std::uint32_t>(item));
  const auto before = [&](std::uint32_t a, std::uint32_t b) {
    const double ratio_a = ratio_of(value[a], cost[a]);
    const double ratio_b = ratio_of(value[b], cost[b]);
    if (ratio_a != ratio_b) return ratio_a > ratio_b;
    if ((cost[a] == 0.0) != (cost[b] == 0.0)) return cost[a] == 0.0;
    return value[a] != value[b] ? value[a] > value[b] : a < b;
  };
  for (std::size_t first = 0; first < items.size();) {
    std::size_t last = first + 1;
    while (last < items.size() && items[last] >> 32 == items[first] >> 32) ++last;
    if (last - first > 1)
      std::sort(ordered.unit.begin() + static_cast<std::ptrdiff_t>(first),
                ordered.unit.begin() + static_cast<std::ptrdiff_t>(last), before);
    first = last;
  }
  ordered.value.reserve(items.size());
  ordered.cost.reserve(items.size());
  for (const std::uint32_t unit : ordered.unit) {
    ordered.value.push_back(value[unit]);
    ordered.cost.push_back(cost[unit]);
  }
  return ordered;
}

// The first units that fit together, up to the first that does not (`end`, the break unit).
struct Prefix {
  std::size_t end = 0;
  long double value = 0.0L;
  long double cost = 0.0L;
};

Prefix longest_prefix(const Ordered& units, double capacity) {
  Prefix prefix;
  for (; prefix.end < units.size(); ++prefix.end) {
    if (prefix.cost + units.cost[prefix.end] > capacity) break;
    prefix.cost += units.cost[prefix.end];
    prefix.value += units.value[prefix.end];
  }
  return prefix;
}

// Searches for something better than the greedy choice by changing it near the break unit: units
// behind the break may enter, units before it may leave, in turn and nearest first (Pisinger's
// expanding core). A state is a set of such changes; a state that costs no less and is worth no
// more than another, or whose linear bound does not beat the best choice known, is dropped.
class CoreSearch {
 public:
  CoreSearch(const Ordered& units, const Prefix& prefix, double capacity, double lambda,
             double tolerance, const KnapsackLimits& limits)
      : units_(units),
        prefix_(prefix),
        room_(static_cast<double>(capacity - prefix.cost)),
        lambda_(lambda),
        tolerance_(tolerance),
        limits_(limits),
        ticker_(limits.poll),
        start_(std::chrono::steady_clock::now()) {}

  // `best`: the greedy choice's value beyond the prefix; `bound`: the upper bound beyond it.
  // Returns true if the search was exhausted.
  bool run(double best, double bound) {
    best_ = best;
    bound_ = bound;
    right_ = next_right(prefix_.end);
    left_ = next_left(prefix_.end);
    states_ = {{0.0, 0.0, kRoot}};
    bool right_turn = true;
    while (!states_.empty() && (right_ != kNone || left_ != kNone)) {
      if (nodes_ > limits_.max_nodes || out_of_time() || history_full()) return false;
      ticker_.tick();
      const bool right = left_ == kNone || (right_turn && right_ != kNone);
      step(right);
      right_turn = !right;
    }
    return true;
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
  struct Change {
    std::uint32_t parent;
    std::uint32_t position;
  };

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
      if (right_ != kNone) bound += room * units_.ratio(right_);
    } else {
      if (left_ == kNone) return false;
      bound += room * units_.ratio(left_);  // -inf when only free units are left to mask
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
    double highest = -kInfinity;
    auto old = states_.cbegin();
    auto moved = states_.cbegin();
    while (old != states_.cend() || moved != states_.cend()) {
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
  const Prefix& prefix_;
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

// Retains the prefix and whatever else still fits, in order; returns the value beyond the prefix.
double fill_greedily(const Ordered& units, const Prefix& prefix, double capacity,
                     std::span<bool> mask) {
  long double cost = prefix.cost;
  long double extra = 0.0L;
  for (std::size_t i = 0; i < units.size(); ++i) {
    if (i >= prefix.end) {
      if (cost + units.cost[i] > capacity) continue;  // a later, cheaper unit may still fit
      cost += units.cost[i];
      extra += units.value[i];
    }
    mask[units.unit[i]] = true;
  }
  return static_cast<double>(extra);
}

}  // namespace

KnapsackSolution solve_knapsack(std::span<const double> value, std::span<const double> cost,
                                double budget, const KnapsackLimits& limits, std::span<bool> mask) {
  check_length("cost", cost.size(), "value", value.size());
  check_length("mask", mask.size(), "value", value.size());
  check_count(value.size());
  check_units("value", value);
  check_units("cost", cost);
  check_budget(budget);
  const double capacity = capacity_of(budget);
  const Ordered units = order_units(value, cost, capacity);
  const Prefix prefix = longest_prefix(units, capacity);
  std::ranges::fill(mask, false);
  const double extra = fill_greedily(units, prefix, capacity, mask);
  KnapsackSolution solution;
  if (prefix.end == units.size()) {  // everything that can be retained is
    totals_of(value, cost, mask).write_to(solution);
    solution.upper_bound = solution.value;
    solution.optimal = true;
    return solution;
  }
  // The ratio of a finite value to a denormal cost is infinite; any multiplier gives a valid bound.
  solution.lambda = std::min(units.ratio(prefix.end), std::numeric_limits<double>::max());
  const auto room = static_cast<double>(std::max(0.0L, budget - prefix.cost));
  const double rest = std::accumulate(units.value.begin() + static_cast<std::ptrdiff_t>(prefix.end),
                                      units.value.end(), 0.0);
  const double bound =
      std::max(extra, std::min(rest, room * solution.lambda));  // beyond the prefix
  const double tolerance = kTolerance * static_cast<double>(prefix.value + bound);
  solution.optimal = bound - extra <= tolerance;
  if (!solution.optimal && limits.max_nodes > 0) {
    CoreSearch search(units, prefix, capacity, solution.lambda, tolerance, limits);
    solution.optimal = search.run(extra, bound);
    solution.nodes = search.nodes();
    if (search.improved()) {
      for (std::size_t i = 0; i < units.size(); ++i) mask[units.unit[i]] = i < prefix.end;
      for (const std::size_t i : search.changes()) mask[units.unit[i]] = i >= prefix.end;
    }
  }
  totals_of(value, cost, mask).write_to(solution);
  solution.upper_bound = std::max(static_cast<double>(prefix.value + bound), solution.value);
  return solution;
}

}  // namespace floe::masks
