#include "masks/knapsack.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "masks/knapsack_core.h"
#include "masks/knapsack_order.h"
#include "masks/units.h"

namespace floe::masks {
namespace {

double left_of(double amount, const Sum& spent) {
  Sum left(amount);
  left.subtract(spent);
  return left.total();
}

// Retains what still fits behind the break, in order.
class Filler {
 public:
  Filler(const Order& order, double capacity, const Sum& spent, std::span<bool> mask)
      : order_(order), capacity_(capacity), spent_(spent), mask_(mask) {}

  void fill(const Order::Break& end) {
    fill(end.after);
    const Unit last = end.after.empty() ? end.unit : end.after.back();
    // Strip by strip, each 256 times as wide as the last: after the first ones there is so little
    // room that hardly a unit is left to sort.
    std::uint64_t high = order_.key(last);
    for (std::uint64_t width = kFirstStrip; high > Order::kTooDear; width *= 256) {
      const std::uint64_t low = high > width ? high - width : Order::kTooDear;  // not in the strip
      const double most = room();
      std::vector<Unit> strip;
      for (std::size_t i = 0; i < order_.size(); ++i) {
        const std::uint32_t key = order_.key(i);
        // One branch that is hardly ever taken instead of three that no predictor can guess.
        const bool inside = (key > low) & (key <= high) & (order_.cost(i) <= most);
        if (inside && order_.before(last, i)) strip.push_back(static_cast<Unit>(i));
      }
      fill(order_.sorted(strip).unit);
      high = low;
    }
  }

  double value() const { return value_.total(); }
  const std::vector<Unit>& filled() const { return filled_; }

 private:
  static constexpr std::uint64_t kFirstStrip = 1 << 16;

  // A bound on the cost of what may still fit; whether it does, fill() decides.
  double room() const { return left_of(capacity_, spent_) + capacity_ * kTolerance; }

  void fill(const std::vector<Unit>& units) {
    for (const Unit unit : units) {
      if (spent_.with(order_.cost(unit)) > capacity_) continue;  // a later, cheaper unit may fit
      spent_.add(order_.cost(unit));
      value_.add(order_.value(unit));
      mask_[unit] = true;
      filled_.push_back(unit);
    }
  }

