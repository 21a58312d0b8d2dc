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
  int32_t index;  // in the caller's list, of which a plan leaves out empty shards
  Gradient gradient;
  void* pointer[kSlots];
};

// What a norm or a step goes through; the items stay their owner's.
struct Plan {
  std::vector<const Item*> items;
  std::vector<int64_t> first_unit{0};  // of each item, and the number of all units

  Plan() = default;
  explicit Plan(const std::vector<Item>& list) {
    for (const Item& item : list) add(item);
  }
  explicit Plan(std::vector<Item>&&) = delete;
  void add(const Item& item) {
    if (item.shard.rows == 0 || item.shard.columns == 0) return;
    items.push_back(&item);
    first_unit.push_back(first_unit.back() + count_units(item.shard));
  }
  int64_t units() const { return first_unit.back(); }
  size_t item_of(int64_t unit) const {
    return size_t(std::upper_bound(first_unit.begin(), first_unit.end(), unit) - first_unit.begin() - 1);
  }
};

// The items of one launch. Per item, in `words` from `at` on: columns and first unit; rows, gradient type, alignment and
// index; the start; the pointers that the launch needs. Words are in device memory, so no number of items is too large.
struct Table {
  static constexpr int kHeader = 3;
  const uint64_t* words = nullptr;
  int64_t at = 0;
  int32_t items = 0, stride = 0, units = 0;
  int8_t position[kSlots] = {};  // of each pointer in an entry, or 0
  bool aligned = false;          // all items
};

HD const uint64_t* entry(const Table& table, int item) { return table.words + table.at + int64_t(item) * table.stride; }
HD int64_t entry_start(const uint64_t* words) { return int64_t(words[2]); }
HD int32_t entry_columns(const uint64_t* words) { return int32_t(words[0]); }
HD int32_t entry_first_unit(const uint64_t* words) { return int32_t(words[0] >> 32); }
HD int32_t entry_rows(const uint64_t* words) { return int32_t(words[1]); }
HD Gradient entry_gradient(const uint64_t* words) { return Gradient(words[1] >> 32 & 3); }
HD bool entry_aligned(const uint64_t* words) { return words[1] >> 34 & 1; }
HD int32_t entry_index(const uint64_t* words) { return int32_t(words[1] >> 35); }

// Whether four elements, which are a quarter of a Philox counter's, can be accessed at once.
inline bool aligned(const Item& item) {
  uint64_t bits = uint64_t(item.shard.columns | item.shard.start) * 4;
  for (const void* pointer : item.pointer) bits |= reinterpret_cast<uintptr_t>(pointer);
  return bits % 16 == 0;
}

// Appends to `words` the entries of items from `first` on that one launch takes: unless `mixed`, those aligned alike. The
// place of the first one left over is the table's items further.
inline Table pack(const std::vector<const Item*>& items, size_t first, bool mixed, std::vector<uint64_t>& words) {
  Table table;
  table.at = int64_t(words.size());
  table.stride = Table::kHeader;
  table.aligned = aligned(*items[first]);
  for (int slot = 0; slot < kSlots; ++slot)
    if (items[first]->pointer[slot]) table.position[slot] = int8_t(table.stride++);
  words.resize(size_t(table.at) + (items.size() - first) * size_t(table.stride));
  uint64_t* to = words.data() + table.at;
  for (size_t next = first; next < items.size(); ++next, ++table.items, to += table.stride) {
    const Item& item = *items[next];
    const int64_t limit = int64_t(1) << 31, units = table.units + count_units(item.shard);
    const bool whole = aligned(item);
    if (item.shard.rows >= limit || item.shard.columns >= limit) throw std::length_error("adamw: a matrix too large");
    if (units >= limit || (!mixed && whole != table.aligned)) break;
    const uint64_t flags = uint64_t(item.gradient) | uint64_t(whole) << 2 | uint64_t(item.index) << 3;
    to[0] = uint64_t(item.shard.columns) | uint64_t(table.units) << 32;
    to[1] = uint64_t(item.shard.rows) | flags << 32;
    to[2] = uint64_t(item.shard.start);
    for (int slot = 0; slot < kSlots; ++slot)
      if (table.position[slot]) to[table.position[slot]] = reinterpret_cast<uintptr_t>(item.pointer[slot]);
    table.units = int32_t(units);
  }
  words.resize(size_t(to - words.data()));
  return table;
}

// All launches that a plan takes, and their words.
struct Launches {
  std::vector<Table> tables;
  std::vector<uint64_t> words;

  Launches(Plan& plan, bool mixed) {
    const auto is_aligned = [](const Item* item) { return aligned(*item); };
    if (!mixed) std::stable_partition(plan.items.begin(), plan.items.end(), is_aligned);
    for (size_t next = 0; next < plan.items.size(); next += size_t(tables.back().items))
      tables.push_back(pack(plan.items, next, mixed, words));
  }
};

}  // namespace srpo
