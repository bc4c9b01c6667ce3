// How much of a symmetric matrix's diagonal can become a linear term of a 0/1 problem.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

namespace floe::masks {

// A diagonal D that leaves `matrix` [n, n] - D positive definite (by a Cholesky factorisation; zero
// for the zero matrix), with a large sum of weight * D. Barrier coordinate ascent: maximises
// sum weight_i D_i + mu log det(matrix - D) one D_i at a time, for falling mu. O(n^3) a sweep.
// weight > 0. The matrix may be indefinite; D is then negative where it must be.
std::vector<double> convex_diagonal(std::span<const double> matrix, std::span<const double> weight);

}  // namespace floe::masks
