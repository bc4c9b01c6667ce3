#include "masks/refine.h"

#include <array>
#include <cmath>
#include <compare>
#include <limits>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "masks/units.h"

namespace floe::masks {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// value / cost of a unit that costs something, for comparing: never infinite, never rounded to 0.
struct Ratio {
  int exponent = 0;
  double fraction = 0.0;

  Ratio(double value, double cost) {
    if (value == 0.0) {
      exponent = std::numeric_limits<int>::min();
      return;
    }
    std::array<int, 3> exponents{};
    const double quotient = std::frexp(value, &exponents[0]) / std::frexp(cost, &exponents[1]);
    fraction = std::frexp(quotient, &exponents[2]);
    exponent = exponents[0] - exponents[1] + exponents[2];
  }
  auto operator<=>(const Ratio&) const = default;
};

struct Candidate {
  double value = 0.0;
  double cost = 0.0;
  std::int64_t unit = -1;  // -1: none
};

// The unit one would rather retain: more value, then less cost, then the lower index.
bool enters_before(const Candidate& a, const Candidate& b) {
  if (a.unit < 0 || b.unit < 0) return b.unit < 0 && a.unit >= 0;
  if (a.value != b.value) return a.value > b.value;
  if (a.cost != b.cost) return a.cost < b.cost;
  return a.unit < b.unit;
}

// The unit one would rather mask: less value, then more cost, then the lower index.
bool leaves_before(const Candidate& a, const Candidate& b) {
  if (a.unit < 0 || b.unit < 0) return b.unit < 0 && a.unit >= 0;
  if (a.value != b.value) return a.value < b.value;
  if (a.cost != b.cost) return a.cost > b.cost;
  return a.unit < b.unit;
}

struct Move {
  double gain = 0.0;
  double freed = 0.0;
  std::int64_t leaving = -1;  // -1: nothing leaves, the unit is added
  std::int64_t entering = -1;

  bool better_than(const Move& other) const {
    if (gain != other.gain) return gain > other.gain;
    if (freed != other.freed) return freed > other.freed;
    if (leaving != other.leaving) return leaving < other.leaving;
    return entering < other.entering;
  }
};

// A segment tree over some units in order of cost. Each node knows the best unit to retain and the
// best to mask in its range of costs, so whole ranges are compared, or ruled out, at once.
class CostTree {
 public:
  struct Node {
    Candidate entering;  // the best masked unit
    Candidate leaving;   // the best retained unit
    double least_cost = kInfinity;
    double most_cost = -kInfinity;
  };

  CostTree(std::vector<std::int64_t> units, std::span<const double> value,
           std::span<const double> cost, std::span<const bool> mask)
      : leaves_(std::bit_ceil(std::max<std::size_t>(units.size(), 1))), nodes_(2 * leaves_) {
    std::ranges::sort(units, [&](std::int64_t a, std::int64_t b) {
      const auto i = static_cast<std::size_t>(a);
      const auto j = static_cast<std::size_t>(b);
      return cost[i] != cost[j] ? cost[i] < cost[j] : a < b;
    });
    for (std::size_t i = 0; i < units.size(); ++i) {
      const auto unit = static_cast<std::size_t>(units[i]);
      const Candidate candidate{value[unit], cost[unit], units[i]};
      Node& leaf = nodes_[leaves_ + i];
      leaf.least_cost = leaf.most_cost = cost[unit];
      (mask[unit] ? leaf.leaving : leaf.entering) = candidate;
    }
    for (std::size_t i = leaves_; i-- > 1;) pull(i);
    units_ = std::move(units);
  }

  const std::vector<std::int64_t>& units() const { return units_; }
  const Node& node(std::size_t i) const { return nodes_[i]; }
  bool is_leaf(std::size_t i) const { return i >= leaves_; }
  static constexpr std::size_t kRoot = 1;

  // Changes whether the unit at `position` of units() is retained.
  void flip(std::size_t position) {
    std::size_t i = leaves_ + position;
    std::swap(nodes_[i].entering, nodes_[i].leaving);
    while (i > kRoot) pull(i /= 2);
  }

 private:
  void pull(std::size_t i) {
    const Node& left = nodes_[2 * i];
    const Node& right = nodes_[2 * i + 1];
    Node& node = nodes_[i];
    node.entering = enters_before(right.entering, left.entering) ? right.entering : left.entering;
    node.leaving = leaves_before(right.leaving, left.leaving) ? right.leaving : left.leaving;
    node.least_cost = std::min(left.least_cost, right.least_cost);
    node.most_cost = std::max(left.most_cost, right.most_cost);
  }

  std::size_t leaves_;
  std::vector<Node> nodes_;
  std::vector<std::int64_t> units_;
};

// Finds the best move among pairs of a tree of leaving and a tree of entering units.
class MoveSearch {
 public:
  MoveSearch(double slack, double least_gain) : slack_(slack) { best_.gain = least_gain; }

