#include "masks/two_class.h"

#include <ranges>
#include <tuple>
#include <utility>

#include "masks/units.h"

namespace floe::masks {
namespace {

// Values >= 0 in descending order, dealt into buckets by exponent and leading bits; a bucket is
// sorted when a rank in it is first asked for. O(n), and never worse than a radix sort.
class Ranked {
 public:
  explicit Ranked(std::span<const double> values) : items_(values.size()) {
    if (values.size() < kSmall) {
      std::ranges::transform(values, items_.begin(), item_of);
      std::ranges::sort(items_);
      return;
    }
    starts_.resize(kBuckets + 1);
    for (const double value : values) ++starts_[bucket_of(item_of(value)) + 1];
    for (std::size_t i = 1; i <= kBuckets; ++i) starts_[i] += starts_[i - 1];
    std::vector<std::uint32_t> next(starts_.begin(), starts_.end() - 1);
    for (const double value : values) {
      const std::uint64_t item = item_of(value);
      items_[next[bucket_of(item)]++] = item;
    }
    sorted_.resize(kBuckets);
  }

  std::size_t size() const { return items_.size(); }

  double at(std::size_t rank) {
    if (!starts_.empty()) sort(bucket_of(items_[rank]));
    return value_of(items_[rank]);
  }

  // Bounds on at(rank) that need no sorting.
  double at_least(std::size_t rank) const {
    return starts_.empty() ? value_of(items_[rank]) : value_of(items_[rank] | kInBucket);
  }
  double at_most(std::size_t rank) const {
    return starts_.empty() ? value_of(items_[rank]) : value_of(items_[rank] & ~kInBucket);
  }

 private:
  static constexpr std::size_t kSmall = 4096;
  static constexpr std::size_t kBits = 16;  // 11 of the exponent and 5 of the fraction
  static constexpr std::size_t kBuckets = std::size_t{1} << kBits;
  static constexpr std::size_t kShift = 63 - kBits;  // the sign is always the same
  static constexpr std::uint64_t kInBucket = (std::uint64_t{1} << kShift) - 1;

  // Ascends as the value descends.
  static std::uint64_t item_of(double value) { return ~key_of(value); }
  static double value_of(std::uint64_t item) { return std::bit_cast<double>(~item); }
  static std::size_t bucket_of(std::uint64_t item) { return (item >> kShift) & (kBuckets - 1); }

  void sort(std::size_t bucket) {
    if (sorted_[bucket]) return;
    sorted_[bucket] = true;
    radix_sort({items_.begin() + starts_[bucket], items_.begin() + starts_[bucket + 1]}, 0);
  }

  std::vector<std::uint64_t> items_;
  std::vector<std::uint32_t> starts_;  // empty: all items are sorted
  std::vector<bool> sorted_;
};

// floor(amount / cost), capped; `slack` is the part of the amount that is only float tolerance.
std::size_t affordable(double amount, double slack, double cost, std::size_t available) {
  if (cost == 0.0) return available;
  const double count = std::floor((amount + slack) / cost + 1e-9);
  if (count >= static_cast<double>(available)) return available;  // also for infinity
  return count > 0.0 ? static_cast<std::size_t>(count) : 0;
}

// What the budget pays for.
struct Prices {
  double head_cost;
  double neuron_cost;
  double budget;
  std::size_t heads;  // that there are
  std::size_t neurons;

