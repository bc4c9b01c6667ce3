#include "masks/knapsack_order.h"

#include <algorithm>
#include <limits>
#include <ranges>

namespace floe::masks {
namespace {

// Adds costs to `before` bucket by bucket, the last bucket first, while they fit the capacity.
// Returns the bucket that does not fit, or the number of buckets if all do.
std::size_t first_too_many(std::span<const Sum> buckets, double capacity, Sum& before) {
  for (std::size_t bucket = buckets.size(); bucket-- > 0;) {
    Sum sum = before;
    sum.add(buckets[bucket]);
    if (sum.total() > capacity) return bucket;
    before = sum;
  }
  return buckets.size();
}

}  // namespace

double ratio_of(double value, double cost) {
  return cost == 0.0 ? std::numeric_limits<double>::infinity() : value / cost;
}

std::uint64_t Order::ratio_key(std::size_t unit) const {
  if (cost_[unit] == 0.0) return key_of(std::numeric_limits<double>::infinity()) + 1;
  return key_of(value_[unit] / cost_[unit]);
}

Order::Order(std::span<const double> value, std::span<const double> cost, double capacity)
    : value_(value), cost_(cost), capacity_(capacity), key_(value.size()) {
  constexpr std::uint32_t kFree = std::numeric_limits<std::uint32_t>::max();
  for (std::size_t i = 0; i < key_.size(); ++i) {
    const auto key = static_cast<std::uint32_t>(key_of(value[i] / cost[i]) >> (63 - kKeyBits)) + 1;
    key_[i] = cost[i] == 0.0 ? kFree : cost[i] <= capacity ? key : kTooDear;
  }
}

bool Order::before_exactly(std::size_t a, std::size_t b) const {
  const std::uint64_t ratio_a = ratio_key(a);
  const std::uint64_t ratio_b = ratio_key(b);
  if (ratio_a != ratio_b) return ratio_a > ratio_b;
  return value_[a] != value_[b] ? value_[a] > value_[b] : a < b;
}

Ordered Order::sorted(std::span<const Unit> units) const {
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
std::vector<Unit> Order::all_if_too_many() const {
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
std::vector<Unit> Order::break_bucket(Sum& before) const {
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
void Order::narrow(std::vector<Unit>& units, Sum& before) const {
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

Order::Break Order::find_break() const {
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
