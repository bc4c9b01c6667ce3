#include "masks/coupled.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "masks/convex_diagonal.h"
#include "masks/coupled_loss.h"
#include "masks/units.h"

namespace floe::masks {
namespace {

constexpr double kProof = 1e-10;  // of the summed terms: what counts as equal
constexpr double kInfinity = std::numeric_limits<double>::infinity();

using Layers = std::vector<std::size_t>;

// A convex quadratic that equals the loss wherever every z is 0 or 1 and `closing` of them are 1.
struct Convex {
  Numbers matrix;
  Numbers linear;
  double constant = 0.0;
};

Convex convex_of(const Loss& loss, std::size_t closing, const Numbers& weight) {
  const std::size_t n = loss.size();
  double shift = 0.0;  // z' 11' z is closing^2 everywhere, and lets the diagonal give more
  for (std::size_t i = 0; i < n; ++i) shift += std::abs(loss.at(i, i));
  shift /= static_cast<double>(n);
  Convex convex{Numbers(n * n), Numbers(n), 0.0};
  for (std::size_t i = 0; i < n; ++i)
    for (std::size_t j = 0; j < n; ++j) convex.matrix[i * n + j] = loss.at(i, j) + shift;
  const Numbers diagonal = convex_diagonal(convex.matrix, weight);
  for (std::size_t i = 0; i < n; ++i) {
    convex.matrix[i * n + i] -= diagonal[i];
    convex.linear[i] = 0.5 * diagonal[i] - loss.linear(i);
  }
  const auto count = static_cast<double>(closing);
  convex.constant = -0.5 * shift * count * count;
  return convex;
}

// A point of the relaxation: 0 <= z <= 1, as many as are to close in sum; `free` may still move.
struct Point {
  Numbers z;
  Layers free;
  std::size_t closing = 0;  // of the free ones
};

// A bound for all choices that a point leaves, and what it says about single layers.
struct Bound {
  double value = -kInfinity;
  Numbers slope;         // the convex function's, at the point
  double inside = 0.0;   // the greatest slope among those that the bound closes
  double outside = 0.0;  // the least among the others
};

class Relaxation {
 public:
  explicit Relaxation(Convex convex) : convex_(std::move(convex)), n_(convex_.linear.size()) {}

  // Moves z towards the minimum by exchanging mass between two layers at a time. Ends early once
  // the bound reaches `enough`, or the point is as good as the bound can still become.
  Bound improve(Point& point, double enough) const {
    Numbers slope = slope_at(point);
    Bound best;
    const std::size_t round = point.free.size();
    for (std::size_t step = 0; step < kRounds; ++step) {
      Bound bound = bound_at(point, slope);
      const double here = value_at(point, slope);
      const double gap = here - bound.value;
      if (bound.value > best.value) best = std::move(bound);
      if (best.value >= enough || gap <= kCloseness * (enough - best.value)) break;
      bool moved = false;
      for (std::size_t i = 0; i < round; ++i) moved |= exchange(point, slope);
      if (!moved) break;
    }
    return best;
  }

 private:
  static constexpr std::size_t kRounds = 40;
  static constexpr double kCloseness = 0.1;

  Numbers slope_at(const Point& point) const {
    Numbers slope = convex_.linear;
    for (std::size_t j = 0; j < n_; ++j)
      if (point.z[j] != 0.0)
        for (std::size_t i = 0; i < n_; ++i) slope[i] += convex_.matrix[j * n_ + i] * point.z[j];
    return slope;
  }

  double value_at(const Point& point, const Numbers& slope) const {
    double total = convex_.constant;
    for (std::size_t i = 0; i < n_; ++i) total += 0.5 * point.z[i] * (slope[i] + convex_.linear[i]);
    return total;
  }

  Bound bound_at(const Point& point, const Numbers& slope) const {
    Layers order = point.free;
    std::ranges::sort(order, [&](std::size_t a, std::size_t b) {
      return slope[a] != slope[b] ? slope[a] < slope[b] : a < b;
    });
    Bound bound{value_at(point, slope), slope, -kInfinity, kInfinity};
    for (std::size_t place = 0; place < order.size(); ++place) {
      const std::size_t i = order[place];
      bound.value += slope[i] * ((place < point.closing ? 1.0 : 0.0) - point.z[i]);
    }
    if (point.closing > 0) bound.inside = slope[order[point.closing - 1]];
    if (point.closing < order.size()) bound.outside = slope[order[point.closing]];
    return bound;
  }

