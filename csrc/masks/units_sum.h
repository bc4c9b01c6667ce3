// Sums that keep what rounding loses.
#pragma once

#include <array>
#include <cfloat>
#include <cmath>
#include <cstddef>

namespace floe::masks {

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

}  // namespace floe::masks
