// What closing layers together costs, and moves that lower it; part of the search in coupled.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <span>
#include <vector>

namespace floe::masks {

using Numbers = std::vector<double>;
using Closed = std::vector<char>;  // 1 = closed

// The loss of closed layers, and moves that lower it.
class Loss {
 public:
  Loss(std::span<const double> matrix, std::span<const double> linear)
      : matrix_(matrix), linear_(linear), n_(linear.size()) {}

  std::size_t size() const { return n_; }
  double at(std::size_t i, std::size_t j) const { return matrix_[i * n_ + j]; }
  double linear(std::size_t i) const { return linear_[i]; }

  double of(const Closed& closed) const {
    long double total = 0.0L;
    for (std::size_t i = 0; i < n_; ++i) {
      if (!closed[i]) continue;
      total += 0.5L * at(i, i) - linear_[i];
      for (std::size_t j = 0; j < i; ++j)
        if (closed[j]) total += at(i, j);
    }
    return static_cast<double>(total);
  }

  // What of() adds up, without signs: the measure of its rounding.
  double mass(const Closed& closed) const {
    double total = 0.0;
    for (std::size_t i = 0; i < n_; ++i) {
      if (!closed[i]) continue;
      total += std::abs(linear_[i]);
      for (std::size_t j = 0; j < n_; ++j)
        if (closed[j]) total += 0.5 * std::abs(at(i, j));
    }
    return total;
  }

  Numbers pulls(const Closed& closed) const {  // F z
    Numbers pulls(n_, 0.0);
    for (std::size_t i = 0; i < n_; ++i)
      for (std::size_t j = 0; j < n_; ++j)
        if (closed[j]) pulls[i] += at(i, j);
    return pulls;
  }

  // The change when `i` closes and `j`, closed, opens.
  double exchange(const Numbers& pulls, std::size_t i, std::size_t j) const {
    return pulls[i] - pulls[j] + 0.5 * (at(i, i) + at(j, j)) - at(i, j) - linear_[i] + linear_[j];
  }

  // Closes or opens the layer that costs least, until `closing` are closed.
  void approach(Closed& closed, std::size_t closing) const {
    auto now = static_cast<std::size_t>(std::ranges::count(closed, 1));
    for (; now != closing; now += now < closing ? 1 : -1) {
      const Numbers pulls = this->pulls(closed);
      const bool close = now < closing;
      std::size_t found = n_;
      double least = std::numeric_limits<double>::infinity();
      for (std::size_t i = 0; i < n_; ++i) {
        if ((closed[i] != 0) == close) continue;
        const double change =
            close ? pulls[i] + 0.5 * at(i, i) - linear_[i] : linear_[i] + 0.5 * at(i, i) - pulls[i];
        if (change >= least) continue;
        least = change;
        found = i;
      }
      closed[found] = close ? 1 : 0;
    }
  }

  // The best exchange first, while one gains more than `least`; ties: lower indices.
  void exchange_all(Closed& closed, double least) const {
    while (true) {
      const Numbers pulls = this->pulls(closed);
      double best = -least;
      std::size_t closes = n_;
      std::size_t opens = n_;
      for (std::size_t i = 0; i < n_; ++i)
        for (std::size_t j = 0; j < n_; ++j) {
          if (closed[i] || !closed[j]) continue;
          const double change = exchange(pulls, i, j);
          if (change >= best) continue;
          best = change;
          closes = i;
          opens = j;
        }
      if (closes == n_) return;
      closed[closes] = 1;
      closed[opens] = 0;
    }
  }

  // A kept layer gives way to a lower closed one that costs the same.
  void prefer_lower(Closed& closed, double tolerance) const {
    for (bool moved = true; moved;) {
      moved = false;
      const Numbers pulls = this->pulls(closed);
      for (std::size_t j = 0; j < n_ && !moved; ++j)
        for (std::size_t i = n_; i-- > j + 1 && !moved;)
          if (closed[j] && !closed[i] && exchange(pulls, i, j) <= tolerance) {
            closed[i] = 1;
            closed[j] = 0;
            moved = true;
          }
    }
  }

 private:
  std::span<const double> matrix_;
  std::span<const double> linear_;
  std::size_t n_;
};

}  // namespace floe::masks
