// Checks of an op's arguments, and the plan of its tensors: shared by the CPU and the CUDA binding.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "begin.h"
#include "planner.h"

namespace srpo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

inline Weights weights_mode(const std::string& name) {
  if (name == "fp32") return Weights::kFp32;
  if (name == "split32") return Weights::kSplit32;
  if (name == "split24") return Weights::kSplit24;
  STD_TORCH_CHECK(name == "bf16_sr", "adamw: unknown weights ", name);
  return Weights::kBf16Sr;
}

inline Moments moments_mode(const std::string& name) {
  if (name == "fp32") return Moments::kFp32;
  if (name == "M4") return Moments::kM4;
  if (name == "M3") return Moments::kM3;
  STD_TORCH_CHECK(name == "M2", "adamw: unknown moments ", name);
  return Moments::kM2;
}

inline Gradient gradient_type(const Tensor& gradient) {
  const ScalarType type = gradient.scalar_type();
  if (type == ScalarType::Float) return Gradient::kFp32;
  if (type == ScalarType::Half) return Gradient::kFp16;
  STD_TORCH_CHECK(type == ScalarType::BFloat16, "adamw: gradients must be fp32, fp16 or bf16");
  return Gradient::kBf16;
}

inline void check_on(const Tensor& tensor, const Tensor& like, const char* what) {
  STD_TORCH_CHECK(tensor.device() == like.device(), "adamw: ", what, " are on another device than gradients[0]");
  STD_TORCH_CHECK(tensor.is_contiguous(), "adamw: ", what, " must be contiguous");
}

inline void check_vector(const Tensor& tensor, const Tensor& like, ScalarType type, int64_t size, const char* what) {
  check_on(tensor, like, what);
  STD_TORCH_CHECK(tensor.scalar_type() == type, "adamw: ", what, " have another dtype than expected");
  STD_TORCH_CHECK(tensor.numel() == size, "adamw: ", what, " must have ", size, " elements, got ", tensor.numel());
}

// A list of the tensors that a mode stores: one per gradient, or none.
struct Stored {
  Slot slot;
  const Tensors* tensors;
  bool present;
  ScalarType type;
  const char* name;
};

inline Shard shard_of(const Tensor& gradient, int64_t start) {
  const int64_t rows = gradient.dim() > 0 ? gradient.size(0) : 1;
  return {rows, rows > 0 ? gradient.numel() / rows : 0, start};
}

inline std::vector<Item> items_of(const Tensors& gradients, const std::vector<Stored>& lists,
                                  const std::vector<int64_t>& starts) {
  STD_TORCH_CHECK(!gradients.empty(), "adamw: no gradients");
  for (const Stored& list : lists) {
    const size_t expected = list.present ? gradients.size() : 0;
    STD_TORCH_CHECK(list.tensors->size() == expected, "adamw: ", list.name, " must be ", expected, " tensors, got ",
                    list.tensors->size());
  }
  std::vector<Item> items;
  items.reserve(gradients.size());
  for (size_t i = 0; i < gradients.size(); ++i) {
    const Tensor& gradient = gradients[i];
    check_on(gradient, gradients[0], "gradients");
    Item item{shard_of(gradient, starts.empty() ? 0 : starts[i]), int32_t(i), gradient_type(gradient), {}};
    item.pointer[kGradient] = const_cast<void*>(gradient.const_data_ptr());
    for (const Stored& list : lists) {
      if (!list.present) continue;
      const Tensor& tensor = (*list.tensors)[i];
      const bool scale = list.slot == kFirstScale || list.slot == kSecondScale;
      const int64_t scales = item.shard.rows * ((item.shard.columns + kBlock - 1) / kBlock);
      check_vector(tensor, gradients[0], list.type, scale ? scales : gradient.numel(), list.name);
      item.pointer[list.slot] = tensor.mutable_data_ptr();
    }
    items.push_back(item);
  }
  return items;
}

