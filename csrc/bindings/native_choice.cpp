#include "bindings/native_choice.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cstdint>
#include <span>
#include <stdexcept>

#include "masks/block.h"
#include "masks/coupled.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace floe::bindings {
namespace {

using Numbers = py::array_t<double, py::array::c_style>;
using Flags = py::array_t<bool, py::array::c_style>;

std::span<const double> all_of(const Numbers& numbers, py::ssize_t dimensions) {
  if (numbers.ndim() != dimensions)
    throw std::invalid_argument("arrays must have their number of dimensions");
  return {numbers.data(), static_cast<std::size_t>(numbers.size())};
}

void raise_pending_signals() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

py::dict rearrange(const Numbers& gradient, const Numbers& cost, double slack, const Flags& start) {
  Flags mask(start.size());
  std::copy_n(start.data(), start.size(), mask.mutable_data());
  const auto gradients = all_of(gradient, 2);
  const auto costs = all_of(cost, 1);
  const auto samples = static_cast<std::size_t>(gradient.shape(1));
  const std::span<bool> out{mask.mutable_data(), static_cast<std::size_t>(mask.size())};
  const masks::BlockSolution solution = [&] {
    const py::gil_scoped_release release;
    return masks::rearrange(gradients, samples, costs, slack, raise_pending_signals, out);
  }();
  return py::dict("mask"_a = mask, "loss_before"_a = solution.loss_before, "loss"_a = solution.loss,
                  "slack"_a = solution.slack, "swaps"_a = solution.swaps);
}

py::dict keep_layers(const Numbers& matrix, const Numbers& linear, std::int64_t count,
                     std::int64_t max_nodes) {
  Flags kept(linear.size());
  const auto couplings = all_of(matrix, 2);
  const auto gains = all_of(linear, 1);
  const std::span<bool> out{kept.mutable_data(), static_cast<std::size_t>(kept.size())};
  const masks::CoupledLimits limits{max_nodes, raise_pending_signals};
  const masks::CoupledSolution solution = [&] {
    const py::gil_scoped_release release;
    return masks::keep_layers(couplings, gains, count, limits, out);
  }();
  return py::dict("kept"_a = kept, "loss"_a = solution.loss, "lower_bound"_a = solution.lower_bound,
                  "optimal"_a = solution.optimal, "nodes"_a = solution.nodes);
}

}  // namespace

void bind_choice(py::module_& m) {
  m.def("rearrange", &rearrange, "gradient"_a.noconvert(), "cost"_a.noconvert(), "slack"_a,
        "start"_a.noconvert());
  m.def("keep_layers", &keep_layers, "matrix"_a.noconvert(), "linear"_a.noconvert(), "count"_a,
        "max_nodes"_a);
}

}  // namespace floe::bindings
