// A unit's step and squares, included once for each instruction set after lanes.h. A part of a run goes through the
// step a pair at a time. Unless moments are fp32, which takes little arithmetic, weights follow when all moments are
// done: what waits for a division would keep the next divisions out of the processor's window. Only directions, random
// bits and moments that wait for their block's scale are in memory between.
//
// What is [[unlikely]] is as likely elsewhere, but constants stay in registers only in a loop's usual path.

// What runs of elements add up.
struct Sums {
  Floats updates, weights;
  Halves changed;
};

// Values of runs that are more than one chunk, which are added chunk by chunk afterwards.
struct Kept {
  alignas(64) float update[kChunk + kPair], weight[kChunk + kPair];
};

// Where an element is in every tensor.
struct Places {
  char* pointer[kSlots];
};

HD void add_term(float sum, uint64_t* bins) {
  const Term term = term_of(sum);
  bins[term.bin] += term.value;
}

// Adds the squares of rows narrower than a pair, a chunk each: the tree that adds neighbours.
void add_rows(const float* x, int64_t rows, int64_t columns, uint64_t* bins) {
  const int width = 1 << log2_width(columns);
  for (; rows > 0; --rows, x += columns) {
    float tree[kPair] = {};
    for (int i = 0; i < columns; ++i) tree[i] = x[i] * x[i];
    for (int half = width / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) tree[i] = tree[2 * i] + tree[2 * i + 1];
    add_term(tree[0], bins);
  }
}

// --- the step ------------------------------------------------------------------------------------

template <Weights kWeights, Moments kMoments>
struct Stepper {
  static constexpr bool kExact = kMoments == Moments::kFp32, kRoots = kMoments == Moments::kM2;
  static constexpr bool kCodes = kRoots || kMoments == Moments::kM3;
  static constexpr bool kWide = kWeights == Weights::kFp32;  // then gradients are fp32 or converted
  static constexpr bool kWoven = !kWide || !kExact;
  static constexpr bool kRounded = kWeights == Weights::kSplit24 || kWeights == Weights::kBf16Sr;

  static constexpr int kWeightSize = kWide ? 4 : 2;
  static constexpr int kRemainderSize = kWeights == Weights::kSplit32 ? 2 : kWeights == Weights::kSplit24 ? 1 : 0;
  static constexpr int kFirstSize = kExact ? 4 : kCodes ? 1 : 2;
  static constexpr int kSecondSize = kExact ? 4 : kRoots ? 1 : 2;

  // Of an element in every tensor but those of scales; the gradient's is not known here, and there may be no average.
  struct Sizes {
    int gradient, average;
    HD constexpr int of(int slot) const {
      constexpr int kKnown[kSlots] = {kWeightSize, kRemainderSize, 0, kFirstSize, 0, kSecondSize, 0, 0};
      return slot == kGradient ? gradient : slot == kAverage ? average : kKnown[slot];
    }
    HD Places after(Places at, int64_t elements) const {
      for (int slot = 0; slot < kSlots; ++slot) at.pointer[slot] += elements * of(slot);
      return at;
    }
  };

  // Larger parts have fewer ends; smaller ones keep memory busy.
  static constexpr int kPart = kExact ? kChunk : kMoments == Moments::kM4 ? 2 * kBlock : kBlock, kPairs = kPart / kPair;

  // What a part needs besides its tensors.
  struct Part {
    alignas(64) uint16_t weight_random[kChunk + kDraw], second_random[kChunk + kDraw];  // of a run, from a counter's
    alignas(64) float gradient[kPart + kPair];       // converted to fp32
    Pair<Floats> direction[kPairs];                  // of updates
    Pair<Floats> first[kPairs], second[kPairs];      // that wait for their scale
    float first_scale, second_scale;
  };

