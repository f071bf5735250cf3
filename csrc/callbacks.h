// What kernels call: threads that share a row, and who has room for lists.
#pragma once

#include <cstdint>

namespace fastadapt {

// Threads that share one long row.
struct Team {
  int size;  // at most kMaxTeam
  // Calls part(context, 0) to part(context, parts - 1) at the same time, and waits for them.
  void (*run)(int parts, void (*part)(void* context, int index), void* context);
};
constexpr int kMaxTeam = 64;

// Entries of a row that are worth a thread of a team: about 4 us of work.
constexpr int64_t kLeastPart = 1 << 14;

// Where the ids go that rows keep, a list each: rows that keep a whole vocabulary have none.
struct Supports {
  // Room for so many ids, and for 64 more that mean nothing, of a list; it may throw.
  int32_t* (*room)(void* lists, int64_t list, int64_t count);  // or null: nobody asks
  void* lists;
  int64_t whole;  // the size of that vocabulary, at least V
};

}  // namespace fastadapt
