// Activations in portable scalar code, for the reference GEMMs.
#pragma once

#include "splitfuse/types.h"

namespace splitfuse {

/// act(x). kSwigluClamped has no meaning here.
float activated(Activation activation, float x);
/// act(gate) * up, or what else a gated linear makes of the two.
float gated(Activation activation, float gate, float up);

}  // namespace splitfuse