  HD static Pair<Floats> load_weight(const Places& at) {
    if constexpr (kWide) {
      return load_floats<kWoven>(at.pointer[kWeight]);
    } else {
      const Pair<Words> upper = load_halves<true>(at.pointer[kWeight]);
      if constexpr (kWeights == Weights::kBf16Sr) return floats_of(upper);
      Words both{};
      if constexpr (kWeights == Weights::kSplit32) both = load<Words>(at.pointer[kRemainder]);
      if constexpr (kWeights == Weights::kSplit24) both = load_bytes(at.pointer[kRemainder]) << 8;
      const Integers low = reinterpret_cast<Integers>(both << 16) >> 16, high = reinterpret_cast<Integers>(both) >> 16;
      return floats_of({upper.a + reinterpret_cast<Words>(low), upper.b + reinterpret_cast<Words>(high)});
    }
  }

  // Returns what was stored.
  HD static Pair<Floats> store_weight(const Places& at, Pair<Floats> weight, const uint16_t* random, Sums& sums) {
    if constexpr (kWide) {
      store_floats<kWoven>(at.pointer[kWeight], weight);
      return weight;
    } else {
      Pair<Words> bits = bits_of_pair(weight);
      if constexpr (kRounded) {
        constexpr int kDropped = kWeights == Weights::kSplit24 ? 8 : 16;
        const Words both = load<Words>(random);
        bits = {round_down_bits(weight.a, both & 0xFFFFu, kDropped),
                round_down_bits(weight.b, both >> 16, kDropped)};
      }
      const Words before = load<Words>(at.pointer[kWeight]);
      const Words half = constant<0x8000u, Words>();  // rounds the bf16 half, as `upper_half`
      const Words after = join_uppers({bits.a + half, bits.b + half});
      const Halves differing = reinterpret_cast<Halves>(after ^ before);
      const Halves one = reinterpret_cast<Halves>(constant<0x10001u, Words>());
      sums.changed += differing < one ? differing : one;
      store(at.pointer[kWeight], after);
      if constexpr (kWeights == Weights::kSplit32) store(at.pointer[kRemainder], join_lowers(bits));
      if constexpr (kWeights == Weights::kSplit24)
        store_bytes(at.pointer[kRemainder], join_lowers({bits.a >> 8, bits.b >> 8}));
      return floats_of(bits);
    }
  }

  HD static Pair<Floats> load_first(const Places& at, float scale) {
    if constexpr (kExact) return load_floats<kWoven>(at.pointer[kFirst]);
    if constexpr (kMoments == Moments::kM4) return floats_of(load_halves<true>(at.pointer[kFirst]));
    const Words both = load_bytes(at.pointer[kFirst]);
    return {from_e4m3(both & 0xFFFFu) * scale, from_e4m3(both >> 16) * scale};
  }

  HD static Pair<Floats> load_second(const Places& at, float scale) {
    if constexpr (kExact) return load_floats<kWoven>(at.pointer[kSecond]);
    if constexpr (!kRoots) return floats_of(load_halves<true>(at.pointer[kSecond]));
    const Words both = load_bytes(at.pointer[kSecond]);
    return {from_root(both & 0xFFFFu) * scale, from_root(both >> 16) * scale};
  }

  // The moments that bf16 takes at once. What is not finite, or could become so, is rare: one test of all lanes.
  HD static void store_halves(const Places& at, Pair<Floats> first, Pair<Floats> second, const uint16_t* random) {
    constexpr bool kBoth = kMoments == Moments::kM4;
    const Words both = load<Words>(random), even = both & constant<0xFFFFu, Words>(), odd = both >> 16;
    const Pair<Words> m = bits_of_pair(first), v = bits_of_pair(second);
    Pair<Words> nearest{nearest_number(m.a), nearest_number(m.b)}, up{v.a + even, v.b + odd};
    if (any_large(kBoth ? v.a | v.b | m.a | m.b : v.a | v.b)) [[unlikely]] {
      nearest = {nearest_half(first.a), nearest_half(first.b)};
      up = {carried(second.a, even), carried(second.b, odd)};
    }
    if constexpr (kBoth) store(at.pointer[kFirst], join_uppers(nearest));
    store(at.pointer[kSecond], join_uppers(up));
  }

