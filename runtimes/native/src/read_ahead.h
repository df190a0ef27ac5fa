// Weights that are mapped and not all in memory: telling the operating system what will be read, so that a device gets
// one long list instead of one page fault after the other. Nothing on Windows, where faults read as they come.
#pragma once
#include "kernels.h"

#if !defined(_WIN32)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace herd {

#if defined(_WIN32)
inline void read_ahead(const void*, size_t) {}
inline void used_in_part(const void*, size_t) {}
#else
constexpr size_t kRequest = size_t(128) << 10;   // Linux cuts a request to the larger of its read-ahead and the device's

inline void advise(const void* begin, size_t bytes, size_t step, int advice) {
  uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE)), at = uintptr_t(begin) / page * page, end = uintptr_t(begin) + bytes;
  for (; at < end; at += step) posix_madvise(reinterpret_cast<void*>(at), end - at < step ? end - at : step, advice);
}

// Reads these pages, and returns meanwhile. Pages that are there cost a look.
inline void read_ahead(const void* begin, size_t bytes) { advise(begin, bytes, kRequest, POSIX_MADV_WILLNEED); }

// Nothing around a page that is missing will be needed, and what was read once goes first when memory is short.
inline void used_in_part(const void* begin, size_t bytes) { advise(begin, bytes, bytes + 1, POSIX_MADV_RANDOM); }
#endif

inline void read_ahead(const Matrix& matrix) {
  read_ahead(matrix.codes, matrix.bytes());
  if (matrix.scales) read_ahead(matrix.scales, size_t(matrix.tiles) * kTile * sizeof(float));
}

}  // namespace herd