  std::optional<Move> best() const {
    return best_.entering < 0 ? std::nullopt : std::optional<Move>(best_);
  }

  void try_adding(const CostTree& tree, std::size_t i = CostTree::kRoot) {
    const CostTree::Node& node = tree.node(i);
    const Candidate& entering = node.entering;
    if (entering.unit < 0 || entering.value < best_.gain || node.least_cost > slack_) return;
    if (entering.cost <= slack_) {
      consider({entering.value, -entering.cost, -1, entering.unit});
      return;
    }
    if (tree.is_leaf(i)) return;
    try_adding(tree, 2 * i);
    try_adding(tree, 2 * i + 1);
  }

  void try_swapping(const CostTree& from, const CostTree& to, std::size_t a = CostTree::kRoot,
                    std::size_t b = CostTree::kRoot) {
    const CostTree::Node& leave = from.node(a);
    const CostTree::Node& enter = to.node(b);
    if (leave.leaving.unit < 0 || enter.entering.unit < 0) return;
    if (enter.least_cost - leave.most_cost > slack_) return;
    const double gain = enter.entering.value - leave.leaving.value;
    if (gain < best_.gain) return;
    if (gain == best_.gain && leave.most_cost - enter.least_cost < best_.freed) return;
    const double freed = leave.leaving.cost - enter.entering.cost;
    if (enter.entering.cost - leave.leaving.cost <= slack_) {
      // The best pair of these ranges in every respect, ties included.
      consider({gain, freed, leave.leaving.unit, enter.entering.unit});
      return;
    }
    const double leave_width = from.is_leaf(a) ? -1.0 : leave.most_cost - leave.least_cost;
    const double enter_width = to.is_leaf(b) ? -1.0 : enter.most_cost - enter.least_cost;
    if (leave_width < 0.0 && enter_width < 0.0) return;
    if (leave_width >= enter_width) {  // dearer units first: they make more room
      try_swapping(from, to, 2 * a + 1, b);
      try_swapping(from, to, 2 * a, b);
    } else {
      try_swapping(from, to, a, 2 * b);
      try_swapping(from, to, a, 2 * b + 1);
    }
  }

 private:
  void consider(const Move& move) {
    // Until something is found, best_.gain is the gain a move has to exceed.
    if (best_.entering < 0 ? move.gain > best_.gain : move.better_than(best_)) best_ = move;
  }

  double slack_;
  Move best_{.gain = 0.0, .freed = -kInfinity, .leaving = -1, .entering = -1};
};

class Refiner {
 public:
  Refiner(std::span<const double> value, std::span<const double> cost, double capacity,
          const Layout& layout, const RefineOptions& options, std::span<bool> mask)
      : value_(value),
        cost_(cost),
        capacity_(capacity),
        layout_(layout),
        options_(options),
        mask_(mask),
        place_(value.size()) {
    // Printed Algorithm 2 asks that the masked cost not rise, that is, that the entering unit cost
    // at least as much as the leaving one: the same search on negated costs, without slack.
    if (options.literal) {
      negated_.resize(cost.size());
      std::ranges::transform(cost, negated_.begin(), std::negate<>{});
    }
  }

  RefineSolution run() {
    if (!options_.literal) repair();
    plant();
    Ticker ticker(options_.poll);
    total_up();
    while (solution_.adds + solution_.swaps < options_.max_moves) {
      ticker.tick(solution_.adds + solution_.swaps);
      const std::optional<Move> move = best_move();
      if (!move) {
        solution_.converged = true;
        break;
      }
      apply(*move);
    }
    total_up();
    return solution_;
  }

 private:
  struct Place {
    std::uint32_t tree;
    std::uint32_t position;
  };

  void total_up() {
    const Totals totals = totals_of(value_, cost_, mask_);
    totals.write_to(solution_);
    retained_value_ = Sum(totals.value);
    retained_cost_ = Sum(totals.cost);
  }

  void repair() {
    total_up();
    if (retained_cost_.total() <= capacity_) return;
    std::vector<std::size_t> droppable;
    for (std::size_t i = 0; i < value_.size(); ++i)
      if (mask_[i] && cost_[i] > 0.0) droppable.push_back(i);
    std::ranges::sort(droppable, [&](std::size_t a, std::size_t b) {
      const Ratio left(value_[a], cost_[a]);
      const Ratio right(value_[b], cost_[b]);
      if (left != right) return left < right;
      if (cost_[a] != cost_[b]) return cost_[a] > cost_[b];
      return a > b;
    });
    for (const std::size_t i : droppable) {
      if (retained_cost_.total() <= capacity_) total_up();  // what large costs left no digits for
      if (retained_cost_.total() <= capacity_) return;
      mask_[i] = false;
      retained_cost_.add(-cost_[i]);
      ++solution_.repairs;
    }
  }

