// Checks of an op's arguments, and the plan of its tensors: shared by the CPU and the CUDA binding.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

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

inline Plan plan_of(const Tensors& gradients, const std::vector<Stored>& lists, const std::vector<int64_t>& starts) {
  STD_TORCH_CHECK(!gradients.empty(), "adamw: no gradients");
  for (const Stored& list : lists) {
    const size_t expected = list.present ? gradients.size() : 0;
    STD_TORCH_CHECK(list.tensors->size() == expected, "adamw: ", list.name, " must be ", expected, " tensors, got ",
                    list.tensors->size());
  }
  std::vector<Item> items;
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
    if (gradient.numel() > 0) items.push_back(item);
  }
  return Plan(std::move(items));
}

inline Plan step_plan(const Tensors& weights, const Tensors& remainders, const Tensors& first,
                      const Tensors& first_scales, const Tensors& second, const Tensors& second_scales,
                      const Tensors& averages, const Tensors& gradients, const Tensor& scalars, const Tensor& steps,
                      const Tensor& coefficient, const Tensor& finite, const std::vector<int64_t>& starts,
                      int64_t average_every, Weights weights_as, Moments moments_as) {
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
  STD_TORCH_CHECK(average_every > 0, "adamw: ema_every must be positive, got ", average_every);
  Plan plan = plan_of(gradients, lists, starts);
  const int64_t count = int64_t(gradients.size());
  check_vector(scalars, gradients[0], fp32, 7 * count, "scalars");
  check_vector(steps, gradients[0], ScalarType::Long, count, "steps");
  check_vector(coefficient, gradients[0], fp32, 1, "coefficient");
  check_vector(finite, gradients[0], ScalarType::Bool, 1, "finite");
  return plan;
}

inline void check_scalars(const Tensor& steps, const Tensor& lr) {
  check_vector(steps, steps, ScalarType::Long, steps.numel(), "steps");
  check_vector(lr, steps, ScalarType::Double, 1, "lr");
}

// Where the steps of every parameter are counted, and the options of every group.
struct Beginning {
  std::vector<Taken> taken;
  std::vector<Options> options;
};

inline Beginning beginning_of(const Tensors& gradients, const Tensors& steps, const std::vector<int64_t>& groups,
                              const Tensors& lr, const std::vector<double>& numbers) {
  STD_TORCH_CHECK(steps.size() == gradients.size() && groups.size() == gradients.size(),
                  "adamw: steps and groups must be one for each gradient");
  STD_TORCH_CHECK(numbers.size() == 4 * lr.size(), "adamw: numbers must be four for each lr");
  Beginning found;
  for (size_t i = 0; i < lr.size(); ++i) {
    STD_TORCH_CHECK(lr[i].scalar_type() == ScalarType::Double && lr[i].numel() == 1, "adamw: lr must be one double each");
    const double* at = lr[i].const_data_ptr<double>();
    const double* four = &numbers[4 * i];
    if (lr[i].is_cpu())
      found.options.push_back({*at, nullptr, four[0], four[1], four[2], four[3]});
    else
      found.options.push_back({0, at, four[0], four[1], four[2], four[3]});
  }
  for (size_t i = 0; i < steps.size(); ++i) {
    check_vector(steps[i], gradients[0], ScalarType::Float, 1, "steps");
    STD_TORCH_CHECK(groups[i] >= 0 && size_t(groups[i]) < lr.size(), "adamw: no group ", groups[i]);
    found.taken.push_back({steps[i].mutable_data_ptr<float>(), groups[i]});
  }
  return found;
}

inline Tensor integers(const Tensor& like, int64_t size) {
  return torch::stable::new_zeros(like, {size}, ScalarType::Long);
}

}  // namespace srpo
