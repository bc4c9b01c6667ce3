// floe._native: the mask solvers for Python. Arrays come and go without a copy, the interpreter is
// free while a solver runs, and Ctrl-C ends one. Needs numpy, not torch.
#include "bindings/native.h"

#include <cstdint>
#include <stdexcept>
#include <string>

#include "bindings/native_choice.h"
#include "masks/allocate.h"
#include "masks/knapsack.h"
#include "masks/refine.h"
#include "masks/two_class.h"

namespace floe::bindings {

using namespace pybind11::literals;

namespace {

template <typename Solution>
py::dict totals(const Solution& solution) {
  return py::dict("value"_a = solution.value, "cost"_a = solution.cost,
                  "masked_value"_a = solution.masked_value, "masked_cost"_a = solution.masked_cost);
}

py::dict solve_two_class(const Numbers& head_value, const Numbers& neuron_value, double head_cost,
                         double neuron_cost, double budget, bool literal) {
  Flags head_mask(head_value.size());
  Flags neuron_mask(neuron_value.size());
  const auto heads = view(head_value);
  const auto neurons = view(neuron_value);
  const auto heads_out = writable(head_mask);
  const auto neurons_out = writable(neuron_mask);
  const masks::Poll poll = poll_of(py::none());
  const auto reading = literal ? masks::Reading::kLiteral : masks::Reading::kRetain;
  const masks::TwoClassSolution solution = [&] {
    const py::gil_scoped_release release;
    return masks::solve_two_class(heads, neurons, head_cost, neuron_cost, budget, reading, poll,
                                  heads_out, neurons_out);
  }();
  py::dict result = totals(solution);
  result["head_mask"] = head_mask;
  result["neuron_mask"] = neuron_mask;
  result["upper_bound"] = solution.upper_bound;
  result["lambda"] = solution.lambda;
  return result;
}

py::dict solve_knapsack(const Numbers& value, const Numbers& cost, double budget,
                        std::int64_t max_nodes, double seconds, const py::object& progress) {
  Flags mask(value.size());
  const auto values = view(value);
  const auto costs = view(cost);
  const auto out = writable(mask);
  const masks::KnapsackLimits limits{max_nodes, seconds, poll_of(progress)};
  const masks::KnapsackSolution solution = [&] {
    const py::gil_scoped_release release;
    return masks::solve_knapsack(values, costs, budget, limits, out);
  }();
  py::dict result = totals(solution);
  result["mask"] = mask;
  result["upper_bound"] = solution.upper_bound;
  result["lambda"] = solution.lambda;
  result["optimal"] = solution.optimal;
  result["nodes"] = solution.nodes;
  return result;
}

masks::Pairs pairs_from(const std::string& name) {
  if (name == "same_layer_cross") return masks::Pairs::kSameLayerCross;
  if (name == "same_layer") return masks::Pairs::kSameLayer;
  if (name == "all") return masks::Pairs::kAll;
  throw std::invalid_argument("pairs must be 'same_layer_cross', 'same_layer' or 'all', got '" +
                              name + "'");
}

py::dict refine(const Numbers& value, const Numbers& cost, double budget, const Flags& start,
                std::int64_t layers, std::int64_t heads, std::int64_t neurons,
                const std::string& pairs, bool literal, std::int64_t max_moves,
                const py::object& progress) {
  Flags mask = copy_of(start);
  const auto values = view(value);
  const auto costs = view(cost);
  const auto out = writable(mask);
  const masks::Layout layout{layers, heads, neurons};
  const masks::RefineOptions options{pairs_from(pairs), literal, max_moves, poll_of(progress)};
  const masks::RefineSolution solution = [&] {
    const py::gil_scoped_release release;
    return masks::refine(values, costs, budget, layout, options, out);
  }();
  py::dict result = totals(solution);
  result["mask"] = mask;
  result["repairs"] = solution.repairs;
  result["adds"] = solution.adds;
  result["swaps"] = solution.swaps;
  result["converged"] = solution.converged;
  return result;
}

masks::Choices choices_of(const Numbers& gain, const Integers& cost) {
  const auto gains = view(gain, 2);
  const auto costs = view(cost, 2);
  if (gain.shape(0) != cost.shape(0) || gain.shape(1) != cost.shape(1))
    throw std::invalid_argument("gain and cost must have the same shape");
  return {gains, costs, static_cast<std::size_t>(gain.shape(0)),
          static_cast<std::size_t>(gain.shape(1))};
}

Integers allocate(const Numbers& gain, const Integers& cost, std::int64_t budget,
                  const py::object& progress) {
  const masks::Choices choices = choices_of(gain, cost);
  Integers index(gain.shape(0));
  const auto out = writable(index);
  const masks::Poll poll = poll_of(progress);
  {
    const py::gil_scoped_release release;
    masks::allocate(choices, budget, poll, out);
  }
  return index;
}

double allocate_bound(const Numbers& gain, const Integers& cost, std::int64_t budget) {
  return masks::allocate_bound(choices_of(gain, cost), budget).value;
}

py::dict build_info() {
#if defined(__clang__)
  const std::string compiler = "clang " __clang_version__;
#elif defined(__GNUC__)
  const std::string compiler = "gcc " __VERSION__;
#elif defined(_MSC_VER)
  const std::string compiler = "msvc " + std::to_string(_MSC_VER);
#else
  const std::string compiler = "unknown";
#endif
  return py::dict("compiler"_a = compiler, "cpp_standard"_a = static_cast<long>(__cplusplus),
                  "pybind11"_a = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(
                      PYBIND11_VERSION_MINOR));
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "floe's mask solvers; see floe.selection.masks for the documented interface.";
  // std::invalid_argument becomes ValueError.
  m.def("solve_two_class", &solve_two_class, "head_value"_a.noconvert(),
        "neuron_value"_a.noconvert(), "head_cost"_a, "neuron_cost"_a, "budget"_a, "literal"_a);
  m.def("solve_knapsack", &solve_knapsack, "value"_a.noconvert(), "cost"_a.noconvert(), "budget"_a,
        "max_nodes"_a, "seconds"_a, "progress"_a);
  m.def("refine", &refine, "value"_a.noconvert(), "cost"_a.noconvert(), "budget"_a,
        "start"_a.noconvert(), "layers"_a, "heads"_a, "neurons"_a, "pairs"_a, "literal"_a,
        "max_moves"_a, "progress"_a);
  m.def("allocate", &allocate, "gain"_a.noconvert(), "cost"_a.noconvert(), "budget"_a,
        "progress"_a);
  m.def("allocate_bound", &allocate_bound, "gain"_a.noconvert(), "cost"_a.noconvert(), "budget"_a);
  bind_choice(m);
  m.def("build_info", &build_info);
}

}  // namespace floe::bindings
