// Which layers keep their gate open when closing gates costs what it costs together.
#pragma once

#include <cstdint>
#include <functional>
#include <span>

namespace floe::masks {

struct CoupledLimits {
  // Nodes the search may examine; 0 leaves the best start with its bound. A count, so that every
  // machine stops at the same layers.
  std::int64_t max_nodes = 2'000'000;
  std::function<void()> poll;  // called about every 100 ms; may throw to cancel
};

struct CoupledSolution {
  double loss = 0.0;         // of the closed layers
  double lower_bound = 0.0;  // no choice of as many layers loses less
  bool optimal = false;      // proven, to a relative 1e-10 of the summed terms
  std::int64_t nodes = 0;
};

// Keeps `count` of L layers (written to `kept`, true = kept) so that the closed ones, z = 1, lose
// the least: 1/2 z' F z - b' z, with F = `matrix` [L, L] symmetric, of any signs, and b = `linear`
// [L].
//
// Greedy closing and greedy opening with exchanges give a start. Then branch and bound: with
// z_i^2 = z_i any diagonal D turns the quadratic into 1/2 z' (F + s 11' - D) z + linear terms; D is
// taken as large as keeps that convex, and the convex function's linearisation at any point,
// minimised over the choices that are left, is a bound. Ties: a kept layer gives way to a lower one
// of equal loss. Deterministic. Throws std::invalid_argument.
CoupledSolution keep_layers(std::span<const double> matrix, std::span<const double> linear,
                            std::int64_t count, const CoupledLimits& limits, std::span<bool> kept);

}  // namespace floe::masks
