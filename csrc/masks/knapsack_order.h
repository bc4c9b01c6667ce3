// The order in which the greedy choice takes units, found without sorting them all.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <ranges>
#include <span>
#include <vector>

#include "masks/units.h"

namespace floe::masks {

using Unit = std::uint32_t;

// Some units, best first, with their values and costs gathered in that order.
struct Ordered {
  std::vector<Unit> unit;
  std::vector<double> value;
  std::vector<double> cost;

  std::size_t size() const { return unit.size(); }
};

// Infinity if the cost is zero.
inline double ratio_of(double value, double cost) {
  return cost == 0.0 ? std::numeric_limits<double>::infinity() : value / cost;
}

// Units by value / cost, descending; of equal ratios free units first, then larger values, then
// lower indices. Units that cost more than the capacity on their own have no place in it.
class Order {
 public:
  Order(std::span<const double> value, std::span<const double> cost, double capacity);

  static constexpr std::uint32_t kTooDear = 0;

  std::size_t size() const { return key_.size(); }
  // 32 bits that ascend with the ratio (distinct ratios may agree in them), or kTooDear.
  std::uint32_t key(std::size_t unit) const { return key_[unit]; }
  bool fits(std::size_t unit) const { return key_[unit] != kTooDear; }
  bool before(std::size_t a, std::size_t b) const {
    return key_[a] != key_[b] ? key_[a] > key_[b] : before_exactly(a, b);
  }
  double value(std::size_t unit) const { return value_[unit]; }
  double cost(std::size_t unit) const { return cost_[unit]; }

  Ordered sorted(std::span<const Unit> units) const;

  // The first units that fit together, and the first that does not.
  struct Break {
    bool exists = false;  // false: all fit
    Unit unit = 0;
    Sum cost;                 // of the units before it
    std::vector<Unit> after;  // some of those that follow it, in order and without gaps
  };
  Break find_break() const;

 private:
  static constexpr std::size_t kFew = 8192;  // units that are as well sorted at once
  static constexpr std::size_t kKeyBits = 32;
  static constexpr std::size_t kBucketBits = 16;  // 11 of the ratio's exponent, 5 of its fraction

  // 64 bits that order as the ratio does, free units above all others.
  std::uint64_t ratio_key(std::size_t unit) const;
  bool before_exactly(std::size_t a, std::size_t b) const;
  std::vector<Unit> all_if_too_many() const;
  std::vector<Unit> break_bucket(Sum& before) const;
  void narrow(std::vector<Unit>& units, Sum& before) const;

