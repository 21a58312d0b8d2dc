// A warp takes a unit of 1024 slots in eight passes of four slots a lane, so a pass is one block of 128, and chunks are
// sums over passes: nothing waits for another warp. Where alignment allows, a lane's four elements are one access (16
// bytes of fp32, 8 of bf16) and a quarter of a Philox counter's bits, which four lanes draw alike; otherwise (`kVector`
// false) the same runs on single elements.
#include "adamw.cuh"

#include <type_traits>

namespace srpo {
namespace {

constexpr int kThreads = 256, kBlocks = 3, kSquareBlocks = 6;  // of a multiprocessor: 80 registers
constexpr int kWarps = kThreads / 32;
constexpr int kLane = 4;           // slots of a lane in a pass
constexpr int kPass = 32 * kLane;  // slots of a warp
constexpr unsigned kAll = 0xFFFFFFFF;

// --- a lane's four slots -------------------------------------------------------------------------

// Where they are. A unit's elements are contiguous from `origin`; slots are its rows filled up to a power of two.
template <bool kVector>
struct Lane {
  int64_t origin;
  int32_t slot, log2, rows, columns;

  __device__ int row(int j) const { return (slot + j) >> log2; }
  __device__ int column(int j) const { return (slot + j) & ((1 << log2) - 1); }
  __device__ bool valid(int j) const { return row(j) < rows && column(j) < columns; }
  __device__ int64_t index(int j) const { return origin + row(j) * columns + column(j); }

  // Elements of a vector are valid together: columns are a multiple of four.
  template <class T>
  __device__ void load(const T* from, T (&out)[kLane]) const {
    if constexpr (kVector) {
      if (valid(0)) {
        move<T>(out, from + index(0));
      } else {
        for (int j = 0; j < kLane; ++j) out[j] = T(0);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kLane; ++j) out[j] = valid(j) ? from[index(j)] : T(0);
    }
  }

  template <class T>
  __device__ void store(T* to, const T (&in)[kLane]) const {
    if constexpr (kVector) {
      if (valid(0)) move<T>(to + index(0), in);
    } else {
#pragma unroll
      for (int j = 0; j < kLane; ++j)
        if (valid(j)) to[index(j)] = in[j];
    }
  }

 private:
  template <class T>
  static __device__ void move(T* to, const T* from) {
    using Narrow = std::conditional_t<sizeof(T) == 1, uint32_t, uint2>;
    using Vector = std::conditional_t<sizeof(T) == 4, uint4, Narrow>;
    *reinterpret_cast<Vector*>(to) = *reinterpret_cast<const Vector*>(from);
  }
};

template <bool kVector>
__device__ void load_bf16(const Lane<kVector>& lane, const void* from, float (&out)[kLane]) {
  alignas(16) uint16_t half[kLane];
  lane.load(static_cast<const uint16_t*>(from), half);
#pragma unroll
  for (int j = 0; j < kLane; ++j) out[j] = float_of(uint32_t(half[j]) << 16);
}

template <bool kVector>
__device__ void load_fp32(const Lane<kVector>& lane, const void* from, float (&out)[kLane]) {
  alignas(16) float values[kLane];
  lane.load(static_cast<const float*>(from), values);
#pragma unroll
  for (int j = 0; j < kLane; ++j) out[j] = values[j];
}

template <bool kVector>
__device__ void load_gradient(const Lane<kVector>& lane, const void* from, Gradient type, float (&out)[kLane]) {
  if (type == Gradient::kBf16) {
    load_bf16(lane, from, out);
  } else if (type == Gradient::kFp32) {
    load_fp32(lane, from, out);
  } else {
    alignas(16) uint16_t half[kLane];
    lane.load(static_cast<const uint16_t*>(from), half);
#pragma unroll
    for (int j = 0; j < kLane; ++j) out[j] = from_fp16(uint32_t(half[j]) << 16);
  }
}

// --- exact sums over chunks ----------------------------------------------------------------------

__device__ void add_term(float sum, unsigned long long* bins) {
  const Term term = term_of(sum);
  if (term.value) atomicAdd(bins + term.bin, (unsigned long long)term.value);
}

// Sums of squares of the rows of a unit, which take `1 << log2` slots each: the tree that adds neighbours.
struct Squares {
  float held[3];  // sums of 128, 256 and 512 slots that wait for their neighbours

