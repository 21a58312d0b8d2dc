// Arithmetic of one element, as specified by srpo_kernels/optim/reference.py: the same bits on CPU and GPU.
//
// Every operation is one IEEE operation, so the compiler must not contract (-ffp-contract=off, -fmad=false). There are
// selects instead of branches, so that loops over these functions vectorise. Values are passed as bit patterns where
// the specification speaks of patterns.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define HD __host__ __device__ __forceinline__
#else
#define HD [[gnu::always_inline]] inline
#endif

namespace srpo {

constexpr int kBlock = 128;   // elements of a row that share a scale
constexpr int kChunk = 1024;  // elements of a row whose squares are added in fp32
constexpr int kBins = 32;     // of an exact sum

enum class Weights { kFp32, kSplit32, kSplit24, kBf16Sr };
enum class Moments { kFp32, kM4, kM3, kM2 };
enum class Gradient { kFp32, kFp16, kBf16 };

// What is one number per parameter and step.
struct Scalars {
  float lr, decay, eps, rate1, beta2, rate2, correction1, correction2;
};

struct Advanced {
  float weight, first, second, update;
};

HD uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

HD float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// --- one step ------------------------------------------------------------------------------------

// `base` to the power `exponent` < 2^24, by squaring: no library's pow, whose bits differ.
HD double power_of(double base, int64_t exponent) {
  double power = 1, square = base;
  for (int bit = 0; bit < 24; ++bit) {
    power = exponent >> bit & 1 ? power * square : power;
    square *= square;
  }
  return power;
}

HD Scalars scalars(int64_t step, double lr, double beta1, double beta2, double eps, double weight_decay) {
  return {float(lr),
          float(lr * weight_decay),
          float(eps),
          float(1 - beta1),
          float(beta2),
          float(1 - beta2),
          float(1 - power_of(beta1, step)),
          float(std::sqrt(1 - power_of(beta2, step)))};
}

HD Advanced advance(float gradient, float coefficient, float weight, float first, float second, const Scalars& s) {
  const float scaled = gradient * coefficient;
  first = first + (scaled - first) * s.rate1;
  second = second * s.beta2 + (scaled * scaled) * s.rate2;
  const float denominator = std::sqrt(second) / s.correction2 + s.eps;
  const float update = s.lr * ((first / s.correction1) / denominator) + s.decay * weight;
  return {weight - update, first, second, update};
}

// --- random bits ---------------------------------------------------------------------------------

struct Words {
  uint32_t lane[4];
};

// Philox4x32-10 of counter (block, step, stream): the words of elements 4 block to 4 block + 3.
HD Words random_words(uint32_t low, uint32_t high, uint32_t step, uint64_t seed) {
  uint32_t c0 = low, c1 = high, c2 = step, c3 = 0x41444157;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(c0) * 0xD2511F53, p1 = uint64_t(c2) * 0xCD9E8D57;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

// --- rounding and weights ------------------------------------------------------------------------

constexpr uint32_t kInfinity = 0x7F800000;

// The pattern without its `dropped` lowest bits, rounded up in magnitude with the probability of what is dropped.
HD uint32_t round_down_bits(uint32_t bits, uint32_t random, int dropped) {
  const uint32_t mask = (1u << dropped) - 1, magnitude = bits & 0x7FFFFFFF;
  uint32_t rounded = (bits + (random & mask)) & ~mask;
  rounded = (rounded & kInfinity) == kInfinity ? bits & ~mask : rounded;
  rounded = magnitude >= kInfinity ? bits : rounded;
  return magnitude > kInfinity ? 0x7FC00000 : rounded;
}

// The bf16 half, to nearest with ties away from zero; the remainder is the low half as a signed number.
HD uint16_t upper16(uint32_t bits) { return uint16_t((bits + 0x8000) >> 16); }
HD int16_t remainder16(uint32_t bits) { return int16_t(bits); }
HD uint32_t join16(uint16_t upper, int16_t remainder) { return (uint32_t(upper) << 16) + uint32_t(int32_t(remainder)); }

// The same for a pattern whose low byte is zero.
HD int8_t remainder24(uint32_t bits) { return int8_t(uint8_t(bits >> 8)); }
HD uint32_t join24(uint16_t upper, int8_t remainder) {
  return (uint32_t(upper) << 16) + (uint32_t(int32_t(remainder)) << 8);
}

// fp32 to bf16, nearest even.
HD uint16_t nearest16(uint32_t bits) {
  const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return uint16_t((bits & 0x7FFFFFFF) > kInfinity ? 0x7FC0 : rounded);
}

HD float from_bf16(uint16_t bits) { return float_of(uint32_t(bits) << 16); }

HD float from_fp16(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, magnitude = uint32_t(bits & 0x7FFF) << 13;
  const uint32_t normal = magnitude + (112u << 23);
  const uint32_t subnormal = bits_of(float(int32_t(bits & 0x3FF)) * 0x1p-24f);
  const uint32_t found = magnitude < 1u << 23 ? subnormal : normal;
  return float_of(sign | (magnitude >= 31u << 23 ? magnitude | kInfinity : found));
}

// --- moments in blocks ---------------------------------------------------------------------------

// Exponent field of the smallest power of two not below the largest magnitude of a block, given as a pattern.
HD uint32_t scale_field(uint32_t largest) {
  const int32_t field = int32_t(largest + 0x7FFFFF) >> 23;
  return uint32_t(field < 9 ? 9 : field > 253 ? 253 : field);
}

HD float power_of_field(uint32_t field) { return float_of(field << 23); }

// fp32 to e4m3fn, nearest even, what is too large becoming the largest value as in torch's cast.
HD uint8_t to_e4m3(float x) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7FFFFFFF;
  // Adding 2^14 leaves multiples of 2^-9, the subnormal step, in the low bits.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0x1p14f) - (141u << 23);
  // Below 2^-6 this wraps around and is not taken.
  const int32_t rounded = int32_t(magnitude + 0x7FFFF + (magnitude >> 20 & 1) - (120u << 23)) >> 20;
  const int32_t normal = rounded > 0x7E ? 0x7E : rounded;
  int32_t code = int32_t(magnitude) < 121 << 23 ? int32_t(subnormal) : normal;
  code = int32_t(magnitude) > int32_t(kInfinity) ? 0x7F : code;
  return uint8_t(uint32_t(code) | (bits >> 24 & 0x80));
}

HD float from_e4m3(uint8_t code) {
  const uint32_t sign = uint32_t(code & 0x80) << 24, magnitude = code & 0x7F;
  const uint32_t normal = (magnitude << 20) + (120u << 23);
  const uint32_t subnormal = bits_of(float(int32_t(magnitude & 7)) * 0x1p-9f);
  const uint32_t found = magnitude < 8 ? subnormal : normal;
  return float_of(sign | (magnitude == 0x7F ? 0x7FC00000 : found));
}

// What code q stands for at scale 1: (q / 255)^8.
HD float eighth(int32_t code) {
  const float x = float(code) * float(1.0 / 255.0);
  const float square = x * x, fourth = square * square;
  return fourth * fourth;
}

// The eighth root, which may be rounded in any way.
HD float eighth_root(float n) {
#ifdef __CUDA_ARCH__
  for (int i = 0; i < 3; ++i) asm("sqrt.approx.f32 %0, %0;" : "+f"(n));
  return n;
#else
  return std::sqrt(std::sqrt(std::sqrt(n)));
#endif
}

// Code of n in [0, 1], up with the probability that keeps the mean; `random` has 16 bits.
HD uint8_t to_root(float n, uint32_t random) {
  const float root = eighth_root(n) * 255.0f;
  int32_t lower = int32_t(root < 254.0f ? root : 254.0f);  // not negative, so this is floor
  lower -= eighth(lower) > n ? 1 : 0;                      // near a code the root may be one off
  lower += eighth(lower + 1) <= n && lower < 254 ? 1 : 0;
  const float below = eighth(lower), gap = eighth(lower + 1) - below;
  const float chance = (float(int32_t(random)) + 0.5f) * 0x1p-16f;
  const int32_t code = lower + (chance * gap < n - below ? 1 : 0);
  return uint8_t(code < 1 && n > 0 ? 1 : code);
}

HD float from_root(uint8_t code) { return eighth(code); }

// --- exact sums ----------------------------------------------------------------------------------

// What a chunk's sum adds, and to which bin; bin 32 counts the sums that are not finite.
struct Term {
  int bin;
  uint64_t value;
};

HD Term term_of(float sum) {
  const uint32_t bits = bits_of(sum), field = bits >> 23 & 0xFF;
  const uint64_t significand = (bits & 0x7FFFFF) | (field > 0 ? 0x800000u : 0u);
  if (field == 255) return {kBins, 1};
  const uint32_t shift = field > 0 ? field : 1;
  return {int(shift >> 3), significand << (shift & 7)};
}

}  // namespace srpo