  // The moments of the pair from element `i` of a part on; returns the direction of its update.
  HD static Pair<Floats> move_pair(float coefficient, const Scalars& s, const Places& at, bool wide, Part& part, int i,
                                   int shift) {
    if (wide) [[unlikely]]
      prefetch<4>(at.pointer[kGradient]);
    else
      prefetch<2>(at.pointer[kGradient]);
    prefetch<kFirstSize>(at.pointer[kFirst]);
    prefetch<kSecondSize>(at.pointer[kSecond]);
    const Pair<Floats> gradient = load_gradient<kWoven>(at.pointer[kGradient], wide);
    const Pair<Floats> first = load_first(at, part.first_scale), second = load_second(at, part.second_scale);
    const Moved<Floats> a = move_moments(gradient.a, coefficient, first.a, second.a, s);
    const Moved<Floats> b = move_moments(gradient.b, coefficient, first.b, second.b, s);
    if constexpr (kExact) {
      store_floats<kWoven>(at.pointer[kFirst], {a.first, b.first});
      store_floats<kWoven>(at.pointer[kSecond], {a.second, b.second});
    }
    if constexpr (kMoments == Moments::kM4 || kMoments == Moments::kM3)
      store_halves(at, {a.first, b.first}, {a.second, b.second}, part.second_random + shift + i);
    if constexpr (kCodes) part.first[unsigned(i) / kPair] = {a.first, b.first};
    if constexpr (kRoots) part.second[unsigned(i) / kPair] = {a.second, b.second};
    return {a.direction, b.direction};
  }

  // Its weights. Elements that are not `valid` must change no sum, also where eps is 0.
  HD static void step_pair(bool finite, Pair<Floats> direction, const Scalars& s, const Places& at, const Part& part,
                           int i, int shift, Pair<Words> valid, bool averaging, float average_rate, Sums& sums,
                           float* update_kept, float* weight_kept) {
    prefetch<kWeightSize>(at.pointer[kWeight]);
    prefetch<kRemainderSize>(at.pointer[kRemainder]);
    Pair<Floats> weight = load_weight(at), update{};
    if (finite) [[likely]] {
      const Floats a = update_of(direction.a, weight.a, s), b = update_of(direction.b, weight.b, s);
      update = {float_of(bits_of(a) & valid.a), float_of(bits_of(b) & valid.b)};
      weight = {float_of(bits_of(weight.a - a) & valid.a), float_of(bits_of(weight.b - b) & valid.b)};
      if (averaging) [[unlikely]] {
        const Pair<Floats> average = load_floats<kWoven>(at.pointer[kAverage]);
        store_floats<kWoven>(at.pointer[kAverage], {average.a + (weight.a - average.a) * average_rate,
                                                    average.b + (weight.b - average.b) * average_rate});
      }
      weight = store_weight(at, weight, part.weight_random + shift + i, sums);
    }
    if (update_kept) [[unlikely]] {
      store_floats<kWoven>(update_kept + i, update);
      store_floats<kWoven>(weight_kept + i, weight);
    } else {
      sums.updates += update.a * update.a + update.b * update.b;
      sums.weights += weight.a * weight.a + weight.b * weight.b;
    }
  }

  HD static uint32_t field_of(const Pair<Floats>* x, int pairs) {
    Words largest{};
    for (int i = 0; i < pairs; ++i) {
      const Words a = bits_of(x[i].a) & 0x7FFFFFFFu, b = bits_of(x[i].b) & 0x7FFFFFFFu, both = a > b ? a : b;
      largest = both > largest ? both : largest;
    }
    return scale_field(largest_lane(largest));
  }

  HD static void copy_codes(char* to, const uint8_t* codes, int size) {
    if (size == kBlock) return static_cast<void>(std::memcpy(to, codes, kBlock));
    for (int i = 0; i < size; ++i) to[i] = char(codes[i]);
  }