  template <bool kVector>
  __device__ void add(const float (&x)[kLane], int pass, int log2, unsigned long long* bins) {
    float tree[kLane];
#pragma unroll
    for (int j = 0; j < kLane; ++j) tree[j] = x[j] * x[j];
#pragma unroll
    for (int level = 0; level < 2; ++level) {
      if (!kVector && level == log2) {
#pragma unroll
        for (int j = 0; j < kLane >> level; ++j) add_term(tree[j], bins);
        return;
      }
#pragma unroll
      for (int j = 0; j < kLane >> (level + 1); ++j) tree[j] = tree[2 * j] + tree[2 * j + 1];
    }
    float sum = tree[0];
    const int lanes = log2 < 7 ? 1 << (log2 - 2) : 32;
    for (int distance = 1; distance < lanes; distance *= 2) sum = sum + __shfl_xor_sync(kAll, sum, distance);
#pragma unroll
    for (int level = 0; level < 3; ++level) {
      if (level + 7 >= log2) break;
      if ((pass >> level & 1) == 0) {
        held[level] = sum;
        return;
      }
      sum = held[level] + sum;
    }
    if ((threadIdx.x & (lanes - 1)) == 0) add_term(sum, bins);
  }
};

// The same in any order: a row's squares are added in lanes first.
struct AnySquares {
  Squares tree;
  float held;

  template <bool kVector>
  __device__ void add(const float (&x)[kLane], int pass, int log2, unsigned long long* bins) {
    if (log2 < 7) return tree.add<kVector>(x, pass, log2, bins);
    float sum = (x[0] * x[0] + x[1] * x[1]) + (x[2] * x[2] + x[3] * x[3]);
    const int place = pass & ((1 << (log2 - 7)) - 1);
    held = place ? held + sum : sum;
    if (place + 1 < 1 << (log2 - 7)) return;
    sum = held;
    for (int distance = 16; distance > 0; distance /= 2) sum = sum + __shfl_xor_sync(kAll, sum, distance);
    if (threadIdx.x % 32 == 0) add_term(sum, bins);
  }
};

// The units of a warp: calls `use(words, shard, unit)` for one unit after the other.
template <class Use>
__device__ void each_unit(const Table& table, const Use& use) {
  int item = 0;
  const uint32_t stride = gridDim.x * kWarps;
  for (uint32_t unit = blockIdx.x * kWarps + threadIdx.x / 32; unit < uint32_t(table.units); unit += stride) {
    for (int last = table.items - 1; item < last;) {  // the next items are the likeliest, of many all are near
      const int middle = item + (last - item + 1) / 2;
      if (entry_first_unit(entry(table, item + 1)) > int32_t(unit)) break;
      if (entry_first_unit(entry(table, middle)) <= int32_t(unit))
        item = middle;
      else
        last = middle - 1;
    }
    const uint64_t* words = entry(table, item);
    const Shard shard{entry_rows(words), entry_columns(words), entry_start(words)};
    use(words, shard, unit_at(shard, unit - uint32_t(entry_first_unit(words))));
  }
}

template <bool kVector>
__device__ Lane<kVector> lane_of(const Shard& shard, const Unit& unit, int pass) {
  const int slot = pass * kPass + int(threadIdx.x & 31) * kLane;
  return {unit.row * shard.columns + unit.column, slot, log2_width(shard.columns), int(unit.rows), int(unit.columns)};
}

// Passes that have any slot in use.
__device__ int passes_of(const Shard& shard, const Unit& unit) {
  const int log2 = log2_width(shard.columns);
  const int slots = log2 == 10 ? kChunk : int(unit.rows) << log2;
  return (slots + kPass - 1) / kPass;
}

// --- the step ------------------------------------------------------------------------------------

// Blocks of 128, and where their scales are.
template <bool kVector>
struct Blocks {
  const Lane<kVector>& lane;
  int64_t scales;  // of the unit's first row, at its first column
  int32_t across;

  __device__ int64_t index(int j) const { return scales + int64_t(lane.row(j)) * across + lane.column(j) / kBlock; }

