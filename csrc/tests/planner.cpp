// Every element of every shard is in exactly one unit, no unit crosses a block or a chunk, and tables hold what was put.
#include "../planner.h"

#include <cstdio>
#include <cstdlib>

namespace {

void check(bool good, const char* what) {
  if (good) return;
  std::printf("failed: %s\n", what);
  std::exit(1);
}

void covers(const srpo::Shard& shard) {
  std::vector<int> seen(size_t(shard.rows * shard.columns), 0);
  const int64_t width = int64_t(1) << srpo::log2_width(shard.columns);
  check(width >= std::min<int64_t>(shard.columns, 1024) && (width == 1 || width / 2 < shard.columns), "width");
  for (int64_t index = 0; index < srpo::count_units(shard); ++index) {
    const srpo::Unit unit = srpo::unit_at(shard, index);
    check(unit.rows > 0 && unit.columns > 0 && unit.rows * width <= 1024, "size");
    check(unit.column % 1024 == 0 && unit.columns <= 1024, "chunk");
    check(unit.columns == shard.columns || unit.rows == 1, "contiguous");
    check(unit.columns == shard.columns - unit.column || unit.columns == 1024, "whole blocks");
    for (int64_t row = unit.row; row < unit.row + unit.rows; ++row)
      for (int64_t column = unit.column; column < unit.column + unit.columns; ++column)
        ++seen[size_t(row * shard.columns + column)];
  }
  for (int count : seen) check(count == 1, "covered once");
}

void packs(bool mixed) {
  std::vector<srpo::Item> items;
  for (int i = 0; i < 1500; ++i) {
    srpo::Item item{{i % 7 + 1, 8 * (i % 300) + 8, 4 * i}, i, srpo::Gradient(i % 3), {}};
    for (int slot : {srpo::kWeight, srpo::kGradient, srpo::kFirst})
      item.pointer[slot] = reinterpret_cast<void*>(uintptr_t(1) << 20 | uintptr_t(i) << 8 | uintptr_t(slot) << 4);
    if (i >= 1200) item.shard.columns += 1;
    items.push_back(item);
  }
  srpo::Plan plan(items);
  srpo::Launches launches(plan, mixed);
  check(launches.tables.size() == (mixed ? 1 : 2), "launches");
  size_t first = 0;
  int64_t units = 0;
  for (srpo::Table& table : launches.tables) {
    table.words = launches.words.data();
    check(table.stride == 6, "stride");
    for (int i = 0; i < table.items; ++i, ++first) {
      const srpo::Item& item = *plan.items[first];
      const uint64_t* words = srpo::entry(table, i);
      check(srpo::entry_start(words) == item.shard.start && srpo::entry_columns(words) == item.shard.columns, "shard");
      check(srpo::entry_rows(words) == item.shard.rows && srpo::entry_index(words) == item.index, "shard");
      check(srpo::entry_gradient(words) == item.gradient, "gradient");
      check(srpo::entry_aligned(words) == srpo::aligned(item), "alignment");
      check(mixed || srpo::aligned(item) == table.aligned, "alike");
      check(srpo::entry_first_unit(words) == units, "units");
      for (int slot = 0; slot < srpo::kSlots; ++slot)
        check(!table.position[slot] || words[table.position[slot]] == uintptr_t(item.pointer[slot]), "pointers");
      units += srpo::count_units(item.shard);
    }
    check(table.position[srpo::kWeight] == 3 && table.position[srpo::kFirst] == 5 && !table.position[srpo::kSecond],
          "positions");
    check(table.units == units, "all units");
    units = 0;
  }
  check(first == items.size(), "all items");
  plan = srpo::Plan(items);
  for (int64_t unit = 0; unit < plan.units(); unit += 17) {
    const size_t item = plan.item_of(unit);
    check(plan.first_unit[item] <= unit && unit < plan.first_unit[item + 1], "item of unit");
  }
}

}  // namespace

int main() {
  for (int64_t columns : {1, 2, 3, 4, 5, 7, 8, 9, 63, 64, 65, 127, 128, 129, 512, 513, 1000, 1023, 1024, 1025, 2048, 3072, 5000})
    for (int64_t rows : {0, 1, 2, 3, 17, 1025}) covers({rows, columns, 0});
  packs(false);
  packs(true);
  std::printf("planner ok\n");
}
