// floe._native: the mask solvers for Python. Arrays come and go without a copy, the interpreter is
// free while a solver runs, and Ctrl-C ends one. Needs numpy, not torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>

#include "bindings/native_choice.h"
#include "masks/knapsack.h"
#include "masks/refine.h"
#include "masks/two_class.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace floe::bindings {
namespace {

// Only exactly this type and layout is accepted (see noconvert below): conversions belong to the
// caller, who then knows that a copy was made.
using Numbers = py::array_t<double, py::array::c_style>;
using Flags = py::array_t<bool, py::array::c_style>;

std::span<const double> view(const Numbers& numbers) {
  if (numbers.ndim() != 1) throw std::invalid_argument("arrays must be one-dimensional");
  return {numbers.data(), static_cast<std::size_t>(numbers.size())};
}

std::span<bool> writable(Flags& flags) {
  return {flags.mutable_data(), static_cast<std::size_t>(flags.size())};
}

void raise_pending_signals() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

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
  const auto reading = literal ? masks::Reading::kLiteral : masks::Reading::kRetain;
  const masks::TwoClassSolution solution = [&] {
    const py::gil_scoped_release release;
    return masks::solve_two_class(heads, neurons, head_cost, neuron_cost, budget, reading,
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
                        std::int64_t max_nodes, double seconds) {
  Flags mask(value.size());
  const auto values = view(value);
  const auto costs = view(cost);
  const auto out = writable(mask);
  const masks::KnapsackLimits limits{max_nodes, seconds, raise_pending_signals};
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
                const std::string& pairs, bool literal, std::int64_t max_moves) {
  Flags mask(start.size());
  std::copy_n(start.data(), start.size(), mask.mutable_data());
  const auto values = view(value);
  const auto costs = view(cost);
  const auto out = writable(mask);
  const masks::Layout layout{layers, heads, neurons};
  const masks::RefineOptions options{pairs_from(pairs), literal, max_moves, raise_pending_signals};
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
        "max_nodes"_a, "seconds"_a);
  m.def("refine", &refine, "value"_a.noconvert(), "cost"_a.noconvert(), "budget"_a,
        "start"_a.noconvert(), "layers"_a, "heads"_a, "neurons"_a, "pairs"_a, "literal"_a,
        "max_moves"_a);
  bind_choice(m);
  m.def("build_info", &build_info);
}

}  // namespace floe::bindings
