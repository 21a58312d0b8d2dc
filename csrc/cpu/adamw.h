// The step and the norm on the CPU, over a range of a plan's units. Raw pointers, no torch header.
#pragma once

#include "../begin.h"
#include "../planner.h"

namespace srpo {

struct Step {
  Weights weights;
  Moments moments;
  const Scalars* scalars;  // and step numbers, of every item of the list
  const int64_t* steps;
  float coefficient;
  bool finite;  // otherwise nothing is written
  Keys keys;  // of the seed
  float average_rate;
  int64_t average_every;
};

// 32 bins of the updates, 32 of the weights as stored, bf16 weights changed.
constexpr int kTelemetry = 65;

void step_units(const Plan& plan, const Step& step, int64_t begin, int64_t end, uint64_t* telemetry);
void square_units(const Plan& plan, int64_t begin, int64_t end, uint64_t* sums);

}  // namespace srpo
