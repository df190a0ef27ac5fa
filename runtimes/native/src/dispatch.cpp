// Chooses a unit once, by what the processor and the operating system support.
#include <stdlib.h>
#include <string.h>
#include "kernels.h"
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__linux__)
#include <sys/auxv.h>
#endif

namespace herd {

#if defined(__x86_64__)
extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512vnni;

static bool has(unsigned leaf, int reg, int bit) {
  unsigned r[4] = {};
  return __get_cpuid_count(leaf, 0, r, r + 1, r + 2, r + 3) && (r[reg] >> bit & 1);
}
static unsigned saved_registers() {   // what the operating system saves when threads change: XCR0
  if (!has(1, 2, 27)) return 0;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}
static bool runs_avx2() { return (saved_registers() & 6) == 6 && has(7, 1, 5) && has(7, 1, 3) && has(7, 1, 8) && has(1, 2, 12) && has(1, 2, 29); }
static bool runs_avx512vnni() {
  return runs_avx2() && (saved_registers() & 0xE6) == 0xE6 && has(7, 1, 16) && has(7, 1, 17) && has(7, 1, 28) && has(7, 1, 30) && has(7, 1, 31) && has(7, 2, 11);
}
static const struct { const Kernels* unit; bool (*runs)(); } kUnits[] = {
  {&kernels_avx512vnni, runs_avx512vnni}, {&kernels_avx2, runs_avx2}, {&kernels_baseline, [] { return true; }},
};
#else
extern const Kernels kernels_neon, kernels_dotprod;

static bool runs_dotprod() {
#if defined(__APPLE__)
  return true;   // every Apple processor that runs arm64 has it
#elif defined(__linux__)
  return getauxval(AT_HWCAP) >> 20 & 1;   // HWCAP_ASIMDDP
#else
  return false;
#endif
}
static const struct { const Kernels* unit; bool (*runs)(); } kUnits[] = {
  {&kernels_dotprod, runs_dotprod}, {&kernels_neon, [] { return true; }},
};
#endif

static const Kernels* choose() {
  const char* wanted = getenv("HERDGRAPH_UNIT");
  for (auto& each : kUnits)
    if (each.runs() && (!wanted || !strcmp(wanted, each.unit->name))) return each.unit;
  return kUnits[sizeof kUnits / sizeof kUnits[0] - 1].unit;
}

const Kernels& kernels() {
  static const Kernels* chosen = nullptr;
  const Kernels* known = __atomic_load_n(&chosen, __ATOMIC_ACQUIRE);
  if (!known) __atomic_store_n(&chosen, known = choose(), __ATOMIC_RELEASE);
  return *known;
}

}  // namespace herd