inline std::vector<Item> step_items(const Tensors& weights, const Tensors& remainders, const Tensors& first,
                                    const Tensors& first_scales, const Tensors& second, const Tensors& second_scales,
                                    const Tensors& averages, const Tensors& gradients,
                                    const std::vector<int64_t>& starts, Weights weights_as, Moments moments_as) {
  const bool wide = weights_as == Weights::kFp32, exact = moments_as == Moments::kFp32;
  const bool split = weights_as == Weights::kSplit32 || weights_as == Weights::kSplit24;
  const bool codes = moments_as == Moments::kM3 || moments_as == Moments::kM2, roots = moments_as == Moments::kM2;
  const ScalarType rest = weights_as == Weights::kSplit32 ? ScalarType::Short : ScalarType::Char;
  const ScalarType fp32 = ScalarType::Float, bf16 = ScalarType::BFloat16, byte = ScalarType::Byte;
  const std::vector<Stored> lists = {
      {kWeight, &weights, true, wide ? fp32 : bf16, "weights"},
      {kRemainder, &remainders, split, rest, "remainders"},
      {kFirst, &first, true, exact ? fp32 : codes ? byte : bf16, "first moments"},
      {kFirstScale, &first_scales, codes, fp32, "scales of first moments"},
      {kSecond, &second, true, exact ? fp32 : roots ? byte : bf16, "second moments"},
      {kSecondScale, &second_scales, roots, fp32, "scales of second moments"},
      {kAverage, &averages, !averages.empty(), fp32, "averages"},
  };
  STD_TORCH_CHECK(starts.size() == gradients.size(), "adamw: starts must be ", gradients.size(), " numbers, got ",
                  starts.size());
  return items_of(gradients, lists, starts);
}

// What steps of a list of parameters read on the device, or here.
struct Numbers {
  const Scalars* scalars;
  const int64_t* steps;
  const float* coefficient;
  const bool* finite;
};

inline Numbers numbers_of(const Tensors& gradients, const Tensor& scalars, const Tensor& steps,
                          const Tensor& coefficient, const Tensor& finite) {
  const int64_t count = int64_t(gradients.size());
  check_vector(scalars, gradients[0], ScalarType::Float, 7 * count, "scalars");
  check_vector(steps, gradients[0], ScalarType::Long, count, "steps");
  check_vector(coefficient, gradients[0], ScalarType::Float, 1, "coefficient");
  check_vector(finite, gradients[0], ScalarType::Bool, 1, "finite");
  return {static_cast<const Scalars*>(scalars.const_data_ptr()), steps.const_data_ptr<int64_t>(),
          coefficient.const_data_ptr<float>(), finite.const_data_ptr<bool>()};
}

inline void check_scalars(const Tensor& steps, const Tensor& lr) {
  check_vector(steps, steps, ScalarType::Long, steps.numel(), "steps");
  check_vector(lr, steps, ScalarType::Double, 1, "lr");
}

// What is kept of a parameter between steps, as words.
struct Planned {
  Item item;
  Taken taken;
  Weights weights;
  Moments moments;
};
constexpr int64_t kPlanned = sizeof(Planned) / sizeof(uint64_t);

inline Tensor adamw_plan(Tensors weights, Tensors remainders, Tensors first, Tensors first_scales, Tensors second,
                         Tensors second_scales, Tensors averages, Tensors gradients, Tensors steps,
                         std::vector<int64_t> starts, int64_t group, std::string weights_name,
                         std::string moments_name) {
  const Weights weights_as = weights_mode(weights_name);
  const Moments moments_as = moments_mode(moments_name);
  const std::vector<Item> items = step_items(weights, remainders, first, first_scales, second, second_scales, averages,
                                             gradients, starts, weights_as, moments_as);
  STD_TORCH_CHECK(steps.size() == items.size(), "adamw: steps must be ", items.size(), " tensors, got ", steps.size());
  const torch::stable::Device host(torch::headeronly::DeviceType::CPU);
  Tensor plan = torch::stable::empty({int64_t(items.size()), kPlanned}, ScalarType::Long, std::nullopt, host);
  Planned* to = static_cast<Planned*>(plan.mutable_data_ptr());
  for (size_t i = 0; i < items.size(); ++i) {
    check_vector(steps[i], gradients[0], ScalarType::Float, 1, "steps");
    to[i] = {items[i], {steps[i].mutable_data_ptr<float>(), group}, weights_as, moments_as};
  }
  return plan;
}

