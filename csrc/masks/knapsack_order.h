// The order in which the greedy choice takes units, found without sorting them all.
#pragma once

#include <cstddef>
#include <cstdint>
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

double ratio_of(double value, double cost);  // infinity if the cost is zero

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

}  // namespace floe::masks
