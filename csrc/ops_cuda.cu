// Library _C_cuda: the operators on CUDA. Their schemas are in srpo_kernels/extension.py; device code is in cuda/.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <memory>

#include "arguments.h"
#include "cuda/adamw.cuh"

namespace srpo {
namespace {

// The device of a tensor made current, and its stream.
struct Place {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
  int multiprocessors = 0;

  explicit Place(const Tensor& tensor) : guard(tensor.get_device_index()) {
    void* found = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &found));
    stream = static_cast<cudaStream_t>(found);
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, tensor.get_device_index()));
  }
};

// One launch for as many items as a table takes: 506 that are stepped alike, 1349 gradients.
template <class Launch>
void each_table(Plan& plan, bool mixed, const Launch& launch) {
  const auto table = std::make_unique<Table>();
  if (!mixed) std::stable_partition(plan.items.begin(), plan.items.end(), aligned);
  for (size_t next = 0; next < plan.items.size();) {
    next = pack(plan.items, next, mixed, *table);
    launch(*table);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

Tensor adamw_step(Tensors weights, Tensors remainders, Tensors first, Tensors first_scales, Tensors second,
                  Tensors second_scales, Tensors averages, Tensors gradients, Tensor scalars, Tensor steps,
                  Tensor coefficient, Tensor finite, std::vector<int64_t> starts, int64_t seed, double ema_decay,
                  int64_t ema_every, std::string weights_name, std::string moments_name) {
  const Weights weights_as = weights_mode(weights_name);
  const Moments moments_as = moments_mode(moments_name);
  Plan plan = step_plan(weights, remainders, first, first_scales, second, second_scales, averages, gradients,
                        scalars, steps, coefficient, finite, starts, ema_every, weights_as, moments_as);
  const Place place(gradients[0]);
  const Step step{static_cast<const Scalars*>(scalars.const_data_ptr()),
                  steps.const_data_ptr<int64_t>(),
                  coefficient.const_data_ptr<float>(),
                  finite.const_data_ptr<bool>(),
                  keys_of(uint64_t(seed)),
                  float(1 - ema_decay),
                  ema_every};
  Tensor result = integers(gradients[0], kTelemetry);
  uint64_t* sums = static_cast<uint64_t*>(result.mutable_data_ptr());
  each_table(plan, false, [&](const Table& table) {
    launch_step(table, step, weights_as, moments_as, sums, place.multiprocessors, place.stream);
  });
  return result;
}

Tensor sums_of_squares(Tensors gradients) {
  Plan plan = plan_of(gradients, {}, {});
  const Place place(gradients[0]);
  Tensor result = integers(gradients[0], kNormSums);
  uint64_t* sums = static_cast<uint64_t*>(result.mutable_data_ptr());
  each_table(plan, true, [&](const Table& table) { launch_squares(table, sums, place.multiprocessors, place.stream); });
  return result;
}

Tensor adamw_scalars(Tensor steps, Tensor lr, double beta1, double beta2, double eps, double weight_decay) {
  check_scalars(steps, lr);
  const Place place(steps);
  const int count = int(steps.numel());
  Tensor result = torch::stable::new_empty(steps, {count, 7}, ScalarType::Float);
  if (count == 0) return result;
  launch_scalars(steps.const_data_ptr<int64_t>(), lr.const_data_ptr<double>(), beta1, beta2, eps, weight_decay,
                 static_cast<Scalars*>(result.mutable_data_ptr()), count, place.stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

}  // namespace
}  // namespace srpo

STABLE_TORCH_LIBRARY_IMPL(srpo, CUDA, m) {
  m.impl("adamw_step", TORCH_BOX(&srpo::adamw_step));
  m.impl("sums_of_squares", TORCH_BOX(&srpo::sums_of_squares));
  m.impl("adamw_scalars", TORCH_BOX(&srpo::adamw_scalars));
}
