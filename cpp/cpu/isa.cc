#include "cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include <array>
#include <cstdlib>
#include <vector>

#include "base/check.h"
#include "splitfuse/config.h"
#include "splitfuse/types.h"

namespace splitfuse {
namespace {

constexpr std::array kLadder = {Isa::kRef,        Isa::kAvx2, Isa::kAvxVnni,  Isa::kAvx512,  Isa::kAvx512Vnni,
                                Isa::kAvx512Bf16, Isa::kNeon, Isa::kNeonBf16, Isa::kNeonI8mm};
constexpr const char* kOverride = "SPLITFUSE_CPU_ISA";

#if defined(__x86_64__)
/// Not every compiler's __builtin_cpu_supports() knows it.
bool has_avx_vnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 4 & 1) != 0;
}
#endif

Isa best() {
  Isa isa = Isa::kRef;
  for (Isa rung : kLadder) {
    if (isa_available(rung)) isa = rung;
  }
  return isa;
}

Isa named(const std::string& name, const std::string& asked_by) {
  for (Isa rung : kLadder) {
    if (name == isa_name(rung) && isa_available(rung)) return rung;
  }
  std::string have = "auto";
  for (const std::string& isa : cpu_isas()) have += ", " + isa;
  bool known = false;
  for (Isa rung : kLadder) known |= name == isa_name(rung);
  throw ConfigError(cat(asked_by, ": ",
                        known ? "this machine cannot run the instruction set '" : "no instruction set '", name,
                        "'; choose one of: ", have));
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kRef:
      return "ref";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvxVnni:
      return "avx_vnni";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Vnni:
      return "avx512_vnni";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kNeon:
      return "neon";
    case Isa::kNeonBf16:
      return "neon_bf16";
    case Isa::kNeonI8mm:
      return "neon_i8mm";
  }
  return "?";
}

bool isa_available(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  switch (isa) {
    case Isa::kRef:
      return true;
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvxVnni:
      return avx2 && has_avx_vnni();
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx512Vnni:
      return vnni;
    case Isa::kAvx512Bf16:
      return vnni && __builtin_cpu_supports("avx512bf16");
    default:
      return false;
  }
#elif defined(__aarch64__)
  const bool neon = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;   // its dot products; the rest every one has
  const bool bf16 = neon && (getauxval(AT_HWCAP2) & HWCAP2_BF16) != 0;
  const bool i8mm = bf16 && (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0;
  return isa == Isa::kRef || (isa == Isa::kNeon && neon) || (isa == Isa::kNeonBf16 && bf16) ||
         (isa == Isa::kNeonI8mm && i8mm);
#else
  return isa == Isa::kRef;
#endif
}

Isa isa_from_name(const std::string& name) {
  if (name != "auto") return named(name, "isa");
  const char* forced = std::getenv(kOverride);
  if (forced == nullptr || *forced == '\0' || std::string(forced) == "auto") return best();
  return named(forced, kOverride);
}

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (Isa rung : kLadder) {
    if (isa_available(rung)) names.emplace_back(isa_name(rung));
  }
  return names;
}

}  // namespace splitfuse
