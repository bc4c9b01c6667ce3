// floe._native: the mask solvers for Python. Arrays come and go without a copy, the interpreter is
// free while a solver runs, and Ctrl-C ends one. Needs numpy, not torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <span>
#include <stdexcept>
#include <string>

#include "masks/allocate.h"
#include "masks/knapsack.h"
#include "masks/refine.h"
#include "masks/two_class.h"

namespace floe::bindings {

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

// Only exactly this type and layout is accepted (see noconvert below): conversions belong
// to the caller, who then knows that a copy was made.
using Numbers = py::array_t<double, py::array::c_style>;
using Integers = py::array_t<std::int64_t, py::array::c_style>;
using Flags = py::array_t<bool, py::array::c_style>;

template <typename T>
std::span<const T> view(const py::array_t<T, py::array::c_style>& array,
                        py::ssize_t dimensions = 1) {
  if (array.ndim() != dimensions)
    throw std::invalid_argument("arrays must have " + std::to_string(dimensions) +
                                " dimension(s), got " + std::to_string(array.ndim()));
  if (reinterpret_cast<std::uintptr_t>(array.data()) % alignof(T) != 0)
    throw std::invalid_argument("arrays must be aligned in memory");
  return {array.data(), static_cast<std::size_t>(array.size())};
}

template <typename T>
std::span<T> writable(py::array_t<T, py::array::c_style>& array) {
  return {array.mutable_data(), static_cast<std::size_t>(array.size())};
}

// A copy to write to, every byte of which is a bool; numpy's need not be.
Flags copy_of(const Flags& flags) {
  Flags copy(flags.size());
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(flags.data());
  std::transform(bytes, bytes + flags.size(), copy.mutable_data(),
                 [](std::uint8_t byte) { return byte != 0; });
  return copy;
}

// For the solvers to call now and then without the interpreter's lock: raises what a signal
// handler raised (Ctrl-C), and tells `progress` (a callable or None), which may raise as well.
std::function<void(std::int64_t)> poll_of(const py::object& progress) {
  const py::handle callable = progress.is_none() ? nullptr : progress.ptr();
  if (callable && PyCallable_Check(callable.ptr()) == 0)
    throw py::type_error("progress must be a callable or None");
  return [callable](std::int64_t done) {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (callable) callable(done);
  };
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

py::dict refine(const Numbers& value, const Numbers& cost, double budget, const Flags& start,
                std::int64_t layers, std::int64_t heads, std::int64_t neurons,
                const std::string& pairs, bool literal, std::int64_t max_moves,
                const py::object& progress) {
  Flags mask = copy_of(start);
  const auto values = view(value);
  const auto costs = view(cost);
  const auto out = writable(mask);
  const masks::Layout layout{layers, heads, neurons};
  const masks::RefineOptions options{masks::pairs_from(pairs), literal, max_moves,
                                     poll_of(progress)};
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
  m.doc() = "floe's mask solvers; see floe.selection.masks.determine for the documented interface.";
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
  m.def("build_info", &build_info);
}

}  // namespace floe::bindings
