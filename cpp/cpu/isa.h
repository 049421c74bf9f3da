// The ladder of instruction sets that the CPU backend has kernels for.
#pragma once

#include <cstdint>
#include <string>

namespace splitfuse {

/// Each rung implies those below it: a table of functions starts at kRef, and every rung up to the chosen one
/// replaces the entries it improves. Not so kAvxVnni, which a processor with AVX-512 may lack: its entries are its own
/// alone. There are two ladders above kRef, and a machine can run rungs of one. A place kept for a later rung: AMX
/// after kAvx512Bf16.
enum class Isa : uint8_t { kRef, kAvx2, kAvxVnni, kAvx512, kAvx512Vnni, kAvx512Bf16, kNeon, kNeonBf16, kNeonI8mm };

/// "ref"; "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16"; "neon" (with dot products), "neon_bf16",
/// "neon_i8mm".
const char* isa_name(Isa isa);

/// True if this processor and its operating system can run the rung.
bool isa_available(Isa isa);

/// The rung of that name. "auto" is the best one available, or the one that the environment variable
/// SPLITFUSE_CPU_ISA names. Throws ConfigError, listing what there is, for a name that is unknown or a rung that
/// is not available here.
Isa isa_from_name(const std::string& name);

}  // namespace splitfuse