  const Order& order_;
  const double capacity_;
  Sum spent_;
  Sum value_;
  std::span<bool> mask_;
  std::vector<Unit> filled_;
};

void check(std::span<const double> value, std::span<const double> cost, double budget,
           std::span<const bool> mask) {
  check_length("cost", cost.size(), "value", value.size());
  check_length("mask", mask.size(), "value", value.size());
  check_count(value.size());
  check_units("value", value);
  check_units("cost", cost);
  check_budget(budget);
  check_sum("value", value);
}

double largest_that_fits(std::span<const double> value, std::span<const double> cost,
                         double capacity) {
  double largest = 0.0;
  for (std::size_t i = 0; i < value.size(); ++i)
    if (cost[i] <= capacity) largest = std::max(largest, value[i]);
  return largest;
}

// The greedy choice, what it leaves to gain, and the search for it.
struct Greedy {
  const Order& order;
  const Order::Break& end;
  double capacity;
  double lambda;
  double extra;      // value behind the break
  double bound;      // no choice is worth more than the units before the break and this
  double tolerance;  // a bound met this closely is met
};

// The units that any better choice may treat differently: changing another loses more than the
// bound leaves.
std::vector<Unit> open_units(const Greedy& greedy) {
  const double reach = greedy.bound - greedy.extra + greedy.tolerance;
  std::vector<Unit> units;
  for (std::size_t i = 0; i < greedy.order.size(); ++i) {
    const double reduced = greedy.order.value(i) - greedy.lambda * greedy.order.cost(i);
    if (std::abs(reduced) < reach && greedy.order.fits(i)) units.push_back(static_cast<Unit>(i));
  }
  return units;
}

// Replaces the greedy choice in `mask` by the best one, if the search finds a better one.
bool improve(const Greedy& greedy, const std::vector<Unit>& filled, const KnapsackLimits& limits,
             std::span<bool> mask, KnapsackSolution& solution) {
  const Ordered units = greedy.order.sorted(open_units(greedy));
  const auto end = static_cast<std::size_t>(
      std::ranges::partition_point(
          units.unit, [&](Unit unit) { return greedy.order.before(unit, greedy.end.unit); }) -
      units.unit.begin());
  CoreSearch search(units, end, left_of(greedy.capacity, greedy.end.cost), greedy.lambda,
                    greedy.tolerance, limits);
  solution.optimal = search.run(greedy.extra, greedy.bound);
  solution.nodes = search.nodes();
  if (!search.improved()) return false;
  for (const Unit unit : filled) mask[unit] = false;
  for (const std::size_t i : search.changes()) mask[units.unit[i]] = i >= end;
  return true;
}

// For a budget and values around 1, see far_exponent(); or a budget of 0 or infinity.
KnapsackSolution solve(std::span<const double> value, std::span<const double> cost, double budget,
                       const KnapsackLimits& limits, std::span<bool> mask) {
  Ticker ticker(limits.poll);
  const double capacity = capacity_of(budget);
  const Order order(value, cost, capacity);
  ticker.tick();
  const Order::Break end = order.find_break();
  for (std::size_t i = 0; i < mask.size(); ++i)
    mask[i] = order.fits(i) && (!end.exists || order.before(i, end.unit));
  KnapsackSolution solution;
  if (!end.exists) {  // everything that can be retained is
    totals_of(value, cost, mask).write_to(solution);
    solution.upper_bound = solution.value;
    solution.optimal = true;
    return solution;
  }
  ticker.tick();
  Filler filler(order, capacity, end.cost, mask);
  filler.fill(end);
  totals_of(value, cost, mask).write_to(solution);
  // The ratio of a finite value to a denormal cost is infinite; any multiplier gives a valid bound.
  solution.lambda =
      std::min(ratio_of(value[end.unit], cost[end.unit]), std::numeric_limits<double>::max());
  const double room = std::max(0.0, left_of(budget, end.cost));
  const double bound = std::max(filler.value(), std::min(value[end.unit], room * solution.lambda));
  const double gap = bound - filler.value();
  solution.upper_bound = solution.value + gap;
  const double tolerance = kTolerance * solution.upper_bound;
  solution.optimal = gap <= tolerance;
  if (solution.optimal || limits.max_nodes == 0) return solution;
  ticker.tick();
  const Greedy greedy{order, end, capacity, solution.lambda, filler.value(), bound, tolerance};
  if (improve(greedy, filler.filled(), limits, mask, solution))
    totals_of(value, cost, mask).write_to(solution);
  solution.upper_bound = std::max(solution.upper_bound, solution.value);
  return solution;
}

}  // namespace

KnapsackSolution solve_knapsack(std::span<const double> value, std::span<const double> cost,
                                double budget, const KnapsackLimits& limits, std::span<bool> mask) {
  check(value, cost, budget, mask);
  const int cost_exponent = far_exponent(budget);
  const Scaled costs(cost, cost_exponent);
  const double limit = scaled(budget, cost_exponent);
  const int value_exponent =
      far_exponent(largest_that_fits(value, costs.numbers(), capacity_of(limit)));
  const Scaled values(value, value_exponent);
  KnapsackSolution solution = solve(values.numbers(), costs.numbers(), limit, limits, mask);
  if (value_exponent == 0 && cost_exponent == 0) return solution;
  const double gap = std::ldexp(solution.upper_bound - solution.value, value_exponent);
  totals_of(value, cost, mask).write_to(solution);
  solution.upper_bound = solution.value + gap;
  solution.lambda = scaled(solution.lambda, cost_exponent - value_exponent);
  return solution;
}

}  // namespace floe::masks
