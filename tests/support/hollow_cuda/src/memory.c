// Memory of the device and pinned memory of the host: pages that are reserved and never touched by this file, so that
// a layer of 4 GB costs nothing. What is copied between them is remembered by direction.
#include <pthread.h>
#include <sys/mman.h>

#include "runtime.h"

// Weights are large and nobody reads them back: a copy of a megabyte or more leaves the destination as it is.
enum { LARGEST_REAL_COPY = 1 << 20, MOST_REGIONS = 1 << 16 };

typedef enum { PAGEABLE, PINNED, DEVICE } Place;
static const char *const PLACES[] = {"host", "pinned", "device"};
typedef struct { char *start; size_t bytes; Place place; } Region;

static Region regions[MOST_REGIONS];
static int region_count;
static size_t used;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

size_t device_bytes_used(void) { return used; }

static Place place_of(const void *address) {
    Place place = PAGEABLE;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < region_count; i++)
        if ((char *)address >= regions[i].start && (char *)address < regions[i].start + regions[i].bytes)
            place = regions[i].place;
    pthread_mutex_unlock(&lock);
    return place;
}

static cudaError_t take(void **address, size_t bytes, Place place, const char *call) {
    *address = NULL;
    if (bytes == 0) return cudaSuccess;
    if (place == DEVICE && used + bytes > (size_t)DEVICE_GIB << 30) return cudaErrorMemoryAllocation;
    char *start = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED || region_count == MOST_REGIONS) return cudaErrorMemoryAllocation;
    pthread_mutex_lock(&lock);
    regions[region_count++] = (Region){start, bytes, place};
    if (place == DEVICE) used += bytes;
    pthread_mutex_unlock(&lock);
    record("{\"event\": \"allocate\", \"call\": \"%s\", \"place\": \"%s\", \"bytes\": %zu}", call, PLACES[place], bytes);
    *address = start;
    return cudaSuccess;
}

static cudaError_t give_back(void *address) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < region_count; i++) {
        if (regions[i].start != address) continue;
        munmap(regions[i].start, regions[i].bytes);
        if (regions[i].place == DEVICE) used -= regions[i].bytes;
        regions[i] = regions[--region_count];
        break;
    }
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

#define REFUSE_IN_CAPTURE if (refused_in_capture(__func__)) return cudaErrorStreamCaptureUnsupported

cudaError_t cudaMalloc(void **p, size_t n) { REFUSE_IN_CAPTURE; return take(p, n, DEVICE, __func__); }
cudaError_t cudaMallocHost(void **p, size_t n) { REFUSE_IN_CAPTURE; return take(p, n, PINNED, __func__); }
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned int flags) {
    (void)flags;
    REFUSE_IN_CAPTURE;
    return take(p, n, PINNED, __func__);
}
cudaError_t cudaMallocFromPoolAsync(void **p, size_t n, cudaMemPool_t pool, cudaStream_t stream) {
    (void)pool, (void)stream;
    return take(p, n, DEVICE, __func__);
}
cudaError_t cudaFree(void *p) { REFUSE_IN_CAPTURE; return give_back(p); }
cudaError_t cudaFreeHost(void *p) { REFUSE_IN_CAPTURE; return give_back(p); }
cudaError_t cudaFreeAsync(void *p, cudaStream_t stream) { (void)stream; return give_back(p); }

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    *total = (size_t)DEVICE_GIB << 30;
    *free_bytes = *total - used;
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *p) {
    static const enum cudaMemoryType TYPES[] = {cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice};
    Place place = place_of(p);
    int device;
    cudaGetDevice(&device);
    *attributes = (struct cudaPointerAttributes){
        .type = TYPES[place], .device = device, .devicePointer = place ? (void *)p : NULL,
        .hostPointer = place == DEVICE ? NULL : (void *)p};
    return cudaSuccess;
}

static void move(void *to, const void *from, size_t bytes) {
    if (bytes < LARGEST_REAL_COPY) memmove(to, from, bytes);
}

// Where bytes go from and to is what the addresses say; `kind` is only what the caller believes.
static bool record_copy(const void *to, const void *from, size_t bytes, cudaStream_t stream, const char *call) {
    Place source = place_of(from), target = place_of(to);
    record("{\"event\": \"copy\", \"call\": \"%s\", \"from\": \"%s\", \"to\": \"%s\", \"bytes\": %zu}",
           call, PLACES[source], PLACES[target], bytes);
    if (!is_capturing()) return true;
    // The host reads results while a graph is recorded, or the graph would read host memory that is gone by its replay.
    if (source == DEVICE && target != DEVICE) return !refused_in_capture("a copy from the device to the host");
    if (source == PAGEABLE) return !refused_in_capture("a copy from pageable memory");
    return enter_graph(stream, call);
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    (void)kind;
    REFUSE_IN_CAPTURE;
    record_copy(to, from, bytes, NULL, __func__);
    move(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(
    void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    (void)kind;
    if (!record_copy(to, from, bytes, stream, __func__)) return cudaErrorStreamCaptureUnsupported;
    move(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(
    void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
    enum cudaMemcpyKind kind, cudaStream_t stream) {
    (void)kind;
    if (!record_copy(to, from, width * height, stream, __func__)) return cudaErrorStreamCaptureUnsupported;
    for (size_t row = 0; row < height && width * height < LARGEST_REAL_COPY; row++)
        memmove((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
    return cudaSuccess;
}

cudaError_t cudaMemcpyFromSymbol(
    void *to, const void *symbol, size_t bytes, size_t offset, enum cudaMemcpyKind kind) {
    (void)symbol, (void)offset, (void)kind;
    REFUSE_IN_CAPTURE;
    memset(to, 0, bytes);  // a variable of a module that is not loaded
    return cudaSuccess;
}

cudaError_t cudaMemset(void *to, int value, size_t bytes) {
    REFUSE_IN_CAPTURE;
    if (bytes < LARGEST_REAL_COPY) memset(to, value, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
    if (is_capturing() && !enter_graph(stream, __func__)) return cudaErrorStreamCaptureUnsupported;
    record("{\"event\": \"fill\", \"bytes\": %zu}", bytes);
    if (bytes < LARGEST_REAL_COPY) memset(to, value, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemPoolCreate(cudaMemPool_t *pool, const struct cudaMemPoolProps *properties) {
    (void)properties;
    *pool = new_handle();
    return cudaSuccess;
}

cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value) {
    (void)pool, (void)attribute;
    memset(value, 0, sizeof(unsigned long long));
    return cudaSuccess;
}
