// The one place that names the backends.
#pragma once

#include <memory>

#include "backend/backend.h"
#include "splitfuse/config.h"

namespace splitfuse {

/// Throws ConfigError if the device is unknown or absent.
std::unique_ptr<Backend> make_backend(const EngineConfig& config);

}  // namespace splitfuse