// Parameters [first, first + count) of `plan`.
inline Planned* planned_at(const Tensor& plan, int64_t first, int64_t count) {
  const bool fits = plan.dim() == 2 && plan.size(1) == kPlanned && plan.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(fits && plan.is_cpu() && plan.is_contiguous(), "adamw: plan is not what adamw_plan returns");
  STD_TORCH_CHECK(first >= 0 && count > 0 && first + count <= plan.size(0), "adamw: no parameters ", first, " to ",
                  first + count, " in a plan of ", plan.size(0));
  return static_cast<Planned*>(plan.mutable_data_ptr()) + first;
}

inline Plan plan_of(const Planned* begin, int64_t count) {
  Plan plan;
  for (int64_t i = 0; i < count; ++i) plan.add(begin[i].item);
  return plan;
}

// Tensors, kept so that nothing else gets their memory, and where they are.
struct Watched {
  Tensors tensors;
  std::vector<const void*> addresses;
};

// What adamw_watch returns is such an object.
inline Tensor adamw_watch(Tensors tensors) {
  auto watched = std::make_unique<Watched>(Watched{std::move(tensors), {}});
  for (const Tensor& tensor : watched->tensors) watched->addresses.push_back(tensor.const_data_ptr());
  const torch::stable::Device host(torch::headeronly::DeviceType::CPU);
  const int64_t size = sizeof(Watched), stride = 1;
  const auto let_go = [](void* object) { delete static_cast<Watched*>(object); };
  Tensor result =
      torch::stable::from_blob(watched.get(), {&size, 1}, {&stride, 1}, host, ScalarType::Byte, let_go);
  watched.release();
  return result;
}

inline bool in_place(const Tensor& object) {
  const bool fits = object.scalar_type() == ScalarType::Byte && object.numel() == sizeof(Watched);
  STD_TORCH_CHECK(fits && object.is_cpu(), "adamw: watched is not what adamw_watch returns");
  const auto* const watched = static_cast<const Watched*>(object.const_data_ptr());
  const auto is_at = [](const Tensor& tensor, const void* address) { return tensor.const_data_ptr() == address; };
  return std::equal(watched->tensors.begin(), watched->tensors.end(), watched->addresses.begin(), is_at);
}

// The options of every group: `lr`, which is read now if it is here, and four of `numbers`.
inline std::vector<Options> options_of(const Tensors& lr, const std::vector<double>& numbers) {
  STD_TORCH_CHECK(numbers.size() == 4 * lr.size(), "adamw: numbers must be four for each lr");
  std::vector<Options> options;
  for (size_t i = 0; i < lr.size(); ++i) {
    STD_TORCH_CHECK(lr[i].scalar_type() == ScalarType::Double && lr[i].numel() == 1, "adamw: lr must be one double each");
    const double* at = lr[i].const_data_ptr<double>();
    const double* four = &numbers[4 * i];
    if (lr[i].is_cpu())
      options.push_back({*at, nullptr, four[0], four[1], four[2], four[3]});
    else
      options.push_back({0, at, four[0], four[1], four[2], four[3]});
  }
  return options;
}

inline std::vector<Taken> taken_of(const Planned* begin, int64_t count, size_t groups) {
  std::vector<Taken> taken;
  taken.reserve(size_t(count));
  for (int64_t i = 0; i < count; ++i) {
    taken.push_back(begin[i].taken);
    STD_TORCH_CHECK(size_t(taken.back().group) < groups, "adamw: no group ", taken.back().group);
  }
  return taken;
}

// Where adamw_begin put the numbers of parameters from `first` on, of `count` in all.
inline Numbers numbers_at(const Tensor& begun, int64_t first, int64_t count) {
  const bool fits = begun.scalar_type() == ScalarType::Long && begun.numel() == begun_words(count);
  STD_TORCH_CHECK(fits && begun.is_contiguous(), "adamw: begun is not what adamw_begin returns");
  const uint64_t* words = static_cast<const uint64_t*>(begun.const_data_ptr());
  return {reinterpret_cast<const Scalars*>(words + kNumbers + count) + first,
          reinterpret_cast<const int64_t*>(words + kNumbers) + first,
          reinterpret_cast<const float*>(words + kCoefficient), reinterpret_cast<const bool*>(words + kFinite)};
}

inline Tensor integers(const Tensor& like, int64_t size) {
  return torch::stable::new_zeros(like, {size}, ScalarType::Long);
}

}  // namespace srpo
