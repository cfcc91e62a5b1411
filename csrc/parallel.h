// Threads: OpenMP where it is there.
#pragma once

#include "vec.h"
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace corematching::COREMATCHING_ISA {

#if defined(_OPENMP)
CM_INLINE int thread_number() { return omp_get_thread_num(); }
CM_INLINE int thread_count() { return omp_get_num_threads(); }
#else
CM_INLINE int thread_number() { return 0; }
CM_INLINE int thread_count() { return 1; }
#endif

struct Range {
  int64_t first, last;
};

// A thread's part of n things.
CM_INLINE Range split(int64_t n, int thread, int threads) {
  return {n * thread / threads, n * (thread + 1) / threads};
}

}  // namespace corematching::COREMATCHING_ISA
