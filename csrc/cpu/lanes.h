// Vectors of SRPO_BYTES bytes, included once for each instruction set, in a namespace of its own: GCC takes vectors
// that are not native apart. A pair holds 2 kLanes consecutive elements. Woven, lane i has elements 2 i and 2 i + 1: so bf16
// and int16 are split and joined by shifts, without narrowing. Otherwise it has the first half and the second one.
constexpr int kLanes = SRPO_BYTES / 4, kPair = 2 * kLanes;

typedef float Floats [[gnu::vector_size(SRPO_BYTES)]];
typedef uint32_t Words [[gnu::vector_size(SRPO_BYTES)]];
typedef int32_t Integers [[gnu::vector_size(SRPO_BYTES)]];
typedef uint16_t Halves [[gnu::vector_size(SRPO_BYTES)]];
typedef uint64_t Longs [[gnu::vector_size(SRPO_BYTES)]];
typedef uint16_t FewHalves [[gnu::vector_size(SRPO_BYTES / 2)]];
typedef uint8_t FewBytes [[gnu::vector_size(SRPO_BYTES / 2)]];

template <class V>
struct Pair {
  V a, b;
};

template <class V>
HD V load(const void* from) {
  V x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <class V>
HD void store(void* to, V x) {
  std::memcpy(to, &x, sizeof x);
}

// What a pair of numbers of `kSize` bytes will need in 2 KB: the processor follows fewer streams than a step reads.
template <int kSize>
HD void prefetch(const char* at) {
  for (int line = 0; line < kSize * kPair; line += 64) __builtin_prefetch(at + 2048 + line);
}

// Whether any lane may be of 2^127 or more: so are all that rounding could make infinite, infinities and NaNs.
HD bool any_large(Words bits) {
  const Words most = constant<0x7F000000u, Words>(), large = bits & most;
#if !defined(__x86_64__)
  uint32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= large[i] == most[i];
  return found != 0;
#elif SRPO_BYTES == 64
  return _mm512_cmpeq_epi32_mask(reinterpret_cast<__m512i>(large), reinterpret_cast<__m512i>(most)) != 0;
#elif SRPO_BYTES == 32
  return _mm256_movemask_epi8(reinterpret_cast<__m256i>(large == most)) != 0;
#else
  return _mm_movemask_epi8(reinterpret_cast<__m128i>(large == most)) != 0;
#endif
}

// --- shuffles ------------------------------------------------------------------------------------

// Runs of `kRun` lanes from two vectors by turns, the first and the second half of what results; and the way back.
template <int kCount, int kRun, int kHalf>
struct Woven {
  static constexpr int lane(int i) {
    const int run = (i + kHalf * kCount) / kRun;
    return run / 2 * kRun + i % kRun + run % 2 * kCount;
  }
};
template <int kCount, int kOdd>
struct Unwoven {
  static constexpr int lane(int i) { return 2 * i + kOdd; }
};
// Even lanes of the first vector, odd ones of the second.
template <int kCount>
struct Blended {
  static constexpr int lane(int i) { return i + i % 2 * kCount; }
};

// All lanes of the first vector, from `kBy` on and around.
template <int kCount, int kBy>
struct Rotated {
  static constexpr int lane(int i) { return (i + kBy) % kCount; }
};

template <class Order, class V, int... i>
HD V shuffle(V x, V y, std::integer_sequence<int, i...>) {
#ifdef __clang__
  return __builtin_shufflevector(x, y, Order::lane(i)...);
#else
  using Narrow = std::conditional_t<sizeof(V) / sizeof...(i) == 2, Halves, Words>;
  using Places = std::conditional_t<sizeof(V) / sizeof...(i) == 8, Longs, Narrow>;
  return __builtin_shuffle(x, y, Places{Order::lane(i)...});
#endif
}

template <int kRun, class V>
HD Pair<V> weave(V x, V y) {
  constexpr int kCount = sizeof(V) / sizeof(x[0]);
  constexpr std::make_integer_sequence<int, kCount> all{};
  return {shuffle<Woven<kCount, kRun, 0>>(x, y, all), shuffle<Woven<kCount, kRun, 1>>(x, y, all)};
}

template <class V>
HD Pair<V> unweave(V x, V y) {
  constexpr int kCount = sizeof(V) / sizeof(x[0]);
  constexpr std::make_integer_sequence<int, kCount> all{};
  return {shuffle<Unwoven<kCount, 0>>(x, y, all), shuffle<Unwoven<kCount, 1>>(x, y, all)};
}

// --- pairs in memory -----------------------------------------------------------------------------

HD Pair<Floats> floats_of(Pair<Words> bits) { return {float_of(bits.a), float_of(bits.b)}; }
HD Pair<Words> bits_of_pair(Pair<Floats> x) { return {bits_of(x.a), bits_of(x.b)}; }

// Woven 16-bit numbers, of which the caller wants the upper halves of words.
HD Pair<Words> uppers(Words both) { return {both << 16, both & constant<0xFFFF0000u, Words>()}; }
HD Words blend(Words even, Words odd) {
  const Halves x = reinterpret_cast<Halves>(even), y = reinterpret_cast<Halves>(odd);
  return reinterpret_cast<Words>(shuffle<Blended<kPair>>(x, y, std::make_integer_sequence<int, kPair>{}));
}
HD Words join_uppers(Pair<Words> x) { return blend(x.a >> 16, x.b); }
HD Words join_lowers(Pair<Words> x) { return blend(x.a, x.b << 16); }

HD Words load_bytes(const void* from) {
  return reinterpret_cast<Words>(__builtin_convertvector(load<FewBytes>(from), Halves));
}
HD void store_bytes(void* to, Words both) {
  store(to, __builtin_convertvector(reinterpret_cast<Halves>(both), FewBytes));
}

template <bool kWoven>
HD Pair<Words> load_halves(const void* from) {
  if constexpr (kWoven) {
    return uppers(load<Words>(from));
  } else {
    const char* next = static_cast<const char*>(from) + sizeof(FewHalves);
    return {__builtin_convertvector(load<FewHalves>(from), Words) << 16,
            __builtin_convertvector(load<FewHalves>(next), Words) << 16};
  }
}

template <bool kWoven>
HD Pair<Floats> load_floats(const void* from) {
  const Floats x = load<Floats>(from), y = load<Floats>(static_cast<const char*>(from) + sizeof x);
  if constexpr (kWoven) return unweave(x, y);
  return {x, y};
}

template <bool kWoven>
HD void store_floats(void* to, Pair<Floats> x) {
  if constexpr (kWoven) x = weave<1>(x.a, x.b);
  store(to, x.a);
  store(static_cast<char*>(to) + sizeof x.a, x.b);
}

// Gradients are fp32 or bf16 here.
template <bool kWoven>
HD Pair<Floats> load_gradient(const void* from, bool wide) {
  if (wide) [[unlikely]] return load_floats<kWoven>(from);
  return floats_of(load_halves<kWoven>(from));
}

inline void convert(Gradient from_type, const char* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    uint16_t half;
    std::memcpy(&half, from + 2 * i, sizeof half);
    const uint32_t bits = uint32_t(half) << 16;
    to[i] = from_type == Gradient::kFp16 ? from_fp16(bits) : float_of(bits);
  }
}

