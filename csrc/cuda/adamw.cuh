// Launches of the CUDA kernels. Raw pointers and streams, no torch header.
#pragma once

#include <cuda_runtime.h>

#include "../begin.h"
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

// What a launch of squares does when all others are done: the last block begins the step.
struct Begin {
  const Taken* taken = nullptr;  // of every parameter; null if there is nothing to begin
  const Options* options = nullptr;
  int64_t parameters = 0;
  double max_norm = 0;
};

// 32 bins of the updates, 32 of the weights as stored, bf16 weights changed.
constexpr int kTelemetry = 65;

// Both add to `sums`, integers, so the order of blocks does not matter.
void launch_step(const Table& table, const Step& step, Weights weights, Moments moments, uint64_t* sums,
                 int multiprocessors, cudaStream_t stream);
void launch_squares(const Table& table, const Begin& begin, uint64_t* sums, int multiprocessors, cudaStream_t stream);
void launch_scalars(const int64_t* steps, const double* lr, double beta1, double beta2, double eps,
                    double weight_decay, Scalars* out, int count, cudaStream_t stream);

}  // namespace srpo
