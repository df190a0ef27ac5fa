// What the parts of the hollow libcudart share.
#pragma once
#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <string.h>

#include "record.h"

// streams.c: whether a call that a driver cannot put into a graph comes while one is recorded; the capture is void then.
bool refused_in_capture(const char *call);
// streams.c: counts work on a stream for the graph that is recorded; false if the stream is not the recorded one.
bool enter_graph(cudaStream_t stream, const char *call);
bool is_capturing(void);

// memory.c: the bytes of the device that are taken.
size_t device_bytes_used(void);

// A handle that nobody looks behind.
static inline void *new_handle(void) {
    static _Atomic size_t last = 4096;
    return (void *)(last += 64);
}

enum { DEVICE_GIB = 80 };