  std::span<const double> value_;
  std::span<const double> cost_;
  const double capacity_;
  // The leading bits of ratio_key, plus one; kTooDear.
  std::vector<std::uint32_t> key_;
};

// Adds costs to `before` bucket by bucket, the last bucket first, while they fit the capacity.
// Returns the bucket that does not fit, or the number of buckets if all do.
inline std::size_t first_too_many(std::span<const Sum> buckets, double capacity, Sum& before) {
  for (std::size_t bucket = buckets.size(); bucket-- > 0;) {
    Sum sum = before;
    sum.add(buckets[bucket]);
    if (sum.total() > capacity) return bucket;
    before = sum;
  }
  return buckets.size();
}

inline std::uint64_t Order::ratio_key(std::size_t unit) const {
  if (cost_[unit] == 0.0) return key_of(std::numeric_limits<double>::infinity()) + 1;
  return key_of(value_[unit] / cost_[unit]);
}

inline Order::Order(std::span<const double> value, std::span<const double> cost, double capacity)
    : value_(value), cost_(cost), capacity_(capacity), key_(value.size()) {
  constexpr std::uint32_t kFree = std::numeric_limits<std::uint32_t>::max();
  for (std::size_t i = 0; i < key_.size(); ++i) {
    const auto key = static_cast<std::uint32_t>(key_of(value[i] / cost[i]) >> (63 - kKeyBits)) + 1;
    key_[i] = cost[i] == 0.0 ? kFree : cost[i] <= capacity ? key : kTooDear;
  }
}

inline bool Order::before_exactly(std::size_t a, std::size_t b) const {
  const std::uint64_t ratio_a = ratio_key(a);
  const std::uint64_t ratio_b = ratio_key(b);
  if (ratio_a != ratio_b) return ratio_a > ratio_b;
  return value_[a] != value_[b] ? value_[a] > value_[b] : a < b;
}

inline Ordered Order::sorted(std::span<const Unit> units) const {
  std::vector<std::uint64_t> items(units.size());
  for (std::size_t i = 0; i < items.size(); ++i)
    items[i] = static_cast<std::uint64_t>(~key_[units[i]]) << 32 | units[i];
  radix_sort(items, 32);
  Ordered ordered;
  ordered.unit.reserve(items.size());
  for (const std::uint64_t item : items) ordered.unit.push_back(static_cast<Unit>(item));
  const auto exactly = [this](Unit a, Unit b) { return before_exactly(a, b); };
  for (std::size_t first = 0; first < items.size();) {
    std::size_t last = first + 1;
    while (last < items.size() && items[last] >> 32 == items[first] >> 32) ++last;
    const auto group = std::span(ordered.unit).subspan(first, last - first);
    if (!std::ranges::is_sorted(group, exactly)) std::ranges::sort(group, exactly);
    first = last;
  }
  ordered.value.reserve(items.size());
  ordered.cost.reserve(items.size());
  for (const Unit unit : ordered.unit) {
    ordered.value.push_back(value_[unit]);
    ordered.cost.push_back(cost_[unit]);
  }
  return ordered;
}

// All that fit the capacity, if they do not fit together.
inline std::vector<Unit> Order::all_if_too_many() const {
  std::vector<Unit> units;
  Sum total;
  for (std::size_t i = 0; i < key_.size(); ++i) {
    if (!fits(i)) continue;
    units.push_back(static_cast<Unit>(i));
    total.add(cost_[i]);
  }
  if (total.total() <= capacity_) units.clear();
  return units;
}

// The units of the bucket in which the budget ends; `before` gets the cost of the buckets before.
inline std::vector<Unit> Order::break_bucket(Sum& before) const {
  constexpr std::size_t kShift = kKeyBits - kBucketBits;
  std::vector<Sum> buckets(std::size_t{1} << kBucketBits);
  for (std::size_t i = 0; i < key_.size(); ++i)
    if (fits(i)) buckets[key_[i] >> kShift].add(cost_[i]);
  const std::size_t bucket = first_too_many(buckets, capacity_, before);
  std::vector<Unit> units;
  for (std::size_t i = 0; i < key_.size(); ++i)
    if (key_[i] >> kShift == bucket && fits(i)) units.push_back(static_cast<Unit>(i));
  return units;
}

// Leaves of `units` only some among which the budget ends; they keep their order.
inline void Order::narrow(std::vector<Unit>& units, Sum& before) const {
  constexpr int kBits = 12;
  bool by_value = false;  // among equal ratios
  while (units.size() > kFew) {
    const auto key = [&](Unit unit) { return by_value ? key_of(value_[unit]) : ratio_key(unit); };
    const auto [least, most] = std::ranges::minmax(units | std::views::transform(key));
    if (least == most) {
      if (by_value) return;
      by_value = true;
      continue;
    }
    const int shift = std::max(0, static_cast<int>(std::bit_width(most - least)) - kBits);
    std::vector<Sum> buckets(std::size_t{1} << kBits);
    for (const Unit unit : units) buckets[(key(unit) - least) >> shift].add(cost_[unit]);
    // Bucket 0 is what is left: summed in another order, they must not all seem to fit.
    const auto others = std::span<const Sum>(buckets).subspan(1);
    const std::size_t found = first_too_many(others, capacity_, before);
    const std::size_t bucket = found == others.size() ? 0 : found + 1;
    std::erase_if(units, [&](Unit unit) { return (key(unit) - least) >> shift != bucket; });
  }
}

inline Order::Break Order::find_break() const {
  Break found;
  std::vector<Unit> units = size() <= kFew ? all_if_too_many() : break_bucket(found.cost);
  narrow(units, found.cost);
  units = sorted(units).unit;
  found.exists = !units.empty();
  if (!found.exists) return found;
  auto unit = units.begin();
  for (; unit + 1 != units.end(); ++unit) {
    if (found.cost.with(cost_[*unit]) > capacity_) break;
    found.cost.add(cost_[*unit]);
  }
  found.unit = *unit;
  found.after.assign(unit + 1, units.end());
  return found;
}

}  // namespace floe::masks
