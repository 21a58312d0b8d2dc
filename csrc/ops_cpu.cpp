// Library _C: the operators on the CPU. Their schemas are in srpo_kernels/extension.py.
#include <mutex>

#include "arguments.h"
#include "cpu/adamw.h"

namespace srpo {
namespace {

// Units that are worth a thread: about 20 microseconds.
constexpr int64_t kGrain = 16;

// Runs `work(begin, end, sums)` over all units in parallel; sums are exact, so their order does not matter.
template <class Work>
Tensor add_up(const Plan& plan, const Tensor& like, int size, const Work& work) {
  Tensor result = integers(like, size);
  uint64_t* total = static_cast<uint64_t*>(result.mutable_data_ptr());
  std::mutex mutex;
  torch::stable::parallel_for(0, plan.units(), kGrain, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> sums(size_t(size), 0);
    work(begin, end, sums.data());
    const std::lock_guard<std::mutex> lock(mutex);
    for (int i = 0; i < size; ++i) total[i] += sums[size_t(i)];
  });
  return result;
}

Tensor stepped(const Plan& plan, const Numbers& numbers, Weights weights, Moments moments, int64_t seed,
               double ema_decay, int64_t ema_every, const Tensor& like) {
  STD_TORCH_CHECK(ema_every > 0, "adamw: ema_every must be positive, got ", ema_every);
  const Step step{weights,
                  moments,
                  numbers.scalars,
                  numbers.steps,
                  *numbers.coefficient,
                  *numbers.finite,
                  keys_of(uint64_t(seed)),
                  float(1 - ema_decay),
                  ema_every};
  return add_up(plan, like, kTelemetry,
                [&](int64_t begin, int64_t end, uint64_t* sums) { step_units(plan, step, begin, end, sums); });
}

Tensor adamw_step(Tensors weights, Tensors remainders, Tensors first, Tensors first_scales, Tensors second,
                  Tensors second_scales, Tensors averages, Tensors gradients, Tensor scalars, Tensor steps,
                  Tensor coefficient, Tensor finite, std::vector<int64_t> starts, int64_t seed, double ema_decay,
                  int64_t ema_every, std::string weights_name, std::string moments_name) {
  const Weights weights_as = weights_mode(weights_name);
  const Moments moments_as = moments_mode(moments_name);
  const std::vector<Item> items = step_items(weights, remainders, first, first_scales, second, second_scales, averages,
                                             gradients, starts, weights_as, moments_as);
  const Numbers numbers = numbers_of(gradients, scalars, steps, coefficient, finite);
  return stepped(Plan(items), numbers, weights_as, moments_as, seed, ema_decay, ema_every, gradients[0]);
}

Tensor squares(const Plan& plan, const Tensor& like) {
  return add_up(plan, like, kNormSums,
                [&](int64_t begin, int64_t end, uint64_t* sums) { square_units(plan, begin, end, sums); });
}

Tensor sums_of_squares(Tensors gradients) {
  const std::vector<Item> items = items_of(gradients, {}, {});
  return squares(Plan(items), gradients[0]);
}

Tensor adamw_begin(Tensor like, Tensor plan, Tensor watched, Tensors lr, std::vector<double> numbers, double max_norm) {
  const int64_t count = plan.size(0);
  Planned* const begin = planned_at(plan, 0, count);
  const std::vector<Options> options = options_of(lr, numbers);
  const std::vector<Taken> taken = taken_of(begin, count, options.size());
  if (!in_place(watched)) return integers(like, 0);
  const Tensor sums = squares(plan_of(begin, count), like);
  Tensor result = integers(like, begun_words(count));
  uint64_t* begun = static_cast<uint64_t*>(result.mutable_data_ptr());
  std::memcpy(begun, sums.const_data_ptr(), kNormSums * sizeof *begun);
  finish_norm(begun, max_norm);
  for (int64_t i = 0; i < count; ++i)
    begin_parameter(begun, i, count, taken[size_t(i)], options[size_t(taken[size_t(i)].group)]);
  return result;
}

Tensor adamw_advance(Tensor plan, Tensor begun, int64_t first, int64_t count, int64_t seed, double ema_decay,
                     int64_t ema_every) {
  const Planned* begin = planned_at(plan, first, count);
  const Numbers numbers = numbers_at(begun, first, plan.size(0));
  return stepped(plan_of(begin, count), numbers, begin->weights, begin->moments, seed, ema_decay, ema_every,
                 begun);
}

Tensor adamw_scalars(Tensor steps, Tensor lr, double beta1, double beta2, double eps, double weight_decay) {
  check_scalars(steps, lr);
  Tensor result = torch::stable::new_empty(steps, {steps.numel(), 7}, ScalarType::Float);
  Scalars* out = static_cast<Scalars*>(result.mutable_data_ptr());
  const int64_t* number = steps.const_data_ptr<int64_t>();
  const double rate = *lr.const_data_ptr<double>();
  for (int64_t i = 0; i < steps.numel(); ++i) out[i] = srpo::scalars(number[i], rate, beta1, beta2, eps, weight_decay);
  return result;
}

}  // namespace
}  // namespace srpo

STABLE_TORCH_LIBRARY_IMPL(srpo, CPU, m) {
  m.impl("adamw_step", TORCH_BOX(&srpo::adamw_step));
  m.impl("sums_of_squares", TORCH_BOX(&srpo::sums_of_squares));
  m.impl("adamw_plan", TORCH_BOX(&srpo::adamw_plan));
  m.impl("adamw_watch", TORCH_BOX(&srpo::adamw_watch));
  m.impl("adamw_begin", TORCH_BOX(&srpo::adamw_begin));
  m.impl("adamw_advance", TORCH_BOX(&srpo::adamw_advance));
  m.impl("adamw_scalars", TORCH_BOX(&srpo::adamw_scalars));
}
