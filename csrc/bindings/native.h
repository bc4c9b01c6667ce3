// What the functions of floe._native share: numpy arrays as spans, and progress.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <span>
#include <stdexcept>
#include <string>

namespace floe::bindings {

namespace py = pybind11;

// Only exactly this type and layout is accepted (see noconvert in native.cpp): conversions belong
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
inline Flags copy_of(const Flags& flags) {
  Flags copy(flags.size());
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(flags.data());
  std::transform(bytes, bytes + flags.size(), copy.mutable_data(),
                 [](std::uint8_t byte) { return byte != 0; });
  return copy;
}

// For the solvers to call now and then without the interpreter's lock: raises what a signal
// handler raised (Ctrl-C), and tells `progress` (a callable or None), which may raise as well.
inline std::function<void(std::int64_t)> poll_of(const py::object& progress) {
  const py::handle callable = progress.is_none() ? nullptr : progress.ptr();
  if (callable && PyCallable_Check(callable.ptr()) == 0)
    throw py::type_error("progress must be a callable or None");
  return [callable](std::int64_t done) {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (callable) callable(done);
  };
}

}  // namespace floe::bindings
