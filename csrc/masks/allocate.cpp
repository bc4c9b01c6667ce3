#include "masks/allocate.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>
#include <vector>

#include "masks/units.h"

namespace floe::masks {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

void check(const Choices& choices, std::int64_t budget) {
  const std::size_t count = choices.layers * choices.options;
  check_length("gain", choices.gain.size(), "layers * options", count);
  check_length("cost", choices.cost.size(), "gain", count);
  if (choices.layers == 0 || choices.options == 0)
    throw std::invalid_argument("there must be at least one layer and one option");
  std::int64_t cheapest = 0;
  for (std::size_t layer = 0; layer < choices.layers; ++layer) {
    const auto row = choices.cost.subspan(layer * choices.options, choices.options);
    const auto [least, most] = std::ranges::minmax(row);
    if (least < 0) throw std::invalid_argument("costs must be >= 0, got " + std::to_string(least));
    if (most >
        std::numeric_limits<std::int64_t>::max() / 4 / static_cast<std::int64_t>(choices.layers))
      throw std::invalid_argument("the layers' costs must sum to less than 2**61, got a cost of " +
                                  std::to_string(most));
    cheapest += least;
  }
  if (cheapest > budget)
    throw std::invalid_argument("the budget must pay for every layer's cheapest option (" +
                                std::to_string(cheapest) + "), got " + std::to_string(budget));
  // So far from overflow that no gain times a cost or the budget does.
  constexpr double kMost = 0x1p900;
  for (const double gain : choices.gain)
    if (!(std::abs(gain) * static_cast<double>(choices.layers) <= kMost))
      throw std::invalid_argument("gains must be finite and at most 2**900 / layers, got " +
                                  to_text(gain));
}

// A step of one layer to its next better option that a linear program would use.
struct Upgrade {
  double slope;  // gain per cost
  std::size_t layer;
  std::size_t option;
};

// A layer's options on the upper hull of gain over cost: cheapest first, slopes falling. The first
// is the best of the cheapest.
std::vector<std::size_t> hull_of(const Choices& choices, std::size_t layer) {
  std::vector<std::size_t> order(choices.options);
  for (std::size_t option = 0; option < order.size(); ++option) order[option] = option;
  const auto gain = [&](std::size_t option) { return choices.gain_of(layer, option); };
  const auto cost = [&](std::size_t option) {
    return static_cast<double>(choices.cost_of(layer, option));
  };
  std::ranges::stable_sort(order, [&](std::size_t a, std::size_t b) {
    return cost(a) != cost(b) ? cost(a) < cost(b) : gain(a) > gain(b);
  });
  std::vector<std::size_t> hull;
  for (const std::size_t option : order) {
    if (!hull.empty() && gain(option) <= gain(hull.back())) continue;
    while (hull.size() > 1) {
      const std::size_t last = hull.back();
      const std::size_t before = hull[hull.size() - 2];
      if ((gain(option) - gain(last)) * (cost(last) - cost(before)) <
          (gain(last) - gain(before)) * (cost(option) - cost(last)))
        break;
      hull.pop_back();
    }
    hull.push_back(option);
  }
  return hull;
}

// The linear program's choice with whole options only, and its dual.
class Relaxation {
 public:
  Relaxation(const Choices& choices, std::int64_t budget) : choices_(choices) {
    std::vector<Upgrade> upgrades;
    std::vector<std::size_t> chosen;
    std::int64_t left = budget;
    for (std::size_t layer = 0; layer < choices.layers; ++layer) {
      const std::vector<std::size_t> hull = hull_of(choices, layer);
      chosen.push_back(hull.front());
      left -= choices.cost_of(layer, hull.front());
      for (std::size_t i = 1; i < hull.size(); ++i)
        upgrades.push_back({slope(layer, hull[i - 1], hull[i]), layer, hull[i]});
    }
    std::ranges::stable_sort(upgrades, std::ranges::greater(), &Upgrade::slope);
    for (const Upgrade& upgrade : upgrades) {
      const std::int64_t more = choices.cost_of(upgrade.layer, upgrade.option) -
                                choices.cost_of(upgrade.layer, chosen[upgrade.layer]);
      if (more > left) {
        if (!broke_) bound_.lambda = upgrade.slope;
        broke_ = true;  // a later one may still fit: a better choice, the same dual
        continue;
      }
      left -= more;
      chosen[upgrade.layer] = upgrade.option;
    }
    Sum dual;
    Sum gain;
    dual.add(bound_.lambda * static_cast<double>(budget));
    for (std::size_t layer = 0; layer < choices.layers; ++layer) {
      best_.push_back(-kInfinity);
      for (std::size_t option = 0; option < choices.options; ++option)
        best_.back() = std::max(best_.back(), reduced(layer, option));
      dual.add(best_.back());
      gain.add(choices.gain_of(layer, chosen[layer]));
      size_ += std::abs(best_.back()) + bound_.lambda * static_cast<double>(budget);
    }
    bound_.value = dual.total();
    gain_ = gain.total();
  }

  const AllocateBound& bound() const { return bound_; }

  // Whether some choice as good as the best known may take this option.
  bool possible(std::size_t layer, std::size_t option) const {
    return best_[layer] - reduced(layer, option) <= bound_.value - gain_ + kTolerance * size_;
  }

 private:
  double slope(std::size_t layer, std::size_t from, std::size_t to) const {
    return (choices_.gain_of(layer, to) - choices_.gain_of(layer, from)) /
           static_cast<double>(choices_.cost_of(layer, to) - choices_.cost_of(layer, from));
  }
  double reduced(std::size_t layer, std::size_t option) const {
    return choices_.gain_of(layer, option) -
           bound_.lambda * static_cast<double>(choices_.cost_of(layer, option));
  }