  __device__ void multiply(const float* scale, float (&x)[kLane]) const {
    if constexpr (kVector) {
      const float shared = lane.valid(0) ? scale[index(0)] : 0.0f;
#pragma unroll
      for (int j = 0; j < kLane; ++j) x[j] = x[j] * shared;
    } else {
#pragma unroll
      for (int j = 0; j < kLane; ++j) x[j] = lane.valid(j) ? x[j] * scale[index(j)] : 0.0f;
    }
  }

  // Exponent fields of the scales of x, which is zero where slots are not valid.
  __device__ void fields(const float (&x)[kLane], uint32_t (&field)[kLane]) const {
    const int slots = lane.log2 < 7 ? 1 << lane.log2 : kBlock;
#pragma unroll
    for (int j = 0; j < kLane; ++j) field[j] = bits_of(x[j]) & 0x7FFFFFFF;
#pragma unroll
    for (int step = 1; step < kLane; step *= 2) {
      if (!kVector && step >= slots) break;
      uint32_t other[kLane];
#pragma unroll
      for (int j = 0; j < kLane; ++j) other[j] = field[j ^ step];
#pragma unroll
      for (int j = 0; j < kLane; ++j) field[j] = max(field[j], other[j]);
    }
    if (kVector || slots > kLane) {
      uint32_t largest = field[0];
      for (int distance = 1; distance * kLane < slots; distance *= 2)
        largest = max(largest, __shfl_xor_sync(kAll, largest, distance));
#pragma unroll
      for (int j = 0; j < kLane; ++j) field[j] = largest;
    }
#pragma unroll
    for (int j = 0; j < kLane; ++j) field[j] = scale_field(field[j]);
  }