  std::size_t most_heads() const {
    return affordable(budget, budget * kTolerance, head_cost, heads);
  }
  std::size_t neurons_beside(std::size_t count) const {
    if (std::isinf(budget)) return neurons;  // infinity less what overflows is no number
    const double left = budget - static_cast<double>(count) * head_cost;
    return affordable(left, budget * kTolerance, neuron_cost, neurons);
  }
  double cost(std::size_t head_count, std::size_t neuron_count) const {
    return static_cast<double>(head_count) * head_cost +
           static_cast<double>(neuron_count) * neuron_cost;
  }
};

struct Counts {
  std::size_t heads = 0;
  std::size_t neurons = 0;
};

// How many of each class to retain, and the least values among them.
struct Choice {
  Counts kept;
  double least_head = 0.0;
  double least_neuron = 0.0;
};

// value / cost >= other_value / other_cost without dividing, so that a zero cost comes first, and
// with the exponents apart, so that no product vanishes or overflows.
bool ranks_first(double value, double cost, double other_value, double other_cost) {
  std::array<int, 4> exponent{};
  const double left = std::frexp(value, &exponent[0]) * std::frexp(other_cost, &exponent[1]);
  const double right = std::frexp(other_value, &exponent[2]) * std::frexp(cost, &exponent[3]);
  if (left == 0.0 || right == 0.0) return left >= right;
  const int ahead = exponent[0] + exponent[1] - exponent[2] - exponent[3];
  return std::ldexp(left, std::clamp(ahead, -8, 8)) >= right;  // both are in [1/4, 1)
}

// The best number of heads and neurons to retain, and the linear-programming bound. For a given
// number of heads the best use of the rest is as many neurons as it pays for, so only the number of
// heads is searched: outwards from the linear program's own, until the heads that differ lose more
// than its bound leaves to gain. Gains are relative to the linear program's whole units.
class RetainSearch {
 public:
  RetainSearch(std::span<const double> head_value, std::span<const double> neuron_value,
               const Prices& prices)
      : heads_(head_value), neurons_(neuron_value), prices_(prices) {
    relax();
    const double slack = 2.0 * prices.budget * kTolerance +
                         2e-9 * (prices.head_cost + prices.neuron_cost);  // see affordable()
    if (lambda_ > 0.0) tolerance_ = lambda_ * slack;
  }

  Choice run() {
    Trial start{relaxed_, Sum()};
    consider(start, false);
    Trial more = start;
    for (double loss = 0.0; more.counts.heads < prices_.most_heads();) {
      loss += reduced_cost(more.counts.heads);
      if (loss > bound_ - best_gain_ + tolerance_) break;
      more.gain.add(heads_.at(more.counts.heads++));
      consider(more, false);
    }
    Trial fewer = start;
    for (double loss = 0.0; fewer.counts.heads > 0;) {
      loss += reduced_cost(fewer.counts.heads - 1);
      if (loss > bound_ - best_gain_ + tolerance_) break;
      fewer.gain.add(-heads_.at(--fewer.counts.heads));
      consider(fewer, true);  // of equal sums the fewest heads
    }
    Choice choice{best_};
    if (best_.heads > 0) choice.least_head = heads_.at(best_.heads - 1);
    if (best_.neurons > 0) choice.least_neuron = neurons_.at(best_.neurons - 1);
    return choice;
  }

  double lambda() const { return lambda_; }
  // The linear program's value beyond that of the best choice, valid after run().
  double gap() const { return std::max(0.0, bound_ - best_gain_); }

 private:
  struct Trial {
    Counts counts;
    Sum gain;
  };

  bool head_first(std::size_t head, std::size_t neuron) {
    const auto first = [this](double head_value, double neuron_value) {
      return ranks_first(head_value, prices_.head_cost, neuron_value, prices_.neuron_cost);
    };
    if (first(heads_.at_least(head), neurons_.at_most(neuron))) return true;
    if (!first(heads_.at_most(head), neurons_.at_least(neuron))) return false;
    return first(heads_.at(head), neurons_.at(neuron));
  }

  // The first number in [0, end) for which `holds`, or end. It must hold for all larger ones too.
  template <typename Predicate>
  static std::size_t first_that(std::size_t end, Predicate holds) {
    return *std::ranges::partition_point(std::views::iota(std::size_t{0}, end),
                                         [&](std::size_t i) { return !holds(i); });
  }

  // Takes units by value per cost up to the first that does not fit; of that one, a fraction.
  void relax() {
    const std::size_t most = prices_.most_heads();
    const std::size_t heads = most == 0 ? 0 : prices_.heads;  // dearer than the budget: not there
    const std::size_t h = first_that(most, [&](std::size_t head) {
      const std::size_t paid = prices_.neurons_beside(head + 1);
      return paid < prices_.neurons && !head_first(head, paid);
    });
    const std::size_t paid = prices_.neurons_beside(h);
    const bool neurons_left = paid < prices_.neurons && prices_.neurons_beside(0) > 0;
    relaxed_ = {h, paid};
    if (neurons_left && (h == heads || !head_first(h, paid))) {
      lambda_ = neurons_.at(paid) / prices_.neuron_cost;
    } else if (h < heads) {
      relaxed_.neurons =
          first_that(paid, [&](std::size_t neuron) { return head_first(h, neuron); });
      lambda_ = heads_.at(h) / prices_.head_cost;
    } else {
      return;  // everything fits
    }
    // A finite value over a denormal cost; any multiplier gives a valid bound.
    lambda_ = std::min(lambda_, std::numeric_limits<double>::max());
    const double room = prices_.budget - prices_.cost(relaxed_.heads, relaxed_.neurons);
    bound_ = lambda_ * std::max(0.0, room);
  }

