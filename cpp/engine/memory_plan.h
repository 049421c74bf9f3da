// Decides, before anything large is taken, how every byte of an engine is spent.
#pragma once

#include "backend/backend.h"
#include "splitfuse/config.h"
#include "splitfuse/engine.h"

namespace splitfuse {

/// Budget of the largest forward where token_budget is to be measured.
inline constexpr int32_t kLargestAutoBudget = 512;

/// The plan with the limits it leads to.
struct Sizing {
  MemoryPlan plan;
  StepLimits limits;
};

/// Throws ConfigError for a value out of range, MemoryError (with the plan) if it does not fit.
Sizing size_engine(const ModelConfig& model, const EngineConfig& config, const Backend& backend);

/// Throws ConfigError, naming the field, if a value is out of range.
void validate(const EngineConfig& config, const ModelConfig& model);

}  // namespace splitfuse
