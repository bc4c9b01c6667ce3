// What the mask solvers share: checks of their inputs, the budget's tolerance, and a stable
// radix sort of non-negative doubles. A unit is a head or a neuron; value is its Fisher score (what
// is lost when it is masked), cost its Taylor score (what retaining it takes from the budget).
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cfloat>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace floe::masks {

inline std::string to_text(double number) {
  std::array<char, 32> text;
  const auto end = std::to_chars(text.data(), text.data() + text.size(), number).ptr;
  return {text.data(), end};
}

// Throws std::invalid_argument naming the first unit that is negative, infinite or NaN.
inline void check_units(std::string_view name, std::span<const double> numbers) {
  constexpr double kMax = std::numeric_limits<double>::max();
  bool good = true;  // one branch-free pass, so the common case runs at memory speed
  for (const double number : numbers) good &= (number >= 0.0) & (number <= kMax);
  if (good) return;
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    if (numbers[i] >= 0.0 && numbers[i] <= kMax) continue;
    throw std::invalid_argument(std::string(name) + "[" + std::to_string(i) +
                                "] must be a finite number >= 0, got " + to_text(numbers[i]));
  }
}

inline void check_unit(std::string_view name, double number) {
  if (number >= 0.0 && std::isfinite(number)) return;
  throw std::invalid_argument(std::string(name) + " must be a finite number >= 0, got " +
                              to_text(number));
}

inline void check_budget(double budget) {
  if (budget >= 0.0) return;  // infinity is allowed: no limit
  throw std::invalid_argument("budget must be a number >= 0, got " + to_text(budget));
}

inline void check_length(std::string_view name, std::size_t length, std::string_view other,
                         std::size_t expected) {
  if (length == expected) return;
  throw std::invalid_argument(std::string(name) + " must be as long as " + std::string(other) +
                              " (" + std::to_string(expected) + "), got " + std::to_string(length));
}

// Throws unless the numbers' sizes sum to a number, with room for their differences.
inline void check_sum(std::string_view name, std::span<const double> numbers) {
  double sum = 0.0;
  for (const double number : numbers) sum += std::abs(number);
  if (sum <= std::numeric_limits<double>::max() / 8) return;
  throw std::invalid_argument(std::string(name) + " must sum to less than 2**1021 in size, got " +
                              to_text(sum));
}

// Ratios, products and tolerances of numbers around 1 neither overflow nor vanish. The power of two
// that brings `largest` >= 0 there; 0 if it is near enough.
inline int far_exponent(double largest) {
  if (largest == 0.0 || std::isinf(largest)) return 0;
  const int exponent = std::ilogb(largest);
  return std::abs(exponent) > 300 ? exponent : 0;
}

// number / 2^exponent, but finite if the number is.
inline double scaled(double number, int exponent) {
  constexpr double kMax = std::numeric_limits<double>::max();
  return exponent == 0 ? number : std::clamp(std::ldexp(number, -exponent), -kMax, kMax);
}

// All numbers scaled: what solvers compare, while totals are of the numbers that came. Rounds only
// what is 2^-1000 of the largest. No copy if the exponent is 0.
class Scaled {
 public:
  Scaled(std::span<const double> numbers, int exponent) : numbers_(numbers) {
    if (exponent == 0) return;
    for (const double number : numbers) copy_.push_back(scaled(number, exponent));
    numbers_ = copy_;
  }
  Scaled(const Scaled&) = delete;
  Scaled& operator=(const Scaled&) = delete;

  std::span<const double> numbers() const { return numbers_; }

 private:
  std::vector<double> copy_;
  std::span<const double> numbers_;
};

// The budget with its float tolerance: 0.1 + 0.1 + 0.1 has to fit into 0.3.
inline constexpr double kTolerance = 1e-12;
inline double capacity_of(double budget) { return budget * (1.0 + kTolerance); }

// Sums keep what rounding loses.
static_assert(FLT_EVAL_METHOD == 0, "double arithmetic must round to double after every operation");

// Sums of several series, each with a second double that collects the rounding errors (Knuth's
// TwoSum): about 100 bits, and the same bits on every machine, which long double does not give.
template <std::size_t kLanes>
class Sums {
 public:
  void add(const std::array<double, kLanes>& terms) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      const double sum = high_[lane] + terms[lane];
      const double added = sum - high_[lane];
      low_[lane] += (high_[lane] - (sum - added)) + (terms[lane] - added);
      high_[lane] = sum;
    }
  }

  // Rounded to double; infinity if the sum overflowed.
  double total(std::size_t lane) const {
    return std::isfinite(high_[lane]) ? high_[lane] + low_[lane] : high_[lane];
  }

  double high(std::size_t lane) const { return high_[lane]; }
  double low(std::size_t lane) const { return low_[lane]; }

 private:
  std::array<double, kLanes> high_{};
  std::array<double, kLanes> low_{};
};