  double reduced_cost(std::size_t head) {
    return std::abs(heads_.at(head) - lambda_ * prices_.head_cost);
  }

  // Completes the choice of heads with all the neurons that it leaves room for.
  void consider(Trial& trial, bool even_if_equal) {
    const std::size_t paid = prices_.neurons_beside(trial.counts.heads);
    while (trial.counts.neurons < paid) trial.gain.add(neurons_.at(trial.counts.neurons++));
    while (trial.counts.neurons > paid) trial.gain.add(-neurons_.at(--trial.counts.neurons));
    const double gain = trial.gain.total();
    if (found_ && !(gain > best_gain_ || (even_if_equal && gain == best_gain_))) return;
    found_ = true;
    best_ = trial.counts;
    best_gain_ = gain;
  }

  Ranked heads_;
  Ranked neurons_;
  const Prices& prices_;
  Counts relaxed_;
  double lambda_ = 0.0;
  double bound_ = 0.0;
  double tolerance_ = 0.0;
  bool found_ = false;
  Counts best_;
  double best_gain_ = 0.0;
};

std::vector<double> ascending(std::span<const double> values) {
  std::vector<std::uint64_t> keys(values.size());
  std::ranges::transform(values, keys.begin(), key_of);
  radix_sort(keys, 0);
  std::vector<double> sorted(values.size());
  std::ranges::transform(keys, sorted.begin(),
                         [](std::uint64_t key) { return std::bit_cast<double>(key); });
  return sorted;
}

// The numbers of heads and neurons that Algorithm 1 as printed masks: every number of heads in
// turn, from many to few, so that the neurons' sum only grows.
Counts least_loss(const std::vector<double>& heads, const std::vector<double>& neurons,
                  const Prices& prices) {
  const std::size_t most = prices.most_heads();
  std::vector<double> head_sums(most + 1, 0.0);
  Sum head_sum;
  for (std::size_t n = 0; n < most; ++n) {
    head_sum.add(heads[n]);
    head_sums[n + 1] = head_sum.total();
  }
  Counts best;
  double least = std::numeric_limits<double>::infinity();
  Sum neuron_sum;
  std::size_t f = 0;
  for (std::size_t n = most + 1; n-- > 0;) {
    const std::size_t paid = prices.neurons_beside(n);
    for (; f < paid; ++f) neuron_sum.add(neurons[f]);
    const double sum = head_sums[n] + neuron_sum.total();
    if (sum > least) continue;  // of equal sums the fewest heads
    best = {n, f};
    least = sum;
  }
  return best;
}

// Retains the `count` largest, the least of which is `least`; of equal values those with the higher
// index, because units are masked in ascending (value, index).
void retain_largest(std::span<const double> values, double least, std::size_t count,
                    std::span<bool> mask) {
  std::ranges::fill(mask, false);
  if (count == 0) return;
  std::size_t above = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    mask[i] = values[i] > least;
    above += mask[i] ? 1 : 0;
  }
  std::size_t ties = count - above;
  for (std::size_t i = values.size(); ties > 0;) {
    --i;
    if (values[i] != least) continue;
    mask[i] = true;
    --ties;
  }
}

void total_up(TwoClassSolution& solution, const Prices& prices, std::span<const double> head_value,
              std::span<const double> neuron_value, std::span<const bool> head_mask,
              std::span<const bool> neuron_mask, const Counts& kept) {
  std::array<Sum, 2> sums;
  for (std::size_t i = 0; i < head_value.size(); ++i) sums[head_mask[i] ? 1 : 0].add(head_value[i]);
  for (std::size_t i = 0; i < neuron_value.size(); ++i)
    sums[neuron_mask[i] ? 1 : 0].add(neuron_value[i]);
  solution.heads = static_cast<std::int64_t>(kept.heads);
  solution.neurons = static_cast<std::int64_t>(kept.neurons);
  solution.value = sums[1].total();
  solution.masked_value = sums[0].total();
  solution.cost = prices.cost(kept.heads, kept.neurons);
  solution.masked_cost = prices.cost(prices.heads - kept.heads, prices.neurons - kept.neurons);
}

void check(std::span<const double> head_value, std::span<const double> neuron_value,
           const Prices& prices, std::span<const bool> head_mask,
           std::span<const bool> neuron_mask) {
  check_units("head_value", head_value);
  check_units("neuron_value", neuron_value);
  check_unit("head_cost", prices.head_cost);
  check_unit("neuron_cost", prices.neuron_cost);
  check_budget(prices.budget);
  check_sum("head_value", head_value);
  check_sum("neuron_value", neuron_value);
  check_count(std::max(head_value.size(), neuron_value.size()));
  check_length("head_mask", head_mask.size(), "head_value", head_value.size());
  check_length("neuron_mask", neuron_mask.size(), "neuron_value", neuron_value.size());
}

Choice choose_masked(std::span<const double> head_value, std::span<const double> neuron_value,
                     const Prices& prices) {
  const std::vector<double> heads = ascending(head_value);
  const std::vector<double> neurons = ascending(neuron_value);
  const Counts masked = least_loss(heads, neurons, prices);
  Choice choice{{heads.size() - masked.heads, neurons.size() - masked.neurons}};
  if (choice.kept.heads > 0) choice.least_head = heads[masked.heads];
  if (choice.kept.neurons > 0) choice.least_neuron = neurons[masked.neurons];
  return choice;
}

// Of the values of the classes that the budget pays for.
double largest_that_fits(std::span<const double> head_value, std::span<const double> neuron_value,
                         const Prices& prices) {
  double largest = 0.0;
  if (prices.most_heads() > 0) largest = std::ranges::max(head_value);
  if (prices.neurons_beside(0) > 0) largest = std::max(largest, std::ranges::max(neuron_value));
  return largest;
}

}  // namespace

