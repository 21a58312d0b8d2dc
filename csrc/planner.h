// How a list of parameter shards is cut into units of work, and how a launch's table is packed. Plain C++, no CUDA.
//
// A unit has 1024 slots: 1024 columns of one row, or, of narrower matrices, several whole rows, each filled up to a
// power of two. So a unit crosses neither a block of 128 nor a chunk of 1024, and its elements are contiguous.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "adamw_math.h"

namespace srpo {

// Rows of a parameter that are here; `start` is the place of the first element in the parameter list.
struct Shard {
  int64_t rows, columns, start;
};

// Rows [row, row + rows) of columns [column, column + columns).
struct Unit {
  int64_t row, rows, column, columns;
};

// log2 of the slots that a row takes in a unit.
HD int log2_width(int64_t columns) {
  int log2 = 0;
  while (log2 < 10 && int64_t(1) << log2 < columns) ++log2;
  return log2;
}

HD int64_t units_per_row(int64_t columns) { return (columns + kChunk - 1) / kChunk; }

HD int64_t count_units(const Shard& shard) {
  const int64_t rows = int64_t(kChunk) >> log2_width(shard.columns);
  return (shard.rows + rows - 1) / rows * units_per_row(shard.columns);
}

HD Unit unit_at(const Shard& shard, int64_t index) {
  const int64_t rows = int64_t(kChunk) >> log2_width(shard.columns), across = units_per_row(shard.columns);
  const uint32_t down = uint32_t(index) / uint32_t(across), right = uint32_t(index) % uint32_t(across);  // below 2^31
  const int64_t row = down * rows, column = int64_t(right) * kChunk;
  const int64_t rows_left = shard.rows - row, columns_left = shard.columns - column;
  return {row, rows < rows_left ? rows : rows_left, column, columns_left < kChunk ? columns_left : kChunk};
}

// Where a parameter's tensors are; null for what its mode does not store.
enum Slot { kWeight, kRemainder, kGradient, kFirst, kFirstScale, kSecond, kSecondScale, kAverage, kSlots };

struct Item {
  Shard shard;
  int32_t index;  // in the caller's list, of which empty shards are left out here
  Gradient gradient;
  void* pointer[kSlots];
};

struct Plan {
  std::vector<Item> items;
  std::vector<int64_t> first_unit;  // of each item, and the number of all units

  explicit Plan(std::vector<Item> list) : items(std::move(list)), first_unit(1, 0) {
    for (const Item& item : items) first_unit.push_back(first_unit.back() + count_units(item.shard));
  }
  int64_t units() const { return first_unit.back(); }
  size_t item_of(int64_t unit) const {
    return size_t(std::upper_bound(first_unit.begin(), first_unit.end(), unit) - first_unit.begin() - 1);
  }
};

// A launch's items by value in its arguments (32764 bytes at most, a step's numbers included), so that a captured graph
// keeps them. Per item: columns and first unit; rows, gradient type, alignment and index; then the start and the
// pointers that the launch needs.
struct Table {
  static constexpr int kWords = 4048, kHeader = 2;
  int32_t items = 0, stride = 0, units = 0;
  int8_t start = 0, position[kSlots] = {};  // of the start and of each pointer in an entry, or 0
  uint64_t words[kWords];
};

HD const uint64_t* entry(const Table& table, int item) { return table.words + item * table.stride; }
HD int64_t entry_start(const Table& table, const uint64_t* words) {
  return table.start ? int64_t(words[table.start]) : 0;
}
HD int32_t entry_columns(const uint64_t* words) { return int32_t(words[0]); }
HD int32_t entry_first_unit(const uint64_t* words) { return int32_t(words[0] >> 32); }
HD int32_t entry_rows(const uint64_t* words) { return int32_t(words[1]); }
HD Gradient entry_gradient(const uint64_t* words) { return Gradient(words[1] >> 32 & 3); }
HD bool entry_aligned(const uint64_t* words) { return words[1] >> 34 & 1; }
HD int32_t entry_index(const uint64_t* words) { return int32_t(words[1] >> 35); }

// Whether four elements, which are a quarter of a Philox counter's, can be accessed at once.
inline bool aligned(const Item& item) {
  bool found = item.shard.columns % 4 == 0 && item.shard.start % 4 == 0;
  for (const void* pointer : item.pointer) found = found && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  return found;
}

// Fills `table` with items from `first` on, as many as fit and, unless `mixed`, are aligned alike; returns the place of
// the first one left over. Starts are for what draws random bits: steps.
inline size_t pack(const std::vector<Item>& items, size_t first, bool mixed, Table& table) {
  int stride = Table::kHeader;
  table.start = items[first].pointer[kWeight] ? int8_t(stride++) : int8_t(0);
  for (int slot = 0; slot < kSlots; ++slot)
    table.position[slot] = items[first].pointer[slot] ? int8_t(stride++) : int8_t(0);
  table.stride = stride;
  table.items = table.units = 0;
  size_t next = first;
  for (; next < items.size() && (table.items + 1) * stride <= Table::kWords; ++next, ++table.items) {
    const Item& item = items[next];
    const int64_t limit = int64_t(1) << 31, units = table.units + count_units(item.shard);
    if (item.shard.rows >= limit || item.shard.columns >= limit) throw std::length_error("adamw: a matrix too large");
    if (units >= limit || (!mixed && aligned(item) != aligned(items[first]))) break;
    uint64_t* words = table.words + table.items * stride;
    const uint64_t flags = uint64_t(item.gradient) | uint64_t(aligned(item)) << 2 | uint64_t(item.index) << 3;
    words[0] = uint64_t(item.shard.columns) | uint64_t(table.units) << 32;
    words[1] = uint64_t(item.shard.rows) | flags << 32;
    if (table.start) words[table.start] = uint64_t(item.shard.start);
    for (int slot = 0; slot < kSlots; ++slot)
      if (table.position[slot]) words[table.position[slot]] = reinterpret_cast<uintptr_t>(item.pointer[slot]);
    table.units = int32_t(units);
  }
  return next;
}

}  // namespace srpo