  const Choices& choices_;
  AllocateBound bound_;
  bool broke_ = false;
  double gain_ = 0.0;
  double size_ = 0.0;         // of the numbers that were added, for the rounding of their sum
  std::vector<double> best_;  // of each layer, the largest gain - lambda * cost
};

struct Option {
  std::size_t cost;
  double gain;
  std::size_t index;
};

// A layer's options that can be part of the answer, in order of index.
std::vector<Option> candidates(const Choices& choices, const Relaxation& relaxation,
                               std::size_t layer) {
  std::vector<Option> kept;
  for (std::size_t option = 0; option < choices.options; ++option) {
    const double gain = choices.gain_of(layer, option);
    const std::int64_t cost = choices.cost_of(layer, option);
    bool dominated = false;
    for (std::size_t other = 0; other < choices.options && !dominated; ++other) {
      const double its_gain = choices.gain_of(layer, other);
      const std::int64_t its_cost = choices.cost_of(layer, other);
      dominated = its_gain >= gain && its_cost <= cost &&
                  (its_gain > gain || its_cost < cost || other < option);
    }
    if (!dominated && relaxation.possible(layer, option))
      kept.push_back({static_cast<std::size_t>(cost), gain, option});
  }
  return kept;
}

// row[w] = max(row[w], behind[w - cost] + gain) for every option and every w in [from, to).
template <std::size_t kOptions>
void raise(double* row, const double* behind, const Option* options, std::size_t from,
           std::size_t to) {
  std::array<double, kOptions> gain;
  std::array<std::size_t, kOptions> cost;
  for (std::size_t i = 0; i < kOptions; ++i) {
    gain[i] = options[i].gain;
    cost[i] = options[i].cost;
  }
  for (std::size_t w = from; w < to; ++w) {
    double best = row[w];
    for (std::size_t i = 0; i < kOptions; ++i) {
      const double sum = behind[w - cost[i]] + gain[i];
      best = sum > best ? sum : best;
    }
    row[w] = best;
  }
}

// row[w]: the most gain of a layer and those behind it for cost <= w; `behind` is the next one's.
void best_row(const std::vector<Option>& options, std::span<const double> behind,
              std::span<double> row) {
  constexpr std::size_t kBlock = 2048;  // of the row, so that it stays in the first-level cache
  constexpr std::size_t kTogether = 4;  // options for one load and store of the row
  for (std::size_t block = 0; block < row.size(); block += kBlock) {
    const std::size_t end = std::min(block + kBlock, row.size());
    std::ranges::fill(row.subspan(block, end - block), -kInfinity);
    std::size_t i = 0;
    for (; i + kTogether <= options.size(); i += kTogether) {
      const std::span some(&options[i], kTogether);
      const std::size_t all = std::max(block, std::ranges::max(some, {}, &Option::cost).cost);
      for (const Option& option : some)
        raise<1>(row.data(), behind.data(), &option, std::max(block, option.cost),
                 std::min(all, end));
      raise<kTogether>(row.data(), behind.data(), some.data(), all, end);
    }
    for (; i < options.size(); ++i)
      raise<1>(row.data(), behind.data(), &options[i], std::max(block, options[i].cost), end);
  }
}

}  // namespace

AllocateBound allocate_bound(const Choices& choices, std::int64_t budget) {
  check(choices, budget);
  return Relaxation(choices, budget).bound();
}

void allocate(const Choices& choices, std::int64_t budget, const Poll& poll,
              std::span<std::int64_t> index) {
  check(choices, budget);
  check_length("index", index.size(), "layers", choices.layers);
  Ticker ticker(poll);
  const Relaxation relaxation(choices, budget);
  std::vector<std::vector<Option>> options;
  std::int64_t most = 0;
  for (std::size_t layer = 0; layer < choices.layers; ++layer) {
    options.push_back(candidates(choices, relaxation, layer));
    most += static_cast<std::int64_t>(std::ranges::max(options.back(), {}, &Option::cost).cost);
  }
  const auto width = static_cast<std::size_t>(std::min(budget, most)) + 1;
  if (width > std::numeric_limits<std::ptrdiff_t>::max() / sizeof(double) / (choices.layers + 1))
    throw std::invalid_argument("the budget must be small enough for a table, got " +
                                std::to_string(budget));
  // Not a vector: that would write every page once more than needed.
  const auto table = std::make_unique_for_overwrite<double[]>((choices.layers + 1) * width);
  const auto row = [&](std::size_t layer) { return std::span(&table[layer * width], width); };
  std::ranges::fill(row(choices.layers), 0.0);
  for (std::size_t layer = choices.layers; layer-- > 0;) {
    ticker.tick(static_cast<std::int64_t>(choices.layers - layer));
    best_row(options[layer], row(layer + 1), row(layer));
  }
  // Rows ascend, so the first cost with the full gain is the least.
  const auto first = row(0);
  auto left =
      static_cast<std::size_t>(std::ranges::lower_bound(first, first.back()) - first.begin());
  for (std::size_t layer = 0; layer < choices.layers; ++layer) {
    const auto found = std::ranges::find_if(options[layer], [&](const Option& option) {
      return option.cost <= left &&
             row(layer + 1)[left - option.cost] + option.gain == row(layer)[left];
    });
    if (found == options[layer].end()) throw std::logic_error("the table lost its choice");
    index[layer] = static_cast<std::int64_t>(found->index);
    left -= found->cost;
  }
}

}  // namespace floe::masks