  // Stores the moments that waited, and their scales.
  HD static void encode(const Item& item, const Places& at, const Part& part, int size, int shift, int64_t index) {
    const int pairs = (size + kPair - 1) / kPair;
    uint8_t codes[kBlock];
    const uint32_t field = field_of(part.first, pairs);
    const float inverse = power_of_field(254 + 8 - field);
    for (int i = 0; i < pairs; ++i)
      store_bytes(codes + i * kPair, to_e4m3(part.first[i].a * inverse) | to_e4m3(part.first[i].b * inverse) << 16);
    copy_codes(at.pointer[kFirst], codes, size);
    static_cast<float*>(item.pointer[kFirstScale])[index] = power_of_field(field - 8);
    if constexpr (kRoots) {
      const uint32_t second_field = field_of(part.second, pairs);
      const float below = power_of_field(254 - second_field);
      for (int i = 0; i < pairs; ++i) {
        const Words random = load<Words>(part.second_random + shift + i * kPair);
        store_bytes(codes + i * kPair, to_root(part.second[i].a * below, random & 0xFFFFu) |
                                           to_root(part.second[i].b * below, random >> 16) << 16);
      }
      copy_codes(at.pointer[kSecond], codes, size);
      static_cast<float*>(item.pointer[kSecondScale])[index] = power_of_field(second_field);
    }
  }

  // `count` consecutive elements from `offset` of the item on, the first one at the start of block `block`.
  [[gnu::noinline]] static void step_run(const Step& step, const Item& item, int64_t offset, int64_t count,
                                         int64_t block, Sums& into, Kept* kept) {
    const bool wide = kWide || item.gradient != Gradient::kBf16;
    const bool converting = wide && item.gradient != Gradient::kFp32;
    const Sizes stored{item.gradient == Gradient::kFp32 ? 4 : 2, item.pointer[kAverage] ? 4 : 0};
    const Sizes sizes{wide ? 4 : 2, stored.average};
    const Scalars s = step.scalars[item.index];  // a copy, which no store can change
    const float coefficient = step.coefficient, average_rate = step.average_rate;
    const bool finite = step.finite;
    const int64_t number = step.steps[item.index], start = item.shard.start + offset;
    const bool averaging = item.pointer[kAverage] && number % step.average_every == 0;
    const int64_t first = start % kDrawn;
    Places next{};
    for (int slot = 0; slot < kSlots; ++slot) next.pointer[slot] = static_cast<char*>(item.pointer[slot]);
    next = stored.after(next, offset);
    Sums sums = into;
    Part part;
    // All at once: one draw is a long chain of operations, several run side by side.
    for (int64_t drawn = 0; drawn < first + count; drawn += kDraw) {
      const uint64_t counter = uint64_t(start + drawn) / kDrawn;
      if constexpr (kRounded) draw(counter, uint32_t(number), kWeightStream, step.keys, part.weight_random + drawn);
      if constexpr (!kExact)
        draw(counter, uint32_t(number), kSecondStream, step.keys, part.second_random + drawn);
    }
    for (int64_t done = 0; done < count; done += kPart, ++block, next = stored.after(next, kPart)) {
      const int size = int(std::min<int64_t>(kPart, count - done)), shift = int(first + done);
      Places at = next;
      if (converting) {
        convert(item.gradient, at.pointer[kGradient], size, part.gradient);
        at.pointer[kGradient] = reinterpret_cast<char*>(part.gradient);
      }
      if constexpr (kCodes) part.first_scale = static_cast<const float*>(item.pointer[kFirstScale])[block];
      if constexpr (kRoots) part.second_scale = static_cast<const float*>(item.pointer[kSecondScale])[block];
      const Words every = ~Words{};
      const int whole = size / kPair * kPair;
      float* update = kept ? kept->update + done : nullptr;
      float* weight = kept ? kept->weight + done : nullptr;
      if constexpr (kExact) {
        for (int i = 0; i < whole; i += kPair) {
          const Places here = sizes.after(at, i);
          Pair<Floats> direction{};
          if (finite) [[likely]] direction = move_pair(coefficient, s, here, wide, part, i, shift);
          step_pair(finite, direction, s, here, part, i, shift, {every, every}, averaging, average_rate, sums, update,
                    weight);
        }
      } else {
        if (finite)
          for (int i = 0; i < whole; i += kPair)
            part.direction[unsigned(i) / kPair] = move_pair(coefficient, s, sizes.after(at, i), wide, part, i, shift);
        for (int i = 0; i < whole; i += kPair)
          step_pair(finite, part.direction[unsigned(i) / kPair], s, sizes.after(at, i), part, i, shift, {every, every},
                    averaging, average_rate, sums, update, weight);
      }
      if (whole < size) {
        // What is left of a row passes through zeros.
        alignas(64) char spare[kSlots][4 * kPair] = {};
        alignas(64) uint32_t present[kPair] = {};
        const Places end = sizes.after(at, whole);
        Places inside{};
        for (int slot = 0; slot < kSlots; ++slot) {
          std::memcpy(spare[slot], end.pointer[slot], size_t(sizes.of(slot) * (size - whole)));
          inside.pointer[slot] = spare[slot];
        }
        for (int j = 0; j < size - whole; ++j) present[j] = ~0u;
        const Pair<Words> valid = bits_of_pair(load_floats<kWoven>(present));
        Pair<Floats> direction{};
        if (finite) direction = move_pair(coefficient, s, inside, wide, part, whole, shift);
        step_pair(finite, direction, s, inside, part, whole, shift, valid, averaging, average_rate, sums, update,
                  weight);
        if (finite)
          for (int slot = 0; slot < kSlots; ++slot)
            if (slot != kGradient) std::memcpy(end.pointer[slot], spare[slot], size_t(sizes.of(slot) * (size - whole)));
      }
      if constexpr (kCodes)
        if (finite) encode(item, at, part, size, shift, block);
    }
    into = sums;
  }