  void add_tree(std::vector<std::int64_t> units) {
    const auto tree = static_cast<std::uint32_t>(trees_.size());
    trees_.emplace_back(std::move(units), value_, search_cost(), mask_);
    const std::vector<std::int64_t>& order = trees_.back().units();
    for (std::size_t i = 0; i < order.size(); ++i)
      place_[static_cast<std::size_t>(order[i])] = {tree, static_cast<std::uint32_t>(i)};
  }

  std::span<const double> search_cost() const {
    return options_.literal ? std::span<const double>(negated_) : cost_;
  }

  // One tree for each set of units within which, or between two of which, places may change.
  void plant() {
    const auto range = [](std::int64_t first, std::int64_t count) {
      std::vector<std::int64_t> units(static_cast<std::size_t>(count));
      std::iota(units.begin(), units.end(), first);
      return units;
    };
    if (value_.empty()) return;
    if (options_.pairs == Pairs::kAll) {
      add_tree(range(0, static_cast<std::int64_t>(value_.size())));
      pairs_.emplace_back(0, 0);
      return;
    }
    const std::int64_t neurons_start = layout_.layers * layout_.heads;
    for (std::int64_t layer = 0; layer < layout_.layers; ++layer) {
      auto heads = range(layer * layout_.heads, layout_.heads);
      auto neurons = range(neurons_start + layer * layout_.neurons, layout_.neurons);
      const std::size_t tree = trees_.size();
      if (options_.pairs == Pairs::kSameLayer) {
        heads.insert(heads.end(), neurons.begin(), neurons.end());
        add_tree(std::move(heads));
        pairs_.emplace_back(tree, tree);
      } else {
        add_tree(std::move(heads));
        add_tree(std::move(neurons));
        pairs_.emplace_back(tree, tree + 1);
        pairs_.emplace_back(tree + 1, tree);
      }
    }
  }

  std::optional<Move> best_move() const {
    MoveSearch search(options_.literal ? 0.0 : slack(), retained_value_.total() * kTolerance);
    if (!options_.literal)
      for (const CostTree& tree : trees_) search.try_adding(tree);
    for (const auto& [from, to] : pairs_) search.try_swapping(trees_[from], trees_[to]);
    return search.best();
  }

  double slack() const {  // without a limit, whatever costs have overflowed to
    return std::isinf(capacity_) ? kInfinity : capacity_ - retained_cost_.total();
  }

  void flip(std::int64_t unit) {
    const auto i = static_cast<std::size_t>(unit);
    const double sign = mask_[i] ? -1.0 : 1.0;
    retained_value_.add(sign * value_[i]);
    retained_cost_.add(sign * cost_[i]);
    mask_[i] = !mask_[i];
    trees_[place_[i].tree].flip(place_[i].position);
  }

  void apply(const Move& move) {
    if (move.leaving >= 0) {
      flip(move.leaving);
      ++solution_.swaps;
    } else {
      ++solution_.adds;
    }
    flip(move.entering);
  }

  std::span<const double> value_;
  std::span<const double> cost_;
  std::vector<double> negated_;
  const double capacity_;
  const Layout& layout_;
  const RefineOptions& options_;
  std::span<bool> mask_;
  std::vector<Place> place_;
  std::vector<CostTree> trees_;
  std::vector<std::pair<std::size_t, std::size_t>> pairs_;
  RefineSolution solution_;
  Sum retained_value_;
  Sum retained_cost_;
};

void check_layout(const Layout& layout, std::size_t count) {
  for (const std::int64_t size : {layout.layers, layout.heads, layout.neurons})
    if (size < 0 || size >= std::int64_t{1} << 30)
      throw std::invalid_argument("layers, heads and neurons must be in [0, 2**30), got " +
                                  std::to_string(size));
  const std::int64_t units = layout.layers * (layout.heads + layout.neurons);
  check_length("value", count, "layers * (heads + neurons)", static_cast<std::size_t>(units));
}

}  // namespace

RefineSolution refine(std::span<const double> value, std::span<const double> cost, double budget,
                      const Layout& layout, const RefineOptions& options, std::span<bool> mask) {
  check_length("cost", cost.size(), "value", value.size());
  check_length("mask", mask.size(), "value", value.size());
  check_count(value.size());
  check_layout(layout, value.size());
  check_units("value", value);
  check_units("cost", cost);
  check_budget(budget);
  check_sum("value", value);
  if (!std::isinf(budget)) check_sum("cost", cost);
  return Refiner(value, cost, capacity_of(budget), layout, options, mask).run();
}

}  // namespace floe::masks
