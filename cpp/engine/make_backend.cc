#include "engine/make_backend.h"

#include "base/check.h"

namespace splitfuse {

std::unique_ptr<Backend> make_backend(const EngineConfig& config) {
  if (config.device == "cpu") return make_cpu_backend(config.dtype, config.threads, config.isa, config.pin_threads);
  if (config.device == "cuda") return make_cuda_backend(config.dtype);
  throw ConfigError(cat("device is '", config.device, "', expected 'cpu' or 'cuda'"));
}

}  // namespace splitfuse
