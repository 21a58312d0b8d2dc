// A unit's 1024 elements pass through buffers in the first-level cache, one simple loop a stage, so that the compiler
// vectorises every stage and modes are chosen a unit at a time. The same source is compiled for three instruction sets,
// one of which is chosen at run time; their bits are the same.
#include "adamw.h"

namespace srpo {
namespace {

constexpr int kPart = 128;  // elements that pass through the stages together, a multiple of a block

struct Buffers {
  alignas(64) float weight[kChunk], gradient[kChunk], first[kChunk], second[kChunk], update[kChunk];
  alignas(64) uint32_t random[kChunk + 8];
};

// Not memcpy: inline, it is a few instructions.
void copy(const float* from, int n, float* __restrict__ to) {
  for (int i = 0; i < n; ++i) to[i] = from[i];
}

template <class T>
T* at(const Item& item, Slot slot, int64_t offset) {
  return static_cast<T*>(item.pointer[slot]) + offset;
}

// --- loading -------------------------------------------------------------------------------------

void load_weight(const Item& item, Weights mode, int64_t offset, int n, float* out) {
  const uint16_t* half = at<uint16_t>(item, kWeight, offset);
  if (mode == Weights::kFp32) {
    copy(at<float>(item, kWeight, offset), n, out);
  } else if (mode == Weights::kSplit32) {
    const int16_t* rest = at<int16_t>(item, kRemainder, offset);
    for (int i = 0; i < n; ++i) out[i] = float_of(join16(half[i], rest[i]));
  } else if (mode == Weights::kSplit24) {
    const int8_t* rest = at<int8_t>(item, kRemainder, offset);
    for (int i = 0; i < n; ++i) out[i] = float_of(join24(half[i], rest[i]));
  } else {
    for (int i = 0; i < n; ++i) out[i] = from_bf16(half[i]);
  }
}

void load_gradient(const Item& item, int64_t offset, int n, float* out) {
  const uint16_t* half = at<uint16_t>(item, kGradient, offset);
  if (item.gradient == Gradient::kFp32) {
    copy(at<float>(item, kGradient, offset), n, out);
  } else if (item.gradient == Gradient::kBf16) {
    for (int i = 0; i < n; ++i) out[i] = from_bf16(half[i]);
  } else {
    for (int i = 0; i < n; ++i) out[i] = from_fp16(half[i]);
  }
}

void load_plain(const Item& item, Slot slot, bool wide, int64_t offset, int n, float* out) {
  if (wide) {
    copy(at<float>(item, slot, offset), n, out);
  } else {
    const uint16_t* half = at<uint16_t>(item, slot, offset);
    for (int i = 0; i < n; ++i) out[i] = from_bf16(half[i]);
  }
}

// Calls `use(begin, size, scale index)` for the blocks of a unit, `begin` counting from its first element.
template <class Use>
void each_block(const Item& item, const Unit& unit, const Use& use) {
  const int64_t across = (item.shard.columns + kBlock - 1) / kBlock;
  for (int64_t row = 0; row < unit.rows; ++row) {
    const int64_t scales = (unit.row + row) * across + unit.column / kBlock;
    for (int64_t column = 0; column < unit.columns; column += kBlock) {
      const int64_t left = unit.columns - column;
      use(int(row * unit.columns + column), int(left < kBlock ? left : kBlock), scales + column / kBlock);
    }
  }
}

void load_moments(const Item& item, Moments mode, const Unit& unit, int64_t offset, int n, Buffers& b) {
  if (mode == Moments::kFp32 || mode == Moments::kM4) {
    load_plain(item, kFirst, mode == Moments::kFp32, offset, n, b.first);
  } else {
    const uint8_t* codes = at<uint8_t>(item, kFirst, offset);
    each_block(item, unit, [&](int begin, int size, int64_t index) {
      const float scale = *at<float>(item, kFirstScale, index);
      for (int i = begin; i < begin + size; ++i) b.first[i] = from_e4m3(codes[i]) * scale;
    });
  }
  if (mode != Moments::kM2) {
    load_plain(item, kSecond, mode == Moments::kFp32, offset, n, b.second);
  } else {
    const uint8_t* codes = at<uint8_t>(item, kSecond, offset);
    each_block(item, unit, [&](int begin, int size, int64_t index) {
      const float scale = *at<float>(item, kSecondScale, index);
      for (int i = begin; i < begin + size; ++i) b.second[i] = from_root(codes[i]) * scale;
    });
  }
}

// --- storing -------------------------------------------------------------------------------------

// Leaves in `weight` what was stored, and returns how many bf16 weights changed.
int store_weight(const Item& item, Weights mode, int64_t offset, int n, float* weight, const uint32_t* random) {
  if (mode == Weights::kFp32) {
    copy(weight, n, at<float>(item, kWeight, offset));
    return 0;
  }
  int changed = 0;
  uint16_t* half = at<uint16_t>(item, kWeight, offset);
  if (mode == Weights::kSplit32) {
    int16_t* rest = at<int16_t>(item, kRemainder, offset);
    for (int i = 0; i < n; ++i) {
      const uint32_t bits = bits_of(weight[i]);
      const uint16_t upper = upper16(bits);
      changed += upper != half[i];
      half[i] = upper;
      rest[i] = remainder16(bits);
    }
    return changed;
  }
  const int dropped = mode == Weights::kSplit24 ? 8 : 16;
  for (int i = 0; i < n; ++i) weight[i] = float_of(round_down_bits(bits_of(weight[i]), random[i], dropped));
  if (mode == Weights::kSplit24) {
    int8_t* rest = at<int8_t>(item, kRemainder, offset);
    for (int i = 0; i < n; ++i) rest[i] = remainder24(bits_of(weight[i]));
  }
  for (int i = 0; i < n; ++i) {
    const uint16_t upper = upper16(bits_of(weight[i]));
    changed += upper != half[i];
    half[i] = upper;
  }
  return changed;
}

uint32_t field_of_block(const float* x, int size) {
  uint32_t largest = 0;
  for (int i = 0; i < size; ++i) {
    const uint32_t magnitude = bits_of(x[i]) & 0x7FFFFFFF;
    largest = magnitude > largest ? magnitude : largest;
  }
  return scale_field(largest);
}

void store_moments(const Item& item, Moments mode, const Unit& unit, int64_t offset, int n, const Buffers& b) {
  if (mode == Moments::kFp32) {
    copy(b.first, n, at<float>(item, kFirst, offset));
    copy(b.second, n, at<float>(item, kSecond, offset));
    return;
  }
  if (mode == Moments::kM4) {
    uint16_t* first = at<uint16_t>(item, kFirst, offset);
    for (int i = 0; i < n; ++i) first[i] = nearest16(bits_of(b.first[i]));
  } else {
    uint8_t* codes = at<uint8_t>(item, kFirst, offset);
    each_block(item, unit, [&](int begin, int size, int64_t index) {
      const uint32_t field = field_of_block(b.first + begin, size);
      const float inverse = power_of_field(254 + 8 - field);
      for (int i = begin; i < begin + size; ++i) codes[i] = to_e4m3(b.first[i] * inverse);
      *at<float>(item, kFirstScale, index) = power_of_field(field - 8);
    });
  }
  if (mode != Moments::kM2) {
    uint16_t* second = at<uint16_t>(item, kSecond, offset);
    for (int i = 0; i < n; ++i)
      second[i] = uint16_t(round_down_bits(bits_of(b.second[i]), b.random[i] >> 16, 16) >> 16);
  } else {
    uint8_t* codes = at<uint8_t>(item, kSecond, offset);
    each_block(item, unit, [&](int begin, int size, int64_t index) {
      const uint32_t field = field_of_block(b.second + begin, size);
      const float inverse = power_of_field(254 - field);
      for (int i = begin; i < begin + size; ++i) codes[i] = to_root(b.second[i] * inverse, b.random[i] >> 16);
      *at<float>(item, kSecondScale, index) = power_of_field(field);
    });
  }
}

// --- sums ----------------------------------------------------------------------------------------

// Adds the chunks of x, `rows` rows of `columns`, to bins and to what follows them: sums that are not finite.
void add_squares(const float* x, int rows, int columns, uint64_t* sums) {
  alignas(64) float buffers[2][kChunk];  // in place, the loop below would not vectorise
  const int width = 1 << log2_width(columns);
  for (int row = 0; row < rows; ++row, x += columns) {
    float* __restrict__ tree = buffers[0];
    float* __restrict__ next = buffers[1];
    for (int i = 0; i < columns; ++i) tree[i] = x[i] * x[i];
    for (int i = columns; i < width; ++i) tree[i] = 0;
    for (int half = width / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) next[i] = tree[2 * i] + tree[2 * i + 1];
      std::swap(tree, next);
    }
    const Term term = term_of(tree[0]);
    sums[term.bin] += term.value;
  }
}

// The words of elements [start, start + n) at out[start % 4].
void draw(int64_t start, int n, uint32_t step, uint64_t seed, uint32_t* out) {
  const uint64_t block = uint64_t(start) / 4;
  const uint32_t low = uint32_t(block), high = uint32_t(block >> 32);
  const int count = int((start % 4 + n + 3) / 4);
  for (int i = 0; i < count; ++i) {
    const uint32_t counter = low + uint32_t(i);
    const Words words = random_words(counter, high + (counter < low ? 1 : 0), step, seed);
    for (int lane = 0; lane < 4; ++lane) out[4 * i + lane] = words.lane[lane];
  }
}

void average_weight(float* average, const float* weight, float rate, int n) {
  for (int i = 0; i < n; ++i) average[i] = average[i] + (weight[i] - average[i]) * rate;
}

// Elements of a unit that are within one row, or all of it; leaves weights as stored and updates, and returns how many
// bf16 weights changed.
int step_part(const Item& item, const Unit& part, const Step& step, Buffers& b, float* weight, float* update) {
  const int64_t offset = part.row * item.shard.columns + part.column;
  const int n = int(part.rows * part.columns);
  load_weight(item, step.weights, offset, n, weight);
  if (!step.finite) return 0;
  const int64_t number = step.steps[item.index], start = item.shard.start + offset;
  const Scalars scalars = step.scalars[item.index];
  load_gradient(item, offset, n, b.gradient);
  load_moments(item, step.moments, part, offset, n, b);
  for (int i = 0; i < n; ++i) {
    const Advanced next = advance(b.gradient[i], step.coefficient, weight[i], b.first[i], b.second[i], scalars);
    weight[i] = next.weight;
    b.first[i] = next.first;
    b.second[i] = next.second;
    update[i] = next.update;
  }
  if (item.pointer[kAverage] && number % step.average_every == 0)
    average_weight(at<float>(item, kAverage, offset), weight, step.average_rate, n);
  const bool exact = step.weights == Weights::kFp32 || step.weights == Weights::kSplit32;
  if (!exact || step.moments != Moments::kFp32) {
    draw(start, n, uint32_t(number), step.seed, b.random);
    if (start % 4) std::memmove(b.random, b.random + start % 4, size_t(n) * sizeof(uint32_t));
  }
  store_moments(item, step.moments, part, offset, n, b);
  return store_weight(item, step.weights, offset, n, weight, b.random);
}

int step_unit(const Item& item, const Unit& unit, const Step& step, Buffers& b, uint64_t* updates, uint64_t* weights) {
  // Short parts, so that the processor sees streams to read ahead of.
  const int64_t width = unit.rows > 1 ? unit.columns : kPart;
  int changed = 0;
  for (int64_t column = 0; column < unit.columns; column += width) {
    const Unit part{unit.row, unit.rows, unit.column + column, std::min(width, unit.columns - column)};
    changed += step_part(item, part, step, b, b.weight + column, b.update + column);
  }
  if (step.finite) add_squares(b.update, int(unit.rows), int(unit.columns), updates);
  add_squares(b.weight, int(unit.rows), int(unit.columns), weights);
  return changed;
}

void square_unit(const Item& item, const Unit& unit, float* buffer, uint64_t* sums) {
  const int n = int(unit.rows * unit.columns);
  load_gradient(item, unit.row * item.shard.columns + unit.column, n, buffer);
  int lost = 0;
  for (int i = 0; i < n; ++i) lost += (bits_of(buffer[i]) & kInfinity) == kInfinity;
  sums[kBins + 1] += uint64_t(lost);
  add_squares(buffer, int(unit.rows), int(unit.columns), sums);
}

}  // namespace

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
[[gnu::target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), gnu::flatten]]
#endif
void step_units(const Plan& plan, const Step& step, int64_t begin, int64_t end, uint64_t* telemetry) {
  Buffers buffers;
  uint64_t updates[kBins + 1] = {}, weights[kBins + 1] = {};
  for (size_t place = plan.item_of(begin); begin < end; ++place)
    for (const Item& item = plan.items[place]; begin < std::min(end, plan.first_unit[place + 1]); ++begin) {
      const Unit unit = unit_at(item.shard, begin - plan.first_unit[place]);
      telemetry[2 * kBins] += uint64_t(step_unit(item, unit, step, buffers, updates, weights));
    }
  for (int bin = 0; bin < kBins; ++bin) {
    telemetry[bin] += updates[bin];
    telemetry[kBins + bin] += weights[bin];
  }
}

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
[[gnu::target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), gnu::flatten]]
#endif
void square_units(const Plan& plan, int64_t begin, int64_t end, uint64_t* sums) {
  alignas(64) float buffer[kChunk];
  for (size_t place = plan.item_of(begin); begin < end; ++place)
    for (const Item& item = plan.items[place]; begin < std::min(end, plan.first_unit[place + 1]); ++begin)
      square_unit(item, unit_at(item.shard, begin - plan.first_unit[place]), buffer, sums);
}

}  // namespace srpo