// The sum of all lanes, in a fixed order.
template <int kHalf = kLanes / 2>
HD float add_lanes(Floats x) {
  if constexpr (kHalf == 0) {
    return x[0];
  } else {
    constexpr std::make_integer_sequence<int, kLanes> all{};
    return add_lanes<kHalf / 2>(x + shuffle<Rotated<kLanes, kHalf>>(x, x, all));
  }
}

HD uint32_t largest_lane(Words x) {
  uint32_t largest = 0;
  for (int i = 0; i < kLanes; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

// --- random bits ---------------------------------------------------------------------------------

// Products of the lower halves of 64 bits and a word, for which GCC takes a multiplication of 64 bits.
HD Longs wide_product(Longs x, uint32_t y) {
  const Longs factor = Longs{} + y;
#if !defined(__x86_64__)
  return (x & 0xFFFFFFFFu) * factor;
#elif SRPO_BYTES == 64
  return reinterpret_cast<Longs>(_mm512_mul_epu32(reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(factor)));
#elif SRPO_BYTES == 32
  return reinterpret_cast<Longs>(_mm256_mul_epu32(reinterpret_cast<__m256i>(x), reinterpret_cast<__m256i>(factor)));
#else
  return reinterpret_cast<Longs>(_mm_mul_epu32(reinterpret_cast<__m128i>(x), reinterpret_cast<__m128i>(factor)));
#endif
}

constexpr int kCounters = SRPO_BYTES / 8, kDraw = kCounters * kDrawn;  // that are drawn at once

template <int... i>
HD Longs counting(std::integer_sequence<int, i...>) {
  return Longs{i...};
}

// The 16 bits of elements [kDrawn * counter, + kDraw) of a stream.
HD void draw(uint64_t counter, uint32_t step, uint32_t stream, const Keys& keys, uint16_t* out) {
  const Longs place = counting(std::make_integer_sequence<int, kCounters>{}) + counter;
  const Drawn<Longs> drawn = philox(place, place >> 32, step, stream, keys, wide_product);
  const Longs low = (drawn.word[0] & 0xFFFFFFFFu) | drawn.word[1] << 32;
  const Longs high = (drawn.word[2] & 0xFFFFFFFFu) | drawn.word[3] << 32;
  const Pair<Longs> plain = weave<1>(low, high);
  const Pair<Longs> rotated = weave<1>(low >> 8 | high << 56, high >> 8 | low << 56);
  constexpr int kHalves = SRPO_BYTES / 2;  // of a vector
  if constexpr (kCounters == 2) {
    store(out, plain.a), store(out + kHalves, rotated.a), store(out + 2 * kHalves, plain.b);
    store(out + 3 * kHalves, rotated.b);
  } else {
    const Pair<Longs> first = weave<2>(plain.a, rotated.a), second = weave<2>(plain.b, rotated.b);
    store(out, first.a), store(out + kHalves, first.b), store(out + 2 * kHalves, second.a);
    store(out + 3 * kHalves, second.b);
  }
}