  __device__ void store(const uint32_t (&field)[kLane], uint32_t less, float* scale) const {
#pragma unroll
    for (int j = 0; j < (kVector ? 1 : kLane); ++j)
      if (lane.valid(j) && lane.column(j) % kBlock == 0) scale[index(j)] = power_of_field(field[j] - less);
  }
};

struct Wide {
  __device__ uint64_t operator()(uint64_t x, uint32_t y) const { return uint64_t(uint32_t(x)) * y; }
};

__device__ Drawn<uint64_t> draw_counter(uint64_t element, uint32_t step, uint32_t stream, const Keys& keys) {
  const uint64_t counter = element / kDrawn;
  return philox(counter, counter >> 32, step, stream, keys, Wide{});
}

// The 16 bits of a lane's elements.
template <bool kVector>
__device__ void draw(const Lane<kVector>& lane, int64_t start, uint32_t step, uint32_t stream, const Keys& keys,
                     uint32_t (&out)[kLane]) {
  if constexpr (kVector) {
    const uint64_t element = uint64_t(start + lane.index(0));
    const Drawn<uint64_t> drawn = draw_counter(element, step, stream, keys);
    const uint32_t w0 = uint32_t(drawn.word[0]), w1 = uint32_t(drawn.word[1]), w2 = uint32_t(drawn.word[2]),
                   w3 = uint32_t(drawn.word[3]);
    const bool second = element & 4, rotated = element & 8;
    const uint32_t a = second ? w2 : w0, b = second ? w3 : w1, c = second ? w0 : w2;
    const uint32_t low = rotated ? __funnelshift_r(a, b, 8) : a, high = rotated ? __funnelshift_r(b, c, 8) : b;
    out[0] = low & 0xFFFF;
    out[1] = low >> 16;
    out[2] = high & 0xFFFF;
    out[3] = high >> 16;
  } else {
#pragma unroll
    for (int j = 0; j < kLane; ++j) {
      const uint64_t element = uint64_t(start + lane.index(j));
      const Drawn<uint64_t> drawn = draw_counter(element, step, stream, keys);
      const bool odd = element & 2, upper = element & 4;
      const uint32_t w0 = uint32_t(upper ? drawn.word[2] : drawn.word[0]);
      const uint32_t w1 = uint32_t(upper ? drawn.word[3] : drawn.word[1]);
      const uint32_t w2 = uint32_t(upper ? drawn.word[0] : drawn.word[2]);
      const uint32_t word = odd ? w1 : w0, next = odd ? w2 : w1;
      const uint32_t found = element & 8 ? __funnelshift_r(word, next, 8) : word;
      out[j] = element & 1 ? found >> 16 : found & 0xFFFF;
    }
  }
}

template <Weights kWeights, bool kVector>
__device__ void load_weight(const Lane<kVector>& lane, const Table& table, const uint64_t* words, float (&out)[kLane],
                            uint16_t (&half)[kLane]) {
  const void* weight = reinterpret_cast<const void*>(words[table.position[kWeight]]);
  if constexpr (kWeights == Weights::kFp32) {
    load_fp32(lane, weight, out);
  } else {
    lane.load(static_cast<const uint16_t*>(weight), half);
    const void* remainder = reinterpret_cast<const void*>(words[table.position[kRemainder]]);
    if constexpr (kWeights == Weights::kSplit32) {
      alignas(16) int16_t rest[kLane];
      lane.load(static_cast<const int16_t*>(remainder), rest);
#pragma unroll
      for (int j = 0; j < kLane; ++j) out[j] = float_of((uint32_t(half[j]) << 16) + uint32_t(int32_t(rest[j])));
    } else if constexpr (kWeights == Weights::kSplit24) {
      alignas(16) int8_t rest[kLane];
      lane.load(static_cast<const int8_t*>(remainder), rest);
#pragma unroll
      for (int j = 0; j < kLane; ++j) out[j] = float_of((uint32_t(half[j]) << 16) + (uint32_t(int32_t(rest[j])) << 8));
    } else {
#pragma unroll
      for (int j = 0; j < kLane; ++j) out[j] = float_of(uint32_t(half[j]) << 16);
    }
  }
}

// Leaves in `weight` what was stored, and returns how many bf16 weights changed; `before` are their bits.
template <Weights kWeights, bool kVector>
__device__ int store_weight(const Lane<kVector>& lane, const Table& table, const uint64_t* words, float (&weight)[kLane],
                            const uint16_t (&before)[kLane], const uint32_t (&random)[kLane]) {
  void* to = reinterpret_cast<void*>(words[table.position[kWeight]]);
  void* remainder = reinterpret_cast<void*>(words[table.position[kRemainder]]);
  int changed = 0;
  if constexpr (kWeights == Weights::kFp32) {
    alignas(16) float values[kLane];
#pragma unroll
    for (int j = 0; j < kLane; ++j) values[j] = weight[j];
    lane.store(static_cast<float*>(to), values);
  } else {
    alignas(16) uint16_t half[kLane];
    constexpr int kDropped = kWeights == Weights::kSplit24 ? 8 : 16;
#pragma unroll
    for (int j = 0; j < kLane; ++j) {
      if constexpr (kWeights != Weights::kSplit32)
        weight[j] = float_of(round_down_bits(weight[j], random[j], kDropped));
      half[j] = uint16_t(upper_half(bits_of(weight[j])) >> 16);
      changed += half[j] != before[j] && lane.valid(j);
    }
    lane.store(static_cast<uint16_t*>(to), half);
    if constexpr (kWeights == Weights::kSplit32) {
      alignas(16) int16_t rest[kLane];
#pragma unroll
      for (int j = 0; j < kLane; ++j) rest[j] = int16_t(bits_of(weight[j]));
      lane.store(static_cast<int16_t*>(remainder), rest);
    } else if constexpr (kWeights == Weights::kSplit24) {
      alignas(16) int8_t rest[kLane];
#pragma unroll
      for (int j = 0; j < kLane; ++j) rest[j] = int8_t(bits_of(weight[j]) >> 8);
      lane.store(static_cast<int8_t*>(remainder), rest);
    }
  }
  return changed;
}

template <Weights kWeights, Moments kMoments, bool kVector>
__device__ int step_unit(const Table& table, const Step& step, const uint64_t* words, const Shard& shard,
                         const Unit& unit, bool finite, unsigned long long* bins) {
  constexpr bool kCodes = kMoments == Moments::kM3 || kMoments == Moments::kM2, kRoots = kMoments == Moments::kM2;
  constexpr bool kRounded = kWeights == Weights::kSplit24 || kWeights == Weights::kBf16Sr;
  AnySquares updates, weights;
  int changed = 0;
  const int64_t number = step.steps[entry_index(words)];
  const Scalars scalars = step.scalars[entry_index(words)];
  const float coefficient = *step.coefficient;
  const auto pointer = [&](Slot slot) { return reinterpret_cast<void*>(words[table.position[slot]]); };
  const bool averaging = table.position[kAverage] && number % step.average_every == 0;
  const int32_t across = int32_t((shard.columns + kBlock - 1) / kBlock);

#pragma unroll 1
  for (int pass = 0; pass < passes_of(shard, unit); ++pass) {
    const Lane<kVector> lane = lane_of<kVector>(shard, unit, pass);
    const Blocks<kVector> blocks{lane, unit.row * across + unit.column / kBlock, across};
    float weight[kLane], first[kLane], second[kLane];
    alignas(16) uint16_t before[kLane];
    load_weight<kWeights>(lane, table, words, weight, before);
    if (finite) {
      float gradient[kLane], update[kLane];
      load_gradient(lane, pointer(kGradient), entry_gradient(words), gradient);
      if constexpr (kMoments == Moments::kFp32) {
        load_fp32(lane, pointer(kFirst), first);
        load_fp32(lane, pointer(kSecond), second);
      } else if constexpr (kMoments == Moments::kM4) {
        load_bf16(lane, pointer(kFirst), first);
        load_bf16(lane, pointer(kSecond), second);
      } else {
        alignas(16) uint8_t codes[kLane];
        lane.load(static_cast<const uint8_t*>(pointer(kFirst)), codes);
        if constexpr (!kRoots) load_bf16(lane, pointer(kSecond), second);
#pragma unroll
        for (int j = 0; j < kLane; ++j) first[j] = from_e4m3(uint32_t(codes[j]));
        blocks.multiply(static_cast<const float*>(pointer(kFirstScale)), first);
        if constexpr (kRoots) {
          lane.load(static_cast<const uint8_t*>(pointer(kSecond)), codes);
#pragma unroll
          for (int j = 0; j < kLane; ++j) second[j] = from_root(uint32_t(codes[j]));
          blocks.multiply(static_cast<const float*>(pointer(kSecondScale)), second);
        }
      }
#pragma unroll
      for (int j = 0; j < kLane; ++j) {
        const Advanced<float> next = advance(gradient[j], coefficient, weight[j], first[j], second[j], scalars);
        const bool valid = lane.valid(kVector ? 0 : j);  // the rest must add nothing, also where eps is 0
        weight[j] = valid ? next.weight : 0.0f;
        first[j] = next.first;
        second[j] = next.second;
        update[j] = valid ? next.update : 0.0f;
      }
      updates.add<kVector>(update, pass, lane.log2, bins);
      if (averaging) {
        alignas(16) float average[kLane];
        lane.load(static_cast<const float*>(pointer(kAverage)), average);
#pragma unroll
        for (int j = 0; j < kLane; ++j) average[j] = average[j] + (weight[j] - average[j]) * step.average_rate;
        lane.store(static_cast<float*>(pointer(kAverage)), average);
      }

      uint32_t random[kLane];
      if constexpr (kRounded) draw(lane, shard.start, uint32_t(number), kWeightStream, step.keys, random);
      changed += store_weight<kWeights>(lane, table, words, weight, before, random);
    }
    weights.add<kVector>(weight, pass, lane.log2, bins + kBins + 1);
    if (finite) {
      uint32_t random[kLane];
      if constexpr (kMoments != Moments::kFp32)
        draw(lane, shard.start, uint32_t(number), kSecondStream, step.keys, random);
      if constexpr (kMoments == Moments::kFp32) {
        alignas(16) float values[kLane];
#pragma unroll
        for (int j = 0; j < kLane; ++j) values[j] = first[j];
        lane.store(static_cast<float*>(pointer(kFirst)), values);
#pragma unroll
        for (int j = 0; j < kLane; ++j) values[j] = second[j];
        lane.store(static_cast<float*>(pointer(kSecond)), values);
      }
      if constexpr (kMoments == Moments::kM4) {
        alignas(16) uint16_t half[kLane];
#pragma unroll
        for (int j = 0; j < kLane; ++j) half[j] = uint16_t(nearest_half(first[j]) >> 16);
        lane.store(static_cast<uint16_t*>(pointer(kFirst)), half);
      }
      if constexpr (kMoments == Moments::kM4 || kMoments == Moments::kM3) {
        alignas(16) uint16_t half[kLane];
#pragma unroll
        for (int j = 0; j < kLane; ++j)
          half[j] = uint16_t(round_down_bits(second[j], random[j], 16) >> 16);
        lane.store(static_cast<uint16_t*>(pointer(kSecond)), half);
      }
      if constexpr (kCodes) {
        alignas(16) uint8_t codes[kLane];
        uint32_t field[kLane];
        blocks.fields(first, field);
#pragma unroll
        for (int j = 0; j < kLane; ++j) codes[j] = uint8_t(to_e4m3(first[j] * power_of_field(254 + 8 - field[j])));
        lane.store(static_cast<uint8_t*>(pointer(kFirst)), codes);
        blocks.store(field, 8, static_cast<float*>(pointer(kFirstScale)));
        if constexpr (kRoots) {
          blocks.fields(second, field);
#pragma unroll
          for (int j = 0; j < kLane; ++j)
            codes[j] = uint8_t(to_root(second[j] * power_of_field(254 - field[j]), random[j]));
          lane.store(static_cast<uint8_t*>(pointer(kSecond)), codes);
          blocks.store(field, 0, static_cast<float*>(pointer(kSecondScale)));
        }
      }
    }
  }
  return changed;
}

template <Weights kWeights, Moments kMoments, bool kVector>
__global__ void __launch_bounds__(kThreads, kVector ? kBlocks : 1)
    step_kernel(const __grid_constant__ Table table, const __grid_constant__ Step step, unsigned long long* sums) {
  constexpr int kSums = 2 * (kBins + 1) + 1;  // sums that are not finite are counted, and left out below
  __shared__ unsigned long long bins[kSums];
  if (threadIdx.x < kSums) bins[threadIdx.x] = 0;
  __syncthreads();
  const bool finite = *step.finite;
  int changed = 0;
  each_unit(table, [&](const uint64_t* words, const Shard& shard, const Unit& unit) {
    changed += step_unit<kWeights, kMoments, kVector>(table, step, words, shard, unit, finite, bins);
  });
  changed = __reduce_add_sync(kAll, changed);
  if (threadIdx.x % 32 == 0 && changed) atomicAdd(bins + kSums - 1, (unsigned long long)changed);
  __syncthreads();
  const int from = int(threadIdx.x) + (threadIdx.x >= kBins) + (threadIdx.x >= 2 * kBins);
  if (threadIdx.x < kTelemetry && bins[from]) atomicAdd(sums + threadIdx.x, bins[from]);
}

// --- the norm ------------------------------------------------------------------------------------

template <bool kVector>
__device__ int square_unit(const Table& table, const uint64_t* words, const Shard& shard, const Unit& unit,
                           unsigned long long* bins) {
  Squares squares;
  int lost = 0;
#pragma unroll 1
  for (int pass = 0; pass < passes_of(shard, unit); ++pass) {
    const Lane<kVector> lane = lane_of<kVector>(shard, unit, pass);
    float gradient[kLane];
    const void* from = reinterpret_cast<const void*>(words[table.position[kGradient]]);
    load_gradient(lane, from, entry_gradient(words), gradient);
#pragma unroll
    for (int j = 0; j < kLane; ++j) lost += (bits_of(gradient[j]) & kInfinity) == kInfinity;
    squares.add<kVector>(gradient, pass, lane.log2, bins);
  }
  return lost;
}

__global__ void __launch_bounds__(kThreads, kSquareBlocks)
    square_kernel(const __grid_constant__ Table table, const __grid_constant__ Begin begin, unsigned long long* sums) {
  __shared__ unsigned long long bins[kNormSums];
  if (threadIdx.x < kNormSums) bins[threadIdx.x] = 0;
  __syncthreads();
  int lost = 0;
  each_unit(table, [&](const uint64_t* words, const Shard& shard, const Unit& unit) {
    lost += entry_aligned(words) ? square_unit<true>(table, words, shard, unit, bins)
                                 : square_unit<false>(table, words, shard, unit, bins);
  });
  lost = __reduce_add_sync(kAll, lost);
  if (threadIdx.x % 32 == 0 && lost) atomicAdd(bins + kBins + 1, (unsigned long long)lost);
  __syncthreads();
  if (threadIdx.x < kNormSums && bins[threadIdx.x]) atomicAdd(sums + threadIdx.x, bins[threadIdx.x]);
  if (!begin.taken) return;

  // The last block sees what all have added.
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(sums + kTicket, 1) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  uint64_t* begun = reinterpret_cast<uint64_t*>(sums);
  if (threadIdx.x == 0) finish_norm(begun, begin.max_norm);
  __syncthreads();
  for (int64_t i = threadIdx.x; i < begin.parameters; i += kThreads)
    begin_parameter(begun, i, begin.parameters, begin.taken[i], begin.options[begin.taken[i].group]);
}

__global__ void scalars_kernel(const int64_t* steps, const double* lr, double beta1, double beta2, double eps,
                               double weight_decay, Scalars* out, int count) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) out[i] = scalars(steps[i], *lr, beta1, beta2, eps, weight_decay);
}