  // From the layer where mass costs most to the one where it costs least; exact along that line.
  bool exchange(Point& point, Numbers& slope) const {
    std::size_t from = n_;
    std::size_t to = n_;
    for (const std::size_t i : point.free) {
      if (point.z[i] > 0.0 && (from == n_ || slope[i] > slope[from])) from = i;
      if (point.z[i] < 1.0 && (to == n_ || slope[i] < slope[to])) to = i;
    }
    if (from == n_ || to == n_ || from == to || !(slope[from] > slope[to])) return false;
    const double* m = convex_.matrix.data();
    const double bend = m[from * n_ + from] + m[to * n_ + to] - 2.0 * m[from * n_ + to];
    double step = std::min(point.z[from], 1.0 - point.z[to]);
    if (bend > 0.0) step = std::min(step, (slope[from] - slope[to]) / bend);
    point.z[from] = step == point.z[from] ? 0.0 : point.z[from] - step;
    point.z[to] = step == 1.0 - point.z[to] ? 1.0 : point.z[to] + step;
    for (std::size_t i = 0; i < n_; ++i) slope[i] += step * (m[to * n_ + i] - m[from * n_ + i]);
    return step > 0.0;
  }

  Convex convex_;
  std::size_t n_;
};

Point start_of(std::size_t n, std::size_t closing) {
  Point point{Numbers(n, static_cast<double>(closing) / static_cast<double>(n)), Layers(n),
              closing};
  std::iota(point.free.begin(), point.free.end(), std::size_t{0});
  return point;
}

// Sets one free layer; what that takes from the sum, or leaves over, the other free ones share.
void fix(Point& point, std::size_t layer, bool close) {
  std::erase(point.free, layer);
  point.closing -= close ? 1 : 0;
  point.z[layer] = close ? 1.0 : 0.0;
  double have = 0.0;
  for (const std::size_t i : point.free) have += point.z[i];
  const auto want = static_cast<double>(point.closing);
  const auto room = static_cast<double>(point.free.size()) - have;
  for (const std::size_t i : point.free) {
    double& z = point.z[i];
    z = want <= have ? (have > 0.0 ? z * want / have : 0.0)
                     : (room > 0.0 ? 1.0 - (1.0 - z) * (room + have - want) / room : 1.0);
    z = std::clamp(z, 0.0, 1.0);
  }
}

class Search {
 public:
  Search(const Loss& loss, std::size_t closing, const CoupledLimits& limits)
      : loss_(loss), closing_(closing), limits_(limits), ticker_(limits.poll) {}

  CoupledSolution run(Closed& closed) {
    start();
    Point root = start_of(loss_.size(), closing_);
    const Relaxation relaxation(root_convex(root));
    relaxation_ = &relaxation;
    open_ = kInfinity;
    explore(std::move(root), root_bound_);
    loss_.prefer_lower(best_, tolerance_);
    closed = best_;
    CoupledSolution solution;
    solution.loss = loss_.of(best_);
    solution.optimal = open_ >= least_ - tolerance_;
    solution.lower_bound = std::min({solution.loss, least_, open_});
    solution.nodes = nodes_;
    return solution;
  }

 private:
  void consider(const Closed& closed) {
    const double loss = loss_.of(closed);
    if (loss >= least_) return;
    least_ = loss;
    best_ = closed;
    tolerance_ = kProof * loss_.mass(closed);
  }

  void start() {
    for (const char from : {'\0', '\1'}) {
      Closed closed(loss_.size(), from);
      loss_.approach(closed, closing_);
      loss_.exchange_all(closed, kTolerance * loss_.mass(closed));
      consider(closed);
    }
  }

  // The diagonal that suits where the relaxation is fractional: that is where it pays.
  Convex root_convex(Point& root) {
    constexpr int kTries = 4;
    constexpr double kLeast = 0.02;
    Numbers weight(loss_.size(), 1.0);
    Convex best;
    for (int i = 0; i < kTries; ++i) {
      Convex convex = convex_of(loss_, closing_, weight);
      Point point = start_of(loss_.size(), closing_);
      const Bound bound = Relaxation(convex).improve(point, least_ - tolerance_);
      for (std::size_t k = 0; k < weight.size(); ++k)
        weight[k] = 0.5 * weight[k] + 0.5 * std::max(kLeast, 4.0 * point.z[k] * (1.0 - point.z[k]));
      if (bound.value <= root_bound_) continue;
      root_bound_ = bound.value;
      root = std::move(point);
      best = std::move(convex);
    }
    return best;
  }

