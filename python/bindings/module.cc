// splitfuse._core: registers, nothing more.
#include "bindings.h"

PYBIND11_MODULE(_core, module) {
  module.doc() = "The native engine of splitfuse.";
  module.attr("__version__") = splitfuse::version();
  register_errors(module);
  register_config(module);
  register_weights(module);
  register_engine(module);
  register_testing(module);
  register_engine_testing(module);
  register_experts_testing(module);
  register_bench(module);
}
