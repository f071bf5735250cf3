// IdLists of ids whose lengths nobody knows before: made by any thread, then joined.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "kernels.h"

namespace fastadapt {

class IdLists {
 public:
  IdLists(int64_t n, int64_t whole) : whole_(whole), lists_(static_cast<size_t>(n)) {}

  // Threads may fill different lists at the same time.
  Supports supports() { return {room, this, whole_}; }

  // How many ids there are.
  int64_t count() const {
    int64_t sum = 0;
    for (const List& list : lists_) sum += list.count;
    return sum;
  }

  // Writes where each list begins and the last one ends, and the ids.
  void join(int64_t* offsets, int32_t* ids) const {
    *offsets = 0;
    for (const List& list : lists_) {
      if (list.count > 0)
        std::memcpy(ids + *offsets, list.ids.get(), static_cast<size_t>(list.count) * 4);
      offsets[1] = *offsets + list.count;
      ++offsets;
    }
  }

 private:
  struct List {
    std::unique_ptr<int32_t[]> ids;  // and 64 more
    int64_t count = 0;
  };

  static int32_t* room(void* self, int64_t list, int64_t count) {
    std::vector<List>& lists = static_cast<IdLists*>(self)->lists_;
    if (list < 0 || list >= static_cast<int64_t>(lists.size()))
      throw std::out_of_range("supports: expected one more list");
    List& here = lists[static_cast<size_t>(list)];
    here.ids.reset(new int32_t[static_cast<size_t>(count) + 64]);
    here.count = count;
    return here.ids.get();
  }

  int64_t whole_;
  std::vector<List> lists_;
};

}  // namespace fastadapt
