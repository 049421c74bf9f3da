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

/// Tokens that the widest attention window of the model sees; 0: all before it, in some layer.
int32_t kv_window(const ModelConfig& model);

/// The KV cache of an engine with `blocks` blocks.
KvShape kv_shape(const ModelConfig& model, const EngineConfig& config, int32_t blocks);

/// Throws ConfigError, naming the field, if a value is out of range.
void validate(const EngineConfig& config, const ModelConfig& model);

}  // namespace splitfuse