int blocks_for(const Table& table, int most) { return std::min((table.units + kWarps - 1) / kWarps, most); }

template <Weights kWeights, Moments kMoments>
void launch_both(const Table& table, const Step& step, unsigned long long* sums, int multiprocessors,
                 cudaStream_t stream) {
  const int blocks = blocks_for(table, multiprocessors * kBlocks);
  if (table.aligned)
    step_kernel<kWeights, kMoments, true><<<blocks, kThreads, 0, stream>>>(table, step, sums);
  else
    step_kernel<kWeights, kMoments, false><<<blocks, kThreads, 0, stream>>>(table, step, sums);
}

template <Weights kWeights>
void launch_as(const Table& table, const Step& step, Moments moments, unsigned long long* sums, int multiprocessors,
               cudaStream_t stream) {
  if (moments == Moments::kFp32)
    launch_both<kWeights, Moments::kFp32>(table, step, sums, multiprocessors, stream);
  else if (moments == Moments::kM4)
    launch_both<kWeights, Moments::kM4>(table, step, sums, multiprocessors, stream);
  else if (moments == Moments::kM3)
    launch_both<kWeights, Moments::kM3>(table, step, sums, multiprocessors, stream);
  else
    launch_both<kWeights, Moments::kM2>(table, step, sums, multiprocessors, stream);
}

}  // namespace