  static void step_unit(const Step& step, const Item& item, const Unit& unit, uint64_t* updates, uint64_t* weights,
                        uint64_t* changed) {
    const int64_t columns = item.shard.columns, across = (columns + kBlock - 1) / kBlock;
    const int64_t offset = unit.row * columns + unit.column;
    Sums sums{};
    if (unit.columns < kPair && unit.rows > 1 && !kCodes) {
      Kept kept;
      step_run(step, item, offset, unit.rows * columns, 0, sums, &kept);
      if (step.finite) add_rows(kept.update, unit.rows, columns, updates);
      add_rows(kept.weight, unit.rows, columns, weights);
    } else {
      for (int64_t row = 0; row < unit.rows; ++row) {
        const int64_t block = (unit.row + row) * across + unit.column / kBlock;
        step_run(step, item, offset + row * columns, unit.columns, block, sums, nullptr);
        if (step.finite) add_term(add_lanes(sums.updates), updates);
        add_term(add_lanes(sums.weights), weights);
        sums.updates = sums.weights = Floats{};
      }
    }
    for (int i = 0; i < 2 * kLanes; ++i) *changed += sums.changed[i];
  }
};

void step_range(const Plan& plan, const Step& step, int64_t begin, int64_t end, uint64_t* telemetry) {
  using Function = void (*)(const Step&, const Item&, const Unit&, uint64_t*, uint64_t*, uint64_t*);
#define SRPO_MODES(W) \
  {Stepper<Weights::W, Moments::kFp32>::step_unit, Stepper<Weights::W, Moments::kM4>::step_unit, \
   Stepper<Weights::W, Moments::kM3>::step_unit, Stepper<Weights::W, Moments::kM2>::step_unit}
  static constexpr Function kFunctions[4][4] = {SRPO_MODES(kFp32), SRPO_MODES(kSplit32), SRPO_MODES(kSplit24),
                                                SRPO_MODES(kBf16Sr)};
#undef SRPO_MODES
  const Function step_unit = kFunctions[int(step.weights)][int(step.moments)];
  uint64_t updates[kBins + 1] = {}, weights[kBins + 1] = {};
  each_unit(plan, begin, end, [&](const Item& item, const Unit& unit) {
    step_unit(step, item, unit, updates, weights, telemetry + 2 * kBins);
  });
  for (int bin = 0; bin < kBins; ++bin) {
    telemetry[bin] += updates[bin];
    telemetry[kBins + bin] += weights[bin];
  }
}

