// The kernels of every instruction set that this processor has store the same bits and count the same changes.
#include "../cpu/adamw.cpp"

#include <cstdio>
#include <random>

namespace srpo {
namespace {

using Range = void (*)(const Plan&, const Step&, int64_t, int64_t, uint64_t*);
using Squares = void (*)(const Plan&, int64_t, int64_t, uint64_t*);

// Everything that a step of one matrix wrote, its telemetry last, and the sums of squares of its gradient.
struct Found {
  std::vector<std::vector<char>> tensors;
  uint64_t telemetry[kTelemetry] = {}, norm[kNormSums] = {};
};

Found run(Range step_range, Squares square_range, Weights weights, Moments moments, Gradient gradient, int64_t rows,
          int64_t columns) {
  std::mt19937 random(5);
  Found found;
  Item item{{rows, columns, int64_t(1) << 36 | 16 | (columns % 4)}, 0, gradient, {}};
  found.tensors.resize(kSlots);
  for (int slot = 0; slot < kSlots; ++slot) {
    // Bytes of small numbers in any format: scales and fp32 moments get a sensible exponent below.
    found.tensors[size_t(slot)].resize(size_t(4 * rows * columns));
    for (char& byte : found.tensors[size_t(slot)]) byte = char(random() % 0x70);
    item.pointer[slot] = found.tensors[size_t(slot)].data();
  }
  for (int slot : {kFirstScale, kSecondScale})
    for (int64_t i = 0; i < rows * columns; ++i) static_cast<float*>(item.pointer[slot])[i] = 0x1p-20f;
  Plan plan;
  plan.add(item);
  const Scalars numbers = scalars(7, 1e-3, 0.9, 0.999, 0, 0.01);
  const int64_t number = 7;
  const Step step{weights, moments, &numbers, &number, 0.5f, true, keys_of(99), 0.1f, 1};
  step_range(plan, step, 0, plan.units(), found.telemetry);
  square_range(plan, 0, plan.units(), found.norm);
  return found;
}

bool same(const Found& a, const Found& b) {
  return a.tensors == b.tensors && std::equal(a.norm, a.norm + kNormSums, b.norm) &&
         a.telemetry[2 * kBins] == b.telemetry[2 * kBins];
}

int compare() {
  int failures = 0;
#ifdef SRPO_SETS
  for (int weights = 0; weights < 4; ++weights)
    for (int moments = 0; moments < 4; ++moments)
      for (int64_t columns : {1, 3, 31, 64, 129, 1000, 1500}) {
        const auto found = [&](Range range, Squares squares) {
          return run(range, squares, Weights(weights), Moments(moments), Gradient(columns % 3), 7, columns);
        };
        const Found expected = found(plain::step_range, plain::square_range);
        if (__builtin_cpu_supports("avx2")) failures += !same(found(avx2::step_range, avx2::square_range), expected);
        if (has_avx512()) failures += !same(found(avx512::step_range, avx512::square_range), expected);
      }
#endif
  return failures;
}

}  // namespace
}  // namespace srpo

int main() {
  const int failures = srpo::compare();
  std::printf("runs that differ: %d\n", failures);
  return failures != 0;
}