void launch_step(const Table& table, const Step& step, Weights weights, Moments moments, uint64_t* sums,
                 int multiprocessors, cudaStream_t stream) {
  auto* to = reinterpret_cast<unsigned long long*>(sums);
  if (weights == Weights::kFp32)
    launch_as<Weights::kFp32>(table, step, moments, to, multiprocessors, stream);
  else if (weights == Weights::kSplit32)
    launch_as<Weights::kSplit32>(table, step, moments, to, multiprocessors, stream);
  else if (weights == Weights::kSplit24)
    launch_as<Weights::kSplit24>(table, step, moments, to, multiprocessors, stream);
  else
    launch_as<Weights::kBf16Sr>(table, step, moments, to, multiprocessors, stream);
}

void launch_squares(const Table& table, const Begin& begin, uint64_t* sums, int multiprocessors, cudaStream_t stream) {
  const int blocks = std::max(blocks_for(table, multiprocessors * kSquareBlocks), 1);  // one begins what has no elements
  auto* to = reinterpret_cast<unsigned long long*>(sums);
  square_kernel<<<blocks, kThreads, 0, stream>>>(table, begin, to);
}

void launch_scalars(const int64_t* steps, const double* lr, double beta1, double beta2, double eps,
                    double weight_decay, Scalars* out, int count, cudaStream_t stream) {
  const int blocks = (count + 127) / 128;
  scalars_kernel<<<blocks, 128, 0, stream>>>(steps, lr, beta1, beta2, eps, weight_decay, out, count);
}

}  // namespace srpo
