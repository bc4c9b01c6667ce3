// The solvers that choose by what units and layers cost together; part of floe._native.
#pragma once

#include <pybind11/pybind11.h>

namespace floe::bindings {

void bind_choice(pybind11::module_& m);

}  // namespace floe::bindings
