// Arithmetic as specified by srpo_kernels/optim/reference.py: the same bits on CPU and GPU.
//
// Every operation is one IEEE operation, so the compiler must not contract (-ffp-contract=off, -fmad=false). Functions
// of F and U take float and uint32_t or, on the CPU, vectors of them, so there are selects instead of branches. Values
// are passed as bit patterns (U) where the specification speaks of patterns.
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
constexpr int kDrawn = 16;    // elements that share a Philox counter

enum class Weights { kFp32, kSplit32, kSplit24, kBf16Sr };
enum class Moments { kFp32, kM4, kM3, kM2 };
enum class Gradient { kFp32, kFp16, kBf16 };

// What is one number per parameter and step.
struct Scalars {
  float rate, decay, eps, rate1, beta2, rate2, root;
};

template <class F>
struct Moved {
  F first, second, direction;
};

template <class F>
struct Advanced {
  F weight, first, second, update;
};

// The type of numbers that goes with one of patterns, and the other way round.
template <class T>
struct Other;
template <>
struct Other<float> {
  using Type = uint32_t;
};
template <>
struct Other<uint32_t> {
  using Type = float;
};

template <class F>
HD typename Other<F>::Type bits_of(F x) {
  typename Other<F>::Type bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

template <class U>
HD typename Other<U>::Type float_of(U bits) {
  typename Other<U>::Type x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// One number in every lane, loaded: GCC would make it anew from an immediate wherever vectors need it, which is slower.
template <uint32_t kValue>
static constexpr uint32_t kStored = kValue;
template <uint32_t kValue, class U>
HD U constant() {
#if defined(__x86_64__) && !defined(__CUDACC__)
  if constexpr (sizeof(U) > 16) {
    U x;
    asm("vpbroadcastd %1, %0" : "=v"(x) : "m"(kStored<kValue>));
    return x;
  }
#endif
  return U{} + kValue;
}

// Numbers below 2^23: adding 2^23 leaves them in the low bits.
template <class U>
HD typename Other<U>::Type float_of_integer(U x) {
  return float_of(x | 0x4B000000u) - 0x1p23f;
}
template <class F>
HD F rounded(F x) {
  return x + 0x1p23f - 0x1p23f;
}
template <class F>
HD typename Other<F>::Type integer_of(F x) {
  return bits_of(x + 0x1p23f) & 0x7FFFFFu;
}

// The IEEE square root; the loop becomes one instruction.
template <class F>
HD F square_root(F x) {
  if constexpr (sizeof(F) == sizeof(float)) {
    x = std::sqrt(x);
  } else {
    for (unsigned i = 0; i < sizeof(F) / sizeof(float); ++i) x[i] = std::sqrt(x[i]);
  }
  return x;
}

// --- one step ------------------------------------------------------------------------------------

// `base` to the power `exponent` < 2^24, by squaring: no library's pow, whose bits differ.
HD double power_of(double base, int64_t exponent) {
  double power = 1, square = base;
  for (int bit = 0; exponent >> bit; ++bit) {
    power = exponent >> bit & 1 ? power * square : power;
    square *= square;
  }
  return power;
}

HD Scalars scalars(int64_t step, double lr, double beta1, double beta2, double eps, double weight_decay) {
  return {float(lr / (1 - power_of(beta1, step))),
          float(lr * weight_decay),
          float(eps),
          float(1 - beta1),
          float(beta2),
          float(1 - beta2),
          float(1 / std::sqrt(1 - power_of(beta2, step)))};
}

// The moments, and the direction that they give.
template <class F>
HD Moved<F> move_moments(F gradient, float coefficient, F first, F second, const Scalars& s) {
  const F scaled = gradient * coefficient;
  first = first + (scaled - first) * s.rate1;
  second = second * s.beta2 + (scaled * scaled) * s.rate2;
  return {first, second, first / (square_root(second) * s.root + s.eps)};
}

template <class F>
HD F update_of(F direction, F weight, const Scalars& s) {
  return s.rate * direction + s.decay * weight;
}

template <class F>
HD Advanced<F> advance(F gradient, float coefficient, F weight, F first, F second, const Scalars& s) {
  const Moved<F> moved = move_moments(gradient, coefficient, first, second, s);
  const F update = update_of(moved.direction, weight, s);
  return {weight - update, moved.first, moved.second, update};
}

// --- random bits ---------------------------------------------------------------------------------

constexpr uint32_t kWeightStream = 0x41444157, kSecondStream = 0x41444158;

struct Keys {
  uint64_t round[7][2];
};

HD Keys keys_of(uint64_t seed) {
  Keys keys{};
  for (uint32_t round = 0; round < 7; ++round) {
    keys.round[round][0] = uint32_t(seed) + round * 0x9E3779B9u;
    keys.round[round][1] = uint32_t(seed >> 32) + round * 0xBB67AE85u;
  }
  return keys;
}

// Words are the low halves of T: 64 bits, or vectors of them.
template <class T>
struct Drawn {
  T word[4];
};

// Philox4x32-7 of counter (low, high, step, stream); `wide` multiplies the word of a T by another one.
template <class T, class Wide>
HD Drawn<T> philox(T low, T high, uint32_t step, uint32_t stream, const Keys& keys, const Wide& wide) {
  T c0 = low, c1 = high, c2 = T{} + step, c3 = T{} + stream;
  for (const auto& key : keys.round) {
    const T p0 = wide(c0, 0xD2511F53u), p1 = wide(c2, 0xCD9E8D57u);
    c0 = (p1 >> 32) ^ c1 ^ key[0];
    c2 = (p0 >> 32) ^ c3 ^ key[1];
    c1 = p1;
    c3 = p0;
  }
  return {{c0, c1, c2, c3}};
}

// --- rounding and weights ------------------------------------------------------------------------

constexpr uint32_t kInfinity = 0x7F800000;

// The pattern of x plus `random`, which has as many bits as are to be dropped: those above them are x rounded up in
// magnitude with the probability of what is dropped.
template <class F, class U>
HD U carried(F x, U random) {
  const U bits = bits_of(x), sum = bits + random, infinity = constant<kInfinity, U>();
  const U kept = (sum & infinity) == infinity ? bits : sum;
  return x != x ? constant<0x7FC00000u, U>() : kept;
}

// The pattern without its `dropped` lowest bits, so rounded.
template <class F, class U>
HD U round_down_bits(F x, U random, int dropped) {
  const uint32_t mask = (1u << dropped) - 1;
  return carried(x, random & mask) & ~mask;
}

// What has the bf16 half in its upper half, to nearest with ties away from zero. The remainder is the lower half of the
// pattern as a signed number, and adding it to the upper half gives the pattern back.
template <class U>
HD U upper_half(U bits) {
  return (bits + 0x8000u) & 0xFFFF0000u;
}

// What has fp32 rounded to bf16, nearest even, in its upper half; the first for any pattern but a NaN's.
template <class U>
HD U nearest_number(U bits) {
  return bits + constant<0x7FFFu, U>() + (bits >> 16 & constant<1, U>());
}
template <class F>
HD typename Other<F>::Type nearest_half(F x) {
  using U = typename Other<F>::Type;
  return x != x ? constant<0x7FC00000u, U>() : nearest_number(bits_of(x));
}

// fp16 in the upper half.
template <class U>
HD typename Other<U>::Type from_fp16(U bits) {
  const U sign = bits & 0x80000000u, magnitude = bits >> 3 & 0x0FFFE000u;
  const U subnormal = bits_of(float_of_integer(bits >> 16 & 0x3FFu) * 0x1p-24f);
  const U found = magnitude < 1u << 23 ? subnormal : magnitude + (112u << 23);
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
template <class F>
HD typename Other<F>::Type to_e4m3(F x) {
  using U = typename Other<F>::Type;
  const U bits = bits_of(x), magnitude = bits & 0x7FFFFFFFu;
  // Adding 2^14 leaves multiples of 2^-9, the subnormal step, in the low bits.
  const U subnormal = bits_of(float_of(magnitude) + 0x1p14f) - (141u << 23);
  // Below 2^-6 this wraps around and is not taken.
  const U rounded = (magnitude + 0x7FFFFu + (magnitude >> 20 & 1u) - (120u << 23)) >> 20;
  U code = magnitude < 121u << 23 ? subnormal : rounded > 0x7Eu ? 0x7Eu : rounded;
  code = magnitude > kInfinity ? 0x7Fu : code;
  return code | (bits >> 24 & 0x80u);
}

template <class U>
HD typename Other<U>::Type from_e4m3(U code) {
  const U sign = (code & 0x80u) << 24, magnitude = code & 0x7Fu;
  const U subnormal = bits_of(float_of_integer(magnitude & 7u) * 0x1p-9f);
  const U found = magnitude < 8u ? subnormal : (magnitude << 20) + (120u << 23);
  return float_of(sign | (magnitude == 0x7Fu ? 0x7FC00000u : found));
}

// What code q stands for at scale 1: (q / 255)^8.
template <class F>
HD F eighth(F code) {
  const F x = code * float(1.0 / 255.0);
  const F square = x * x, fourth = square * square;
  return fourth * fourth;
}

// The eighth root, which may be rounded in any way.
template <class F>
HD F eighth_root(F n) {
#ifdef __CUDA_ARCH__
  for (int i = 0; i < 3; ++i) asm("sqrt.approx.f32 %0, %0;" : "+f"(n));
  return n;
#else
  return square_root(square_root(square_root(n)));
#endif
}

// Code of n in [0, 1], up with the probability that keeps the mean; `random` has 16 bits.
template <class F>
HD typename Other<F>::Type to_root(F n, typename Other<F>::Type random) {
  const F root = eighth_root(n) * 255.0f + 0.25f;
  const F near = rounded(root < 255.0f ? root : 255.0f);  // the code at or below n, or the next one
  const F value = eighth(near), other = value > n ? near - 1.0f : near + 1.0f, another = eighth(other);
  const F lower = near < other ? near : other, below = near < other ? value : another;
  const F gap = (near < other ? another : value) - below;
  const F chance = (float_of_integer(random) + 0.5f) * 0x1p-16f;
  const F code = chance * gap < n - below ? lower + 1.0f : lower, least = n > 0.0f ? F{} + 1.0f : F{};
  const F kept = code > least ? code : least;
  return integer_of(kept < 255.0f ? kept : 255.0f);
}

template <class U>
HD typename Other<U>::Type from_root(U code) {
  return eighth(float_of_integer(code));
}

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
