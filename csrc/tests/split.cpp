// All 2^32 patterns: splitting and joining keeps what it should, and the bf16 half is the nearest, ties away from zero.
#include <cstdio>

#include "../adamw_math.h"

int main() {
  uint64_t lost = 0, far = 0, drifted = 0;
  for (uint32_t upper = 0; upper < 0x10000; ++upper) {
    uint32_t bad = 0, bad_half = 0;
    for (uint32_t lower = 0; lower < 0x10000; ++lower) {
      const uint32_t bits = upper << 16 | lower;
      const uint32_t half = srpo::upper_half(bits);
      bad += half + uint32_t(int32_t(int16_t(bits))) != bits;
      bad_half += half != (upper + (lower >= 0x8000 ? 1 : 0)) << 16;
    }
    lost += bad;
    far += bad_half;
  }
  // 24 bits: all upper three bytes, each with one low byte and one random byte.
  for (uint32_t top = 0; top < 0x1000000; ++top) {
    const uint32_t mixed = top * 0x9E3779B9u, low = mixed >> 24, random = mixed >> 16 & 0xFF, bits = top << 8 | low;
    if ((bits & srpo::kInfinity) == srpo::kInfinity) continue;
    const bool up = low + random > 0xFF && ((bits + 0x100) & srpo::kInfinity) != srpo::kInfinity;
    const uint32_t rounded = srpo::round_down_bits(srpo::float_of(bits), random, 8), expected = (top + up) << 8;
    const uint32_t rest = uint32_t(int32_t(int8_t(rounded >> 8))) << 8;
    drifted += rounded != expected || srpo::upper_half(rounded) + rest != rounded;
  }
  std::printf("patterns not kept: %llu, halves not nearest: %llu, 24 bits wrong: %llu\n", (unsigned long long)lost,
              (unsigned long long)far, (unsigned long long)drifted);
  return lost || far || drifted;
}