// --- the norm ------------------------------------------------------------------------------------

// The sum of squares of at most a chunk: neighbours are added in lanes, then lanes of neighbouring vectors.
float square_row(const char* from, bool wide, int64_t columns) {
  const int size = wide ? 4 : 2;
  Floats tree[kChunk / kPair];
  int count = 0;
  const auto add = [&](const char* pair) {
    const Pair<Floats> x = load_gradient<true>(pair, wide);
    tree[count++] = x.a * x.a + x.b * x.b;
  };
  while ((count + 1) * kPair <= columns) add(from + count * kPair * size);
  if (count * kPair < columns) {
    alignas(64) char spare[4 * kPair] = {};
    std::memcpy(spare, from + count * kPair * size, size_t((columns - count * kPair) * size));
    add(spare);
  }
  while (count & (count - 1)) tree[count++] = Floats{};
  for (; count > 1; count /= 2)
    for (int i = 0; i < count / 2; ++i) {
      const Pair<Floats> neighbours = unweave(tree[2 * i], tree[2 * i + 1]);
      tree[i] = neighbours.a + neighbours.b;
    }
  float sums[kLanes];
  store(sums, tree[0]);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] = sums[2 * i] + sums[2 * i + 1];
  return sums[0];
}

// How many of the elements are not finite.
uint64_t lost(const char* from, bool wide, int64_t columns) {
  uint64_t found = 0;
  for (int64_t i = 0; i < columns; ++i) {
    uint32_t bits = 0;  // of which the upper half has the exponent
    std::memcpy(reinterpret_cast<char*>(&bits) + (wide ? 0 : 2), from + i * (wide ? 4 : 2), wide ? 4 : 2);
    found += (bits & kInfinity) == kInfinity;
  }
  return found;
}

// Adds rows narrower than a pair, of which a vector of biases has one for every element.
void square_narrow(const Item& item, const Unit& unit, uint64_t* sums) {
  const int64_t count = unit.rows * unit.columns, offset = unit.row * item.shard.columns;
  const char* from = static_cast<const char*>(item.pointer[kGradient]);
  float converted[kChunk];
  const float* values = converted;
  if (item.gradient == Gradient::kFp32)
    values = reinterpret_cast<const float*>(from) + offset;
  else
    convert(item.gradient, from + 2 * offset, count, converted);
  const uint64_t before = sums[kBins];
  add_rows(values, unit.rows, unit.columns, sums);
  if (sums[kBins] != before) sums[kBins + 1] += lost(reinterpret_cast<const char*>(values), true, count);
}

void square_range(const Plan& plan, int64_t begin, int64_t end, uint64_t* sums) {
  float converted[kChunk];
  each_unit(plan, begin, end, [&](const Item& item, const Unit& unit) {
    if (item.shard.columns < kPair) return square_narrow(item, unit, sums);
    const bool wide = item.gradient != Gradient::kBf16;
    for (int64_t row = unit.row; row < unit.row + unit.rows; ++row) {
      const int64_t offset = row * item.shard.columns + unit.column;
      const char* from = static_cast<const char*>(item.pointer[kGradient]) +
                         offset * (item.gradient == Gradient::kFp32 ? 4 : 2);
      if (item.gradient == Gradient::kFp16) {
        convert(item.gradient, from, unit.columns, converted);
        from = reinterpret_cast<const char*>(converted);
      }
      const float sum = square_row(from, wide, unit.columns);
      add_term(sum, sums);
      if (!std::isfinite(sum)) sums[kBins + 1] += lost(from, wide, unit.columns);
    }
  });
}
