// How many launches lists of matrices take. Reads lines "rows columns list"; prints the launches of the norm of all, and
// then of every list's step.
#include "../planner.h"

#include <cstdio>
#include <map>

int main() {
  std::vector<srpo::Item> all;
  std::map<int, std::vector<srpo::Item>> lists;
  long long rows, columns;
  for (int list; std::scanf("%lld %lld %d", &rows, &columns, &list) == 3;) {
    srpo::Item item{{rows, columns, 0}, 0, srpo::Gradient::kBf16, {}};
    item.pointer[srpo::kGradient] = reinterpret_cast<void*>(uintptr_t(512));
    all.push_back(item);
    for (void*& pointer : item.pointer) pointer = reinterpret_cast<void*>(uintptr_t(512));
    lists[list].push_back(item);
  }
  srpo::Plan plan(all);
  std::printf("%zu", srpo::Launches(plan, true).tables.size());
  for (auto& [list, items] : lists) {
    srpo::Plan step(items);
    std::printf(" %zu", srpo::Launches(step, false).tables.size());
  }
}
