// The kernels of units.h for three instruction sets, one of which is chosen at run time. What is stored has the same
// bits in all of them; telemetry's sums have the same up to the order of their additions.
#include "adamw.h"

#include <type_traits>
#include <utility>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace srpo {
namespace {

#define SRPO_VECTORS(BYTES)                                   \
  typedef float Floats##BYTES [[gnu::vector_size(BYTES)]];    \
  typedef uint32_t Words##BYTES [[gnu::vector_size(BYTES)]];  \
  }                                                           \
  template <>                                                 \
  struct Other<Floats##BYTES> {                               \
    using Type = Words##BYTES;                                \
  };                                                          \
  template <>                                                 \
  struct Other<Words##BYTES> {                                \
    using Type = Floats##BYTES;                               \
  };                                                          \
  namespace {
SRPO_VECTORS(16)
SRPO_VECTORS(32)
SRPO_VECTORS(64)
#undef SRPO_VECTORS

// Calls `use(item, unit)` for units [begin, end).
template <class Use>
HD void each_unit(const Plan& plan, int64_t begin, int64_t end, const Use& use) {
  for (size_t place = plan.item_of(begin); begin < end; ++place)
    for (const Item& item = *plan.items[place]; begin < std::min(end, plan.first_unit[place + 1]); ++begin)
      use(item, unit_at(item.shard, begin - plan.first_unit[place]));
}

namespace plain {
#define SRPO_BYTES 16
#include "lanes.h"
#include "units.h"
#undef SRPO_BYTES
}  // namespace plain

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SRPO_SETS 1

#pragma GCC push_options
#pragma GCC target("avx2")
namespace avx2 {
#define SRPO_BYTES 32
#include "lanes.h"
#include "units.h"
#undef SRPO_BYTES
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
namespace avx512 {
#define SRPO_BYTES 64
#include "lanes.h"
#include "units.h"
#undef SRPO_BYTES
}  // namespace avx512
#pragma GCC pop_options

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

}  // namespace

void step_units(const Plan& plan, const Step& step, int64_t begin, int64_t end, uint64_t* telemetry) {
#ifdef SRPO_SETS
  if (has_avx512()) return avx512::step_range(plan, step, begin, end, telemetry);
  if (__builtin_cpu_supports("avx2")) return avx2::step_range(plan, step, begin, end, telemetry);
#endif
  plain::step_range(plan, step, begin, end, telemetry);
}

void square_units(const Plan& plan, int64_t begin, int64_t end, uint64_t* sums) {
#ifdef SRPO_SETS
  if (has_avx512()) return avx512::square_range(plan, begin, end, sums);
  if (__builtin_cpu_supports("avx2")) return avx2::square_range(plan, begin, end, sums);
#endif
  plain::square_range(plan, begin, end, sums);
}

}  // namespace srpo
