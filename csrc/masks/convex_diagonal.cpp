#include "masks/convex_diagonal.h"

#include <algorithm>
#include <cmath>

namespace floe::masks {
namespace {

// In place: the lower triangle becomes the factor. False if the matrix is not positive definite.
bool factorise(std::vector<double>& matrix, std::size_t n) {
  for (std::size_t j = 0; j < n; ++j) {
    double pivot = matrix[j * n + j];
    for (std::size_t k = 0; k < j; ++k) pivot -= matrix[j * n + k] * matrix[j * n + k];
    if (!(pivot > 0.0)) return false;
    const double root = std::sqrt(pivot);
    matrix[j * n + j] = root;
    for (std::size_t i = j + 1; i < n; ++i) {
      double entry = matrix[i * n + j];
      for (std::size_t k = 0; k < j; ++k) entry -= matrix[i * n + k] * matrix[j * n + k];
      matrix[i * n + j] = entry / root;
    }
  }
  return true;
}

// The inverse from a Cholesky factor, column by column.
std::vector<double> inverse_of(const std::vector<double>& factor, std::size_t n) {
  std::vector<double> inverse(n * n, 0.0);
  std::vector<double> column(n);
  for (std::size_t c = 0; c < n; ++c) {
    for (std::size_t i = 0; i < n; ++i) {
      double entry = i == c ? 1.0 : 0.0;
      for (std::size_t k = 0; k < i; ++k) entry -= factor[i * n + k] * column[k];
      column[i] = entry / factor[i * n + i];
    }
    for (std::size_t i = n; i-- > 0;) {
      for (std::size_t k = i + 1; k < n; ++k) column[i] -= factor[k * n + i] * column[k];
      column[i] /= factor[i * n + i];
    }
    for (std::size_t i = 0; i < n; ++i) inverse[i * n + c] = column[i];
  }
  return inverse;
}

bool convex_without(std::span<const double> matrix, const std::vector<double>& diagonal) {
  std::vector<double> rest(matrix.begin(), matrix.end());
  for (std::size_t i = 0; i < diagonal.size(); ++i) rest[i * diagonal.size() + i] -= diagonal[i];
  return factorise(rest, diagonal.size());
}

// Each row keeps more on the diagonal than beside it: positive definite whatever the signs.
std::vector<double> dominated(std::span<const double> matrix, std::size_t n, double margin) {
  std::vector<double> diagonal(n);
  for (std::size_t i = 0; i < n; ++i) {
    double beside = 0.0;
    for (std::size_t j = 0; j < n; ++j)
      if (j != i) beside += std::abs(matrix[i * n + j]);
    diagonal[i] = matrix[i * n + i] - beside - margin;
  }
  return diagonal;
}

// One pass of exact coordinate steps; `inverse` follows by Sherman and Morrison.
void sweep(std::vector<double>& inverse, std::vector<double>& diagonal,
           std::span<const double> weight, double mu) {
  const std::size_t n = diagonal.size();
  std::vector<double> column(n);
  for (std::size_t i = 0; i < n; ++i) {
    const double own = inverse[i * n + i];
    const double step = 1.0 / own - mu / weight[i];
    const double factor = step / (1.0 - step * own);
    for (std::size_t j = 0; j < n; ++j) column[j] = inverse[j * n + i];
    for (std::size_t j = 0; j < n; ++j) {
      const double scaled = factor * column[j];
      for (std::size_t k = 0; k < n; ++k) inverse[j * n + k] += scaled * column[k];
    }
    diagonal[i] += step;
  }
}

}  // namespace

std::vector<double> convex_diagonal(std::span<const double> matrix,
                                    std::span<const double> weight) {
  constexpr int kSweeps = 4;
  constexpr int kLevels = 26;  // down to 1e-12 of the start, or as far as rounding lets it
  constexpr double kFall = 0.35;
  const std::size_t n = weight.size();
  double scale = 0.0;
  for (const double entry : matrix) scale = std::max(scale, std::abs(entry));
  if (scale == 0.0) return std::vector<double>(n, 0.0);
  std::vector<double> best = dominated(matrix, n, 1e-9 * scale);
  std::vector<double> diagonal = best;
  double mu = scale * *std::ranges::max_element(weight);
  for (int level = 0; level < kLevels; ++level, mu *= kFall) {
    std::vector<double> rest(matrix.begin(), matrix.end());  // afresh: the updates lose digits
    for (std::size_t i = 0; i < n; ++i) rest[i * n + i] -= diagonal[i];
    if (!factorise(rest, n)) break;
    best = diagonal;
    std::vector<double> inverse = inverse_of(rest, n);
    for (int i = 0; i < kSweeps; ++i) sweep(inverse, diagonal, weight, mu);
  }
  return convex_without(matrix, diagonal) ? diagonal : best;
}

}  // namespace floe::masks