class Sum {
 public:
  Sum() = default;
  explicit Sum(double first) { add(first); }

  void add(double term) { sums_.add({term}); }
  void add(const Sum& other) {
    add(other.sums_.high(0));
    add(other.sums_.low(0));
  }
  void subtract(const Sum& other) {
    add(-other.sums_.high(0));
    add(-other.sums_.low(0));
  }
  double total() const { return sums_.total(0); }
  double with(double term) const {  // the total after one more term
    Sum sum = *this;
    sum.add(term);
    return sum.total();
  }

 private:
  Sums<1> sums_;
};

struct Totals {
  double value = 0.0;  // of the retained units
  double cost = 0.0;
  double masked_value = 0.0;
  double masked_cost = 0.0;

  // Into the four fields of the same names that every solution has.
  template <typename Solution>
  void write_to(Solution& solution) const {
    solution.value = value;
    solution.cost = cost;
    solution.masked_value = masked_value;
    solution.masked_cost = masked_cost;
  }
};

// Indexes two sums by the mask rather than branch on it: no predictor can guess it.
inline Totals totals_of(std::span<const double> value, std::span<const double> cost,
                        std::span<const bool> mask) {
  std::array<Sums<2>, 2> sums;
  for (std::size_t i = 0; i < value.size(); ++i) sums[mask[i] ? 1 : 0].add({value[i], cost[i]});
  return {sums[1].total(0), sums[1].total(1), sums[0].total(0), sums[0].total(1)};
}

// Told how much is done (search states, moves, layers); may throw to end the solver.
using Poll = std::function<void(std::int64_t done)>;

// Calls `poll` about every 100 ms.
class Ticker {
 public:
  explicit Ticker(Poll poll) : poll_(std::move(poll)), last_(Clock::now()) {}

  void tick(std::int64_t done = 0) {
    if (!poll_) return;
    const auto now = Clock::now();
    if (now - last_ < std::chrono::milliseconds(100)) return;
    last_ = now;
    poll_(done);
  }

 private:
  using Clock = std::chrono::steady_clock;
  Poll poll_;
  Clock::time_point last_;
};

// A key that orders as the number does. Only for numbers >= 0; -0.0 counts as 0.0.
inline std::uint64_t key_of(double number) { return std::bit_cast<std::uint64_t>(number + 0.0); }

// Units are counted in 32 bits where memory traffic decides.
inline void check_count(std::size_t count) {
  if (count < std::numeric_limits<std::uint32_t>::max()) return;
  throw std::invalid_argument("at most 2**32 - 2 units are supported, got " +
                              std::to_string(count));
}

// Sorts ascending by the bits from `first_bit` up; items that agree there keep their order. Least
// significant digit first; a digit on which all items agree is skipped. 9 bits a digit: 512 write
// streams still fit the first-level cache and TLB. O(n).
inline void radix_sort(std::span<std::uint64_t> items, std::size_t first_bit) {
  constexpr std::size_t kBits = 9;
  constexpr std::size_t kBuckets = std::size_t{1} << kBits;
  constexpr std::size_t kSmall = 4096;  // below this the histograms cost more than comparing
  if (items.size() < kSmall) {
    std::ranges::stable_sort(items, {}, [=](std::uint64_t item) { return item >> first_bit; });
    return;
  }
  const std::size_t digits = (64 - first_bit + kBits - 1) / kBits;
  std::vector<std::array<std::uint32_t, kBuckets>> counts(digits);
  for (const std::uint64_t item : items)
    for (std::size_t digit = 0; digit < digits; ++digit)
      ++counts[digit][(item >> (first_bit + kBits * digit)) & (kBuckets - 1)];
  std::vector<std::uint64_t> scratch(items.size());
  std::span<std::uint64_t> from = items;
  std::span<std::uint64_t> to = scratch;
  for (std::size_t digit = 0; digit < digits; ++digit) {
    auto& count = counts[digit];
    const std::size_t shift = first_bit + kBits * digit;
    if (count[(from.front() >> shift) & (kBuckets - 1)] == from.size()) continue;
    std::uint32_t start = 0;
    for (std::uint32_t& slot : count) slot = std::exchange(start, start + slot);
    for (const std::uint64_t item : from) to[count[(item >> shift) & (kBuckets - 1)]++] = item;
    std::swap(from, to);
  }
  if (from.data() != items.data()) std::ranges::copy(from, items.begin());
}

}  // namespace floe::masks