TwoClassSolution solve_two_class(std::span<const double> head_value,
                                 std::span<const double> neuron_value, double head_cost,
                                 double neuron_cost, double budget, Reading reading,
                                 const Poll& poll, std::span<bool> head_mask,
                                 std::span<bool> neuron_mask) {
  const Prices asked{head_cost, neuron_cost, budget, head_value.size(), neuron_value.size()};
  check(head_value, neuron_value, asked, head_mask, neuron_mask);
  const int cost_exponent = far_exponent(budget);
  const Prices prices{scaled(head_cost, cost_exponent), scaled(neuron_cost, cost_exponent),
                      scaled(budget, cost_exponent), head_value.size(), neuron_value.size()};
  const bool literal = reading == Reading::kLiteral;
  const int value_exponent =
      literal ? 0 : far_exponent(largest_that_fits(head_value, neuron_value, prices));
  const Scaled heads(head_value, value_exponent);
  const Scaled neurons(neuron_value, value_exponent);
  Ticker ticker(poll);
  TwoClassSolution solution;
  Choice choice;
  double gap = 0.0;
  if (!literal) {
    RetainSearch search(heads.numbers(), neurons.numbers(), prices);
    ticker.tick();
    choice = search.run();
    gap = std::ldexp(search.gap(), value_exponent);
    solution.lambda = scaled(search.lambda(), cost_exponent - value_exponent);
  } else {
    choice = choose_masked(heads.numbers(), neurons.numbers(), prices);
  }
  ticker.tick();
  retain_largest(heads.numbers(), choice.least_head, choice.kept.heads, head_mask);
  retain_largest(neurons.numbers(), choice.least_neuron, choice.kept.neurons, neuron_mask);
  total_up(solution, asked, head_value, neuron_value, head_mask, neuron_mask, choice.kept);
  // As printed, masking nothing fits every budget and loses nothing.
  if (literal) gap = solution.masked_value;
  solution.upper_bound = solution.value + gap;
  return solution;
}

}  // namespace floe::masks