  void explore(Point point, double inherited) {
    ticker_.tick();
    if (nodes_ >= limits_.max_nodes) {
      open_ = std::min(open_, inherited);
      return;
    }
    ++nodes_;
    const double enough = least_ - tolerance_;
    if (inherited >= enough) return;
    if (point.closing == 0 || point.closing == point.free.size()) {
      take(point, {});
      return;
    }
    const Bound bound = relaxation_->improve(point, enough);
    if (bound.value >= enough) return;
    take(point, bound.slope);
    settle(point, bound);
    if (point.free.empty() || point.closing == 0 || point.closing == point.free.size()) {
      take(point, {});
      return;
    }
    branch(point, std::max(inherited, bound.value));
  }

  void branch(const Point& point, double bound) {
    const std::size_t layer = *std::ranges::min_element(
        point.free, {}, [&](std::size_t i) { return std::abs(point.z[i] - 0.5); });
    const bool first = point.z[layer] >= 0.5;
    for (const bool close : {first, !first}) {
      Point child = point;
      fix(child, layer, close);
      explore(std::move(child), bound);
    }
  }

  // The choice next to the point: with all free layers settled, the only one.
  void take(const Point& point, const Numbers& slope) {
    Closed closed(loss_.size(), 0);
    for (std::size_t i = 0; i < closed.size(); ++i) closed[i] = point.z[i] == 1.0 ? 1 : 0;
    Layers order = point.free;
    for (const std::size_t i : order) closed[i] = 0;
    std::ranges::sort(order, [&](std::size_t a, std::size_t b) {
      if (point.z[a] != point.z[b]) return point.z[a] > point.z[b];
      if (!slope.empty() && slope[a] != slope[b]) return slope[a] < slope[b];
      return a < b;
    });
    for (std::size_t i = 0; i < point.closing; ++i) closed[order[i]] = 1;
    consider(closed);
  }

  // Fixes the layers whose other value alone lifts the bound too high.
  void settle(Point& point, const Bound& bound) const {
    const double enough = least_ - tolerance_;
    Layers close;
    Layers keep;
    for (const std::size_t i : point.free) {
      const double slope = bound.slope[i];
      if (slope < bound.outside && bound.value + bound.outside - slope >= enough) {
        close.push_back(i);
      } else if (slope > bound.inside && bound.value + slope - bound.inside >= enough) {
        keep.push_back(i);
      }
    }
    for (const std::size_t i : close) fix(point, i, true);
    for (const std::size_t i : keep) fix(point, i, false);
  }

  const Loss& loss_;
  const std::size_t closing_;
  const CoupledLimits& limits_;
  Ticker ticker_;
  const Relaxation* relaxation_ = nullptr;
  Closed best_;
  double least_ = kInfinity;
  double tolerance_ = 0.0;
  double root_bound_ = -kInfinity;
  double open_ = kInfinity;  // the least bound of what was left unexplored
  std::int64_t nodes_ = 0;
};

void check(std::span<const double> matrix, std::span<const double> linear, std::int64_t count) {
  check_length("matrix", matrix.size(), "L * L", linear.size() * linear.size());
  if (count < 0 || static_cast<std::size_t>(count) > linear.size())
    throw std::invalid_argument("count must be in [0, " + std::to_string(linear.size()) +
                                "], got " + std::to_string(count));
  for (const auto& numbers : {matrix, linear})
    for (const double number : numbers)
      if (!std::isfinite(number))
        throw std::invalid_argument("matrix and linear must be finite, got " + to_text(number));
}

}  // namespace

CoupledSolution keep_layers(std::span<const double> matrix, std::span<const double> linear,
                            std::int64_t count, const CoupledLimits& limits, std::span<bool> kept) {
  check(matrix, linear, count);
  check_length("kept", kept.size(), "linear", linear.size());
  const Loss loss(matrix, linear);
  const std::size_t closing = linear.size() - static_cast<std::size_t>(count);
  Closed closed(linear.size(), count == 0 ? 1 : 0);
  CoupledSolution solution{loss.of(closed), loss.of(closed), true, 0};
  if (closing > 0 && count > 0) solution = Search(loss, closing, limits).run(closed);
  std::ranges::transform(closed, kept.begin(), [](char one) { return one == 0; });
  return solution;
}

}  // namespace floe::masks
