#include "masks/two_class.h"

#include <numeric>
#include <ranges>
#include <tuple>
#include <utility>

#include "masks/units.h"

namespace floe::masks {
namespace {

// floor(amount / cost), capped; `slack` is the part of the amount that is only float tolerance.
std::size_t affordable(double amount, double slack, double cost, std::size_t available) {
  if (cost == 0.0) return available;
  const double count = std::floor((amount + slack) / cost + 1e-9);
  if (count >= static_cast<double>(available)) return available;  // also for infinity
  return count > 0.0 ? static_cast<std::size_t>(count) : 0;
}

std::vector<double> sorted_values(std::span<const double> values) {
  std::vector<std::uint64_t> keys(values.size());
  std::ranges::transform(values, keys.begin(), key_of);
  radix_sort(keys, 0);
  std::vector<double> sorted(values.size());
  std::ranges::transform(keys, sorted.begin(),
                         [](std::uint64_t key) { return std::bit_cast<double>(key); });
  return sorted;
}

// Retains the `count` largest; of equal values those with the higher index, because units are
// masked in ascending (value, index). Needs no index in the sort.
void retain_largest(std::span<const double> values, const std::vector<double>& sorted,
                    std::size_t count, std::span<bool> mask) {
  std::ranges::fill(mask, false);
  if (count == 0) return;
  const double threshold = sorted[sorted.size() - count];
  const auto above = sorted.end() - std::ranges::upper_bound(sorted, threshold);
  std::size_t ties = count - static_cast<std::size_t>(above);
  for (std::size_t i = 0; i < values.size(); ++i) mask[i] = values[i] > threshold;
  for (std::size_t i = values.size(); ties > 0;) {
    --i;
    if (values[i] != threshold) continue;
    mask[i] = true;
    --ties;
  }
}

struct Counts {
  std::size_t heads = 0;
  std::size_t neurons = 0;
};

// The best number of heads and neurons to take from the front of the two lists. For a given number
// of heads the best use of the rest is as many neurons as it pays for, so trying every number of
// heads is exact. Runs from many heads to few: the neurons' sum then only grows. Sums are kept in
// extended precision: a million rounded additions would otherwise decide between close choices.
template <typename Range, typename Better>
Counts best_counts(const Range& heads, const Range& neurons, double head_cost, double neuron_cost,
                   double budget, Better better) {
  const double slack = budget * kTolerance;
  const std::size_t most = affordable(budget, slack, head_cost, heads.size());
  std::vector<double> head_sums(most + 1, 0.0);
  long double head_sum = 0.0L;
  for (std::size_t n = 0; n < most; ++n)
    head_sums[n + 1] = static_cast<double>(head_sum += heads[n]);
  Counts best;
  double best_sum = 0.0;
  std::size_t f = 0;
  long double neuron_sum = 0.0L;
  for (std::size_t n = most + 1; n-- > 0;) {
    const double left = budget - static_cast<double>(n) * head_cost;
    const std::size_t paid = affordable(left, slack, neuron_cost, neurons.size());
    for (; f < paid; ++f) neuron_sum += neurons[f];
    const double sum = head_sums[n] + static_cast<double>(neuron_sum);
    if (n < most && better(best_sum, sum)) continue;  // of equal sums the fewest heads
    best = {n, f};
    best_sum = sum;
  }
  return best;
}

// value / cost >= other_value / other_cost without dividing, so that a zero cost comes first. The
// extended exponent keeps tiny products from vanishing.
bool ranks_first(double value, double cost, double other_value, double other_cost) {
  using Wide = long double;
  return Wide{value} * Wide{other_cost} >= Wide{other_value} * Wide{cost};
}

// The linear-programming bound: take units by value per cost and a fraction of the first that does
// not fit. Sorted values make it a merge of two lists. Returns {bound, lambda}.
std::pair<double, double> dantzig_bound(const std::vector<double>& heads,
                                        const std::vector<double>& neurons, double head_cost,
                                        double neuron_cost, double budget) {
  const double capacity = capacity_of(budget);
  std::size_t h = head_cost <= capacity ? heads.size() : 0;  // units left, cheapest value first
  std::size_t f = neuron_cost <= capacity ? neurons.size() : 0;
  long double value = 0.0L;
  long double cost = 0.0L;
  while (h > 0 || f > 0) {
    const bool head =
        f == 0 || (h > 0 && ranks_first(heads[h - 1], head_cost, neurons[f - 1], neuron_cost));
    const double unit_value = head ? heads[h - 1] : neurons[f - 1];
    const double unit_cost = head ? head_cost : neuron_cost;
    if (cost + unit_cost > capacity) {
      const double lambda = unit_value / unit_cost;
      const auto left = std::max(0.0L, budget - cost);
      return {static_cast<double>(value + lambda * left), lambda};
    }
    value += unit_value;
    cost += unit_cost;
    --(head ? h : f);
  }
  return {static_cast<double>(value), 0.0};
}

void total_up(TwoClassSolution& solution, const std::vector<double>& heads,
              const std::vector<double>& neurons, std::size_t kept_heads, std::size_t kept_neurons,
              double head_cost, double neuron_cost) {
  const auto head_split = heads.end() - static_cast<std::ptrdiff_t>(kept_heads);
  const auto neuron_split = neurons.end() - static_cast<std::ptrdiff_t>(kept_neurons);
  const long double none = 0.0L;
  const long double kept = std::accumulate(head_split, heads.end(), none) +
                           std::accumulate(neuron_split, neurons.end(), none);
  const long double masked = std::accumulate(heads.begin(), head_split, none) +
                             std::accumulate(neurons.begin(), neuron_split, none);
  solution.heads = static_cast<std::int64_t>(kept_heads);
  solution.neurons = static_cast<std::int64_t>(kept_neurons);
  solution.value = static_cast<double>(kept);
  solution.masked_value = static_cast<double>(masked);
  solution.cost =
      static_cast<double>(kept_heads) * head_cost + static_cast<double>(kept_neurons) * neuron_cost;
  solution.masked_cost = static_cast<double>(heads.size() - kept_heads) * head_cost +
                         static_cast<double>(neurons.size() - kept_neurons) * neuron_cost;
}

void check(std::span<const double> head_value, std::span<const double> neuron_value,
           double head_cost, double neuron_cost, double budget) {
  check_units("head_value", head_value);
  check_units("neuron_value", neuron_value);
  check_unit("head_cost", head_cost);
  check_unit("neuron_cost", neuron_cost);
  check_budget(budget);
}

}  // namespace

TwoClassSolution solve_two_class(std::span<const double> head_value,
                                 std::span<const double> neuron_value, double head_cost,
                                 double neuron_cost, double budget, Reading reading,
                                 std::span<bool> head_mask, std::span<bool> neuron_mask) {
  check(head_value, neuron_value, head_cost, neuron_cost, budget);
  check_count(std::max(head_value.size(), neuron_value.size()));
  check_length("head_mask", head_mask.size(), "head_value", head_value.size());
  check_length("neuron_mask", neuron_mask.size(), "neuron_value", neuron_value.size());
  const std::vector<double> heads = sorted_values(head_value);
  const std::vector<double> neurons = sorted_values(neuron_value);
  TwoClassSolution solution;
  std::size_t kept_heads = 0;
  std::size_t kept_neurons = 0;
  if (reading == Reading::kRetain) {
    const Counts kept = best_counts(std::views::reverse(heads), std::views::reverse(neurons),
                                    head_cost, neuron_cost, budget, std::greater<>{});
    kept_heads = kept.heads;
    kept_neurons = kept.neurons;
    std::tie(solution.upper_bound, solution.lambda) =
        dantzig_bound(heads, neurons, head_cost, neuron_cost, budget);
  } else {
    const Counts masked =
        best_counts(heads, neurons, head_cost, neuron_cost, budget, std::less<>{});
    kept_heads = heads.size() - masked.heads;
    kept_neurons = neurons.size() - masked.neurons;
  }
  retain_largest(head_value, heads, kept_heads, head_mask);
  retain_largest(neuron_value, neurons, kept_neurons, neuron_mask);
  total_up(solution, heads, neurons, kept_heads, kept_neurons, head_cost, neuron_cost);
  if (reading == Reading::kLiteral) {
    // As printed, masking nothing fits every budget and loses nothing.
    solution.upper_bound = solution.value + solution.masked_value;
  }
  solution.upper_bound = std::max(solution.upper_bound, solution.value);
  return solution;
}

}  // namespace floe::masks
