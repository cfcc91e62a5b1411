#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace corematching {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool (*runs_here)();
};

bool always() { return true; }

#if defined(__x86_64__)
// Bits of CPUID and of XCR0, as in Intel's Software Developer's Manual.
constexpr unsigned bit(int n) { return 1u << n; }

constexpr unsigned kFma = bit(12), kMovbe = bit(22), kPopcnt = bit(23);  // leaf 1, ecx
constexpr unsigned kOsxsave = bit(27), kF16c = bit(29);
constexpr unsigned kLzcnt = bit(5);                                 // leaf 0x80000001, ecx
constexpr unsigned kBmi1 = bit(3), kAvx2 = bit(5), kBmi2 = bit(8);  // leaf 7, ebx
constexpr unsigned kAvx512F = bit(16), kAvx512Dq = bit(17), kAvx512Cd = bit(28);
constexpr unsigned kAvx512Bw = bit(30), kAvx512Vl = bit(31);
constexpr unsigned kAmxBf16 = bit(22), kAmxTile = bit(24);  // leaf 7, edx
constexpr unsigned kAvx512Fp16 = bit(23);                   // leaf 7, edx
constexpr unsigned kAvx512Bf16 = bit(5);                    // leaf 7.1, eax
constexpr unsigned kYmmState = 0x6, kZmmState = 0xe6, kTileState = 0x60000;

struct Leaf {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Leaf read_leaf(unsigned leaf, unsigned subleaf = 0) {
  Leaf found;
  __get_cpuid_count(leaf, subleaf, &found.eax, &found.ebx, &found.ecx, &found.edx);
  return found;
}

bool has_all(unsigned found, unsigned wanted) { return (found & wanted) == wanted; }

// Whether the operating system saves these registers.
bool saves(unsigned state) {
  if (!has_all(read_leaf(1).ecx, kOsxsave)) return false;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return has_all(low, state);
}

bool has_avx2() {
  return saves(kYmmState) && has_all(read_leaf(1).ecx, kFma | kF16c | kMovbe | kPopcnt) &&
         has_all(read_leaf(0x80000001).ecx, kLzcnt) &&
         has_all(read_leaf(7).ebx, kAvx2 | kBmi1 | kBmi2);
}

bool has_avx512() {
  constexpr unsigned kAll = kAvx512F | kAvx512Dq | kAvx512Cd | kAvx512Bw | kAvx512Vl;
  return has_avx2() && saves(kZmmState) && has_all(read_leaf(7).ebx, kAll);
}

// From Sapphire Rapids on, Intel's vdpbf16ps takes as long as two products of floats or longer:
// bfloat16 widened to floats is faster there. AMD's processors have no AVX512-FP16.
bool widens_bf16() { return has_all(read_leaf(7).edx, kAvx512Fp16); }

bool has_avx512bf16() { return has_avx512() && has_all(read_leaf(7, 1).eax, kAvx512Bf16); }

#if defined(COREMATCHING_EMULATE_TILES)
bool has_amx() { return has_avx512bf16(); }
#elif defined(__linux__)
bool has_amx() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return has_avx512bf16() && saves(kTileState) && has_all(read_leaf(7).edx, kAmxBf16 | kAmxTile) &&
         syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#else
bool has_amx() { return false; }
#endif
#endif

const Candidate kCandidates[] = {
#if defined(COREMATCHING_HAS_AMX)
    {&kernels_amx, has_amx},
#endif
#if defined(COREMATCHING_HAS_AVX512BF16)
    {&kernels_avx512bf16, has_avx512bf16},
#endif
#if defined(COREMATCHING_HAS_AVX512)
    {&kernels_avx512, has_avx512},
#endif
#if defined(COREMATCHING_HAS_AVX2)
    {&kernels_avx2, has_avx2},
#endif
    {&kernels_portable, always},
};

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Candidate& candidate : kCandidates) names.emplace_back(candidate.kernels->isa);
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Candidate& candidate : kCandidates)
    if (candidate.runs_here()) names.emplace_back(candidate.kernels->isa);
  return names;
}

std::string best_isa() {
  for (const Candidate& candidate : kCandidates) {
#if defined(COREMATCHING_HAS_AVX512BF16) && defined(COREMATCHING_HAS_AVX512)
    if (candidate.kernels == &kernels_avx512bf16 && widens_bf16()) continue;
#endif
    if (candidate.runs_here()) return candidate.kernels->isa;
  }
  return kernels_portable.isa;
}

const Kernels* find(const std::string& isa) {
  for (const Candidate& candidate : kCandidates)
    if (candidate.kernels->isa == isa) return candidate.runs_here() ? candidate.kernels : nullptr;
  return nullptr;
}

}  // namespace corematching
