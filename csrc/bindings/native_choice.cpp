#include "bindings/native_choice.h"

#include <cstdint>

#include "bindings/native.h"
#include "masks/block.h"
#include "masks/coupled.h"

namespace floe::bindings {

using namespace pybind11::literals;

namespace {

py::dict rearrange(const Numbers& gradient, const Numbers& cost, double slack, const Flags& start) {
  Flags mask = copy_of(start);
  const auto gradients = view(gradient, 2);
  const auto costs = view(cost);
  const auto samples = static_cast<std::size_t>(gradient.shape(1));
  const auto out = writable(mask);
  const auto poll = poll_of(py::none());
  const masks::BlockSolution solution = [&] {
    const py::gil_scoped_release release;
    return masks::rearrange(gradients, samples, costs, slack, [&] { poll(0); }, out);
  }();
  return py::dict("mask"_a = mask, "loss_before"_a = solution.loss_before, "loss"_a = solution.loss,
                  "slack"_a = solution.slack, "swaps"_a = solution.swaps);
}

py::dict keep_layers(const Numbers& matrix, const Numbers& linear, std::int64_t count,
                     std::int64_t max_nodes) {
  Flags kept(linear.size());
  const auto couplings = view(matrix, 2);
  const auto gains = view(linear);
  const auto out = writable(kept);
  const auto poll = poll_of(py::none());
  const masks::CoupledLimits limits{max_nodes, [&] { poll(0); }};
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
