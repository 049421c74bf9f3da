#include "splitfuse/splitfuse.h"

namespace splitfuse {

const char* version() { return SPLITFUSE_VERSION; }

}  // namespace splitfuse
