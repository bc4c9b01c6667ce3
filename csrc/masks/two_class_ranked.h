// Values by rank without sorting them all.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "masks/units.h"

namespace floe::masks {

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

}  // namespace floe::masks
