// What happens before what in GCC's OpenMP, told to ThreadSanitizer. libgomp is not built under it:
// its barriers would be unseen, and every result of a parallel region would count as a race. So
// race.sh links with -Wl,--wrap, and each function below states the edges that OpenMP guarantees,
// and no others, around the real one: fork and join of a region, a critical section, a barrier.
// OpenMP that is used and not wrapped here shows as a race that is none.
#pragma once

#include <sanitizer/tsan_interface.h>

namespace {

struct Region {
  void (*fn)(void*);
  void* data;
  char fork, join;
};

void run_in_region(void* p) {
  Region& region = *static_cast<Region*>(p);
  __tsan_acquire(&region.fork);
  region.fn(region.data);
  __tsan_release(&region.join);
}

}  // namespace

extern "C" {

void __real_GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
void __wrap_GOMP_parallel(void (*fn)(void*), void* data, unsigned threads, unsigned flags) {
  Region region{fn, data, 0, 0};
  __tsan_release(&region.fork);
  __real_GOMP_parallel(run_in_region, &region, threads, flags);
  __tsan_acquire(&region.join);
}

void __real_GOMP_critical_name_start(void**);
void __wrap_GOMP_critical_name_start(void** name) {
  __real_GOMP_critical_name_start(name);
  __tsan_acquire(name);
}

void __real_GOMP_critical_name_end(void**);
void __wrap_GOMP_critical_name_end(void** name) {
  __tsan_release(name);
  __real_GOMP_critical_name_end(name);
}

}  // extern "C"
