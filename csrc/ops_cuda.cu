// Library _C_cuda: the operators on CUDA. Their schemas are in srpo_kernels/extension.py; device code is in cuda/.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <cstring>
#include <mutex>

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

// A copy of `words` on the device of `like`. A graph that is being captured finds it there: it is written at once, by
// another stream, and kept for good.
Tensor uploaded(const std::vector<uint64_t>& words, const Tensor& like, cudaStream_t stream) {
  const int64_t count = int64_t(words.size());
  Tensor result = torch::stable::new_empty(like, {count}, ScalarType::Long);
  if (count == 0) return result;
  const size_t bytes = words.size() * sizeof words[0];
  cudaStreamCaptureStatus capturing;
  STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &capturing));
  if (capturing == cudaStreamCaptureStatusNone) {
    // Pinned memory is not given to others before the copy has been made.
    const torch::stable::Device host(torch::headeronly::DeviceType::CPU);
    Tensor pinned = torch::stable::empty({count}, ScalarType::Long, std::nullopt, host, true);
    std::memcpy(pinned.mutable_data_ptr(), words.data(), bytes);
    torch::stable::copy_(result, pinned, true);
    return result;
  }
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  STD_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
  cudaStream_t other;
  STD_CUDA_CHECK(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
  STD_CUDA_CHECK(cudaMemcpyAsync(result.mutable_data_ptr(), words.data(), bytes, cudaMemcpyHostToDevice, other));
  STD_CUDA_CHECK(cudaStreamSynchronize(other));
  STD_CUDA_CHECK(cudaStreamDestroy(other));
  STD_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
  static std::mutex mutex;
  static auto* const kept = new std::vector<Tensor>;
  const std::lock_guard<std::mutex> lock(mutex);
  kept->push_back(result);
  return result;
}

// Zeros, by no kernel.
Tensor cleared(const Tensor& like, int64_t size, int64_t zeros, cudaStream_t stream) {
  Tensor result = torch::stable::new_empty(like, {size}, ScalarType::Long);
  STD_CUDA_CHECK(cudaMemsetAsync(result.mutable_data_ptr(), 0, size_t(zeros) * sizeof(int64_t), stream));
  return result;
}

Tensor stepped(Plan plan, const Numbers& numbers, Weights weights, Moments moments, int64_t seed, double ema_decay,
               int64_t ema_every, const Tensor& like) {
  STD_TORCH_CHECK(ema_every > 0, "adamw: ema_every must be positive, got ", ema_every);
  const Place place(like);
  const Step step{numbers.scalars, numbers.steps, numbers.coefficient, numbers.finite, keys_of(uint64_t(seed)),
                  float(1 - ema_decay), ema_every};
  Tensor result = cleared(like, kTelemetry, kTelemetry, place.stream);
  uint64_t* sums = static_cast<uint64_t*>(result.mutable_data_ptr());
  Launches launches(plan, false);
  const Tensor words = uploaded(launches.words, like, place.stream);
  for (Table& table : launches.tables) {
    table.words = static_cast<const uint64_t*>(words.const_data_ptr());
    launch_step(table, step, weights, moments, sums, place.multiprocessors, place.stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return result;
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

Tensor sums_of_squares(Tensors gradients) {
  const std::vector<Item> items = items_of(gradients, {}, {});
  Plan plan(items);
  const Place place(gradients[0]);
  Tensor result = cleared(gradients[0], kNormSums, kNormSums, place.stream);
  Launches launches(plan, true);
  const Tensor words = uploaded(launches.words, gradients[0], place.stream);
  for (Table& table : launches.tables) {
    table.words = static_cast<const uint64_t*>(words.const_data_ptr());
    launch_squares(table, Begin{}, static_cast<uint64_t*>(result.mutable_data_ptr()), place.multiprocessors,
                   place.stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return result;
}

// Appends as words what has a whole number of them, and returns where.
template <class T>
size_t append(std::vector<uint64_t>& words, const std::vector<T>& list) {
  static_assert(sizeof(T) % sizeof(uint64_t) == 0, "words");
  const size_t at = words.size();
  words.resize(at + list.size() * sizeof(T) / sizeof(uint64_t));
  std::memcpy(words.data() + at, list.data(), list.size() * sizeof(T));
  return at;
}

Tensor adamw_begin(Tensor like, Tensor plan, Tensor watched, Tensors lr, std::vector<double> numbers, double max_norm) {
  const int64_t count = plan.size(0);
  Planned* const begin = planned_at(plan, 0, count);
  const std::vector<Options> every = options_of(lr, numbers);
  const std::vector<Taken> all = taken_of(begin, count, every.size());
  if (!in_place(watched)) return torch::stable::new_empty(like, {0}, ScalarType::Long);
  const Place place(like);
  Plan matrices = plan_of(begin, count);
  Launches launches(matrices, true);
  if (launches.tables.empty()) launches.tables.emplace_back();
  const size_t taken = append(launches.words, all), options = append(launches.words, every);
  const Tensor uploads = uploaded(launches.words, like, place.stream);
  const uint64_t* words = static_cast<const uint64_t*>(uploads.const_data_ptr());
  Tensor result = cleared(like, begun_words(count), kNumbers, place.stream);
  const Begin last{reinterpret_cast<const Taken*>(words + taken), reinterpret_cast<const Options*>(words + options),
                   count, max_norm};
  for (Table& table : launches.tables) {
    table.words = words;
    launch_squares(table, &table == &launches.tables.back() ? last : Begin{},
                   static_cast<uint64_t*>(result.mutable_data_ptr()), place.multiprocessors, place.stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
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
  m.impl("adamw_plan", TORCH_BOX(&srpo::adamw_plan));
  m.impl("adamw_watch", TORCH_BOX(&srpo::adamw_watch));
  m.impl("adamw_begin", TORCH_BOX(&srpo::adamw_begin));
  m.impl("adamw_advance", TORCH_BOX(&srpo::adamw_advance));
  m.impl("adamw_scalars", TORCH_BOX(&srpo::adamw_scalars));
}
