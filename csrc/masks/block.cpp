#include "masks/block.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <vector>

#include "masks/units.h"

namespace floe::masks {
namespace {

using Row = std::span<const double>;

// Four sums, so that the additions need not wait for each other; always in this order.
double dot(Row a, Row b) {
  std::array<double, 4> sums{};
  std::size_t i = 0;
  for (; i + 4 <= a.size(); i += 4)
    for (std::size_t lane = 0; lane < 4; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  for (; i < a.size(); ++i) sums[0] += a[i] * b[i];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

class Rearrangement {
 public:
  Rearrangement(Row gradient, std::size_t samples, Row cost, double slack, std::span<bool> mask)
      : gradient_(gradient), samples_(samples), cost_(cost), mask_(mask), slack_(slack) {
    const std::size_t count = mask.size();
    squares_.resize(count);
    norms_.resize(count);
    along_.resize(count);
    for (std::size_t i = 0; i < count; ++i) {
      squares_[i] = dot(row(i), row(i));
      norms_[i] = std::sqrt(squares_[i]);
      largest_ = std::max(largest_, norms_[i]);
      (mask[i] ? offering_ : masked_).push_back(i);
    }
    std::ranges::stable_sort(offering_, {}, [&](std::size_t i) { return squares_[i]; });
  }

  BlockSolution run(const std::function<void()>& poll) {
    Ticker ticker(poll);
    BlockSolution solution;
    sum_up();
    solution.loss_before = dot(sum_, sum_);
    for (const std::size_t entering : offering_) {
      ticker.tick();
      if (place_of(entering)) ++solution.swaps;
    }
    sum_up();
    solution.loss = dot(sum_, sum_);
    solution.slack = slack_;
    return solution;
  }

 private:
  Row row(std::size_t unit) const { return gradient_.subspan(unit * samples_, samples_); }

  // Afresh, not by increments: the sum of the masked gradients, and each masked one's part of it.
  void sum_up() {
    sum_.assign(samples_, 0.0);
    for (const std::size_t unit : masked_)
      for (std::size_t s = 0; s < samples_; ++s) sum_[s] += row(unit)[s];
    project();
  }

  void project() {
    for (const std::size_t unit : masked_) along_[unit] = dot(sum_, row(unit));
    tolerance_ = kTolerance * largest_ * (largest_ + std::sqrt(dot(sum_, sum_)));
  }

  // Masks `entering` for the masked unit that gains most, if any gains.
  bool place_of(std::size_t entering) {
    const double along = dot(sum_, row(entering));
    double best = -tolerance_;
    std::size_t found = masked_.size();
    for (std::size_t place = 0; place < masked_.size(); ++place) {
      const std::size_t leaving = masked_[place];
      if (cost_[leaving] - cost_[entering] > slack_) continue;
      const double linear = 2.0 * (along - along_[leaving]);
      const double apart = norms_[entering] - norms_[leaving];
      if (linear + apart * apart >= best) continue;  // || a - b || >= | ||a|| - ||b|| |
      const double change =
          linear + squares_[entering] + squares_[leaving] - 2.0 * dot(row(entering), row(leaving));
      if (change >= best) continue;
      best = change;
      found = place;
    }
    if (found == masked_.size()) return false;
    swap(entering, found);
    return true;
  }

  void swap(std::size_t entering, std::size_t place) {
    const std::size_t leaving = masked_[place];
    for (std::size_t s = 0; s < samples_; ++s) sum_[s] += row(entering)[s] - row(leaving)[s];
    if (!std::isinf(slack_)) slack_ -= cost_[leaving] - cost_[entering];
    mask_[leaving] = true;
    mask_[entering] = false;
    masked_.erase(masked_.begin() + static_cast<std::ptrdiff_t>(place));
    masked_.insert(std::ranges::lower_bound(masked_, entering), entering);
    project();
  }

  Row gradient_;
  std::size_t samples_;
  Row cost_;
  std::span<bool> mask_;
  double slack_;
  std::vector<double> squares_;  // of the norm of each unit's gradients
  std::vector<double> norms_;
  std::vector<double> along_;          // of the masked units: gradient times sum_
  std::vector<double> sum_;            // of the masked units' gradients
  std::vector<std::size_t> masked_;    // ascending
  std::vector<std::size_t> offering_;  // retained at the start
  double largest_ = 0.0;
  double tolerance_ = 0.0;
};

void check_finite(Row numbers) {
  for (std::size_t i = 0; i < numbers.size(); ++i)
    if (!std::isfinite(numbers[i]))
      throw std::invalid_argument("gradient must be finite, got " + to_text(numbers[i]) +
                                  " at position " + std::to_string(i));
}

}  // namespace

BlockSolution rearrange(std::span<const double> gradient, std::size_t samples,
                        std::span<const double> cost, double slack,
                        const std::function<void()>& poll, std::span<bool> mask) {
  check_length("cost", cost.size(), "mask", mask.size());
  const std::size_t rows = samples == 0 ? mask.size() : gradient.size() / samples;
  check_length("gradient", rows, "mask", mask.size());
  check_finite(gradient);
  for (const double number : cost)
    if (!std::isfinite(number))
      throw std::invalid_argument("cost must be finite, got " + to_text(number));
  if (!(slack >= 0.0))
    throw std::invalid_argument("slack must be a number >= 0, got " + to_text(slack));
  check_sum("cost", cost);
  double largest = 0.0;
  for (const double number : gradient) largest = std::max(largest, std::abs(number));
  const int exponent = far_exponent(largest);
  const Scaled near(gradient, exponent);
  BlockSolution solution = Rearrangement(near.numbers(), samples, cost, slack, mask).run(poll);
  solution.loss_before = std::ldexp(solution.loss_before, 2 * exponent);
  solution.loss = std::ldexp(solution.loss, 2 * exponent);
  if (std::isinf(solution.loss_before))
    throw std::invalid_argument("gradient must have a finite loss, got numbers up to " +
                                to_text(largest));
  return solution;
}

}  // namespace floe::masks
