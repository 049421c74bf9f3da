// What the files of the binding share.
#pragma once

#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "splitfuse/splitfuse.h"

void register_errors(pybind11::module_& module);
void register_config(pybind11::module_& module);
void register_weights(pybind11::module_& module);
void register_engine(pybind11::module_& module);
void register_testing(pybind11::module_& module);
void register_engine_testing(pybind11::module_& module);
void register_experts_testing(pybind11::module_& module);
void register_bench(pybind11::module_& module);

/// Sets attributes from keyword arguments; a name the type does not have is a TypeError.
void set_fields(const pybind11::object& self, const pybind11::kwargs& fields);

/// A C++ progress callback that calls `callback` with the GIL held; empty for None.
splitfuse::ProgressFn progress_from(const pybind11::object& callback);

/// What callback_source() takes from Python: an array, or the tuple of a matrix of integers. `keep` holds the memory.
/// Throws CheckpointError, naming the tensor.
splitfuse::TensorView view_of(const std::string& name, const pybind11::object& given,
                              std::vector<pybind11::array>& keep);
