// Launches of the CUDA kernels. Raw pointers and streams, no torch header.
#pragma once

#include <cuda_runtime.h>

#include "../planner.h"

namespace srpo {

// What all items of a step share; everything that depends on the training run is read on the device.
struct Step {
  const Scalars* scalars;  // and step numbers, of every item of the caller's list
  const int64_t* steps;
  const float* coefficient;
  const bool* finite;  // otherwise nothing is written
  Keys keys;  // of the seed
  float average_rate;
  int64_t average_every;
};

// Layout of `sums`: 32 bins, chunks whose sum is not finite, elements that are not finite.
constexpr int kNormSums = 34;
// 32 bins of the updates, 32 of the weights as stored, bf16 weights changed.
constexpr int kTelemetry = 65;

// Both add to `sums`, integers, so the order of blocks does not matter.
void launch_step(const Table& table, const Step& step, Weights weights, Moments moments, uint64_t* sums,
                 int multiprocessors, cudaStream_t stream);
void launch_squares(const Table& table, uint64_t* sums, int multiprocessors, cudaStream_t stream);
void launch_scalars(const int64_t* steps, const double* lr, double beta1, double beta2, double eps,
                    double weight_decay, Scalars* out, int count, cudaStream_t stream);

}  // namespace srpo
