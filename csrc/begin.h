// What a step finds out before it begins: the norm, and numbers of every parameter. Plain C++, the same on CPU and GPU.
#pragma once

#include "adamw_math.h"

namespace srpo {

// Of a parameter group, as words: the learning rate, or where it is on the device.
struct Options {
  double lr;
  const double* lr_at;
  double beta1, beta2, eps, weight_decay;
};

// Of a parameter, as words: the steps that it has taken, which are counted here, and its group.
struct Taken {
  float* steps;
  int64_t group;
};

// Layout of sums of squares: 32 bins, chunks whose sum is not finite, elements that are not finite.
constexpr int kNormSums = 34;
// After them in what begins a step: norm (double), coefficient (float), whether it is finite (bool), blocks that are done,
// then, for every parameter, the number of its step (int64) and its scalars (7 floats).
constexpr int kNorm = kNormSums, kCoefficient = kNorm + 1, kFinite = kNorm + 2, kTicket = kNorm + 3, kNumbers = kNorm + 4;

HD int64_t begun_words(int64_t parameters) { return kNumbers + parameters + (7 * parameters + 1) / 2; }

// What bins add up to: the tree of neighbours.
HD double total(const volatile uint64_t* bins) {
  double tree[kBins];
  for (int k = 0; k < kBins; ++k) {
    const uint64_t power = uint64_t(8 * k - 150 + 1023) << 52;
    double scale;
    std::memcpy(&scale, &power, sizeof scale);
    tree[k] = double(int64_t(bins[k])) * scale;
  }
  for (int half = kBins / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) tree[i] = tree[2 * i] + tree[2 * i + 1];
  return tree[0];
}

// The norm and what follows from it, from its sums. Without clipping `max_norm` is infinite.
HD void finish_norm(uint64_t* begun, double max_norm) {
  const bool finite = static_cast<volatile uint64_t*>(begun)[kBins] == 0;
  const double norm = finite ? std::sqrt(total(begun)) : std::nan(""), wanted = max_norm / (norm + 1e-6);
  const float coefficient = float(wanted > 1 ? 1 : wanted);
  std::memcpy(begun + kNorm, &norm, sizeof norm);
  std::memcpy(begun + kCoefficient, &coefficient, sizeof coefficient);
  begun[kFinite] = finite;
}

// Parameter `i` of `count`: its numbers, and that it takes this step if everything is finite.
HD void begin_parameter(uint64_t* begun, int64_t i, int64_t count, const Taken& taken, const Options& options) {
  const int64_t number = int64_t(*taken.steps) + 1;
  const double lr = options.lr_at ? *options.lr_at : options.lr;
  begun[kNumbers + i] = uint64_t(number);
  const Scalars found = scalars(number, lr, options.beta1, options.beta2, options.eps, options.weight_decay);
  std::memcpy(reinterpret_cast<float*>(begun + kNumbers + count) + 7 * i, &found, sizeof found);
  if (begun[kFinite]) *taken.steps = *taken.steps + 1.0f;
}

}  // namespace srpo
