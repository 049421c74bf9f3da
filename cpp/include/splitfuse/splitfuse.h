// splitfuse: continuous batching with Dynamic SplitFuse over a paged KV cache. Include this one.
#pragma once

#include "splitfuse/config.h"
#include "splitfuse/engine.h"
#include "splitfuse/plan.h"
#include "splitfuse/types.h"
#include "splitfuse/weights.h"

namespace splitfuse {

/// "major.minor.patch".
const char* version();

}  // namespace splitfuse
