// Kernels are known by name and are not run. A launch that no Hopper takes is refused, as a driver would.
#include "runtime.h"

enum { SLOTS = 1 << 17, DEFAULT_SHARED = 48 << 10, SHARED_OPT_IN = 227 << 10 };

// By the address of the host's stub, or by the handle of a kernel of a library: a table with open addressing.
static struct { const void *key; const char *name; int most_shared; } kernels[SLOTS];

static unsigned slot_of(const void *key) {
    unsigned slot = ((size_t)key >> 4) * 2654435761u % SLOTS;
    while (kernels[slot].key && kernels[slot].key != key) slot = (slot + 1) % SLOTS;
    return slot;
}

static void remember(const void *key, const char *name) {
    unsigned slot = slot_of(key);
    kernels[slot].key = key, kernels[slot].name = name, kernels[slot].most_shared = DEFAULT_SHARED;
}

static const char *fault_of(dim3 grid, dim3 block, size_t shared, int most_shared) {
    if (!grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z) return "empty grid or block";
    if (grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535) return "grid too large";
    if (block.x > 1024 || block.y > 1024 || block.z > 64 || block.x * block.y * block.z > 1024) return "block too large";
    return shared > (size_t)most_shared ? "more shared memory than was asked for" : NULL;
}

static cudaError_t launch(const void *key, dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    unsigned slot = slot_of(key);
    const char *name = kernels[slot].key ? kernels[slot].name : "unknown";
    const char *fault = fault_of(grid, block, shared, kernels[slot].key ? kernels[slot].most_shared : SHARED_OPT_IN);
    if (fault) {
        record("{\"event\": \"refused\", \"call\": \"%s\", \"why\": \"%s\"}", name, fault);
        return cudaErrorInvalidConfiguration;
    }
    if (!enter_graph(stream, name)) return cudaErrorStreamCaptureUnsupported;
    record("{\"event\": \"launch\", \"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], \"shared\": %zu, \"kernel\": \"%s\"}",
           grid.x, grid.y, grid.z, block.x, block.y, block.z, shared, name);
    return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t stream) {
    (void)args;
    return launch(f, grid, block, shared, stream);
}
cudaError_t cudaLaunchCooperativeKernel(
    const void *f, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t stream) {
    (void)args;
    return launch(f, grid, block, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **args) {
    (void)args;
    return launch(f, c->gridDim, c->blockDim, c->dynamicSmemBytes, c->stream);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
    if (!enter_graph(stream, __func__)) return cudaErrorStreamCaptureUnsupported;
    record("{\"event\": \"host function\"}");
    if (!is_capturing()) function(data);
    return cudaSuccess;
}

static cudaError_t set_attribute(const void *key, enum cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value > SHARED_OPT_IN) return cudaErrorInvalidValue;
    unsigned slot = slot_of(key);
    if (kernels[slot].key) kernels[slot].most_shared = value;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *f, enum cudaFuncAttribute attribute, int value) {
    return set_attribute(f, attribute, value);
}
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t k, enum cudaFuncAttribute attribute, int value, int device) {
    (void)device;
    return set_attribute(k, attribute, value);
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *f) {
    *attributes = (struct cudaFuncAttributes){
        .maxThreadsPerBlock = 1024, .numRegs = 32, .binaryVersion = 90, .ptxVersion = 80,
        .maxDynamicSharedSizeBytes = kernels[slot_of(f)].most_shared};
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks, const void *f, int threads, size_t shared, unsigned int flags) {
    (void)f, (void)threads, (void)shared, (void)flags;
    *blocks = 1;
    return cudaSuccess;
}

cudaError_t cudaLibraryLoadData(
    cudaLibrary_t *library, const void *code, enum cudaJitOption *options, void **values, unsigned int count,
    enum cudaLibraryOption *library_options, void **library_values, unsigned int library_count) {
    (void)code, (void)options, (void)values, (void)count, (void)library_options, (void)library_values;
    (void)library_count;
    *library = new_handle();
    return cudaSuccess;
}
cudaError_t cudaLibraryGetKernel(cudaKernel_t *kernel, cudaLibrary_t library, const char *name) {
    (void)library;
    *kernel = new_handle();
    remember(*kernel, strdup(name));
    return cudaSuccess;
}

// What code compiled by nvcc calls by itself: as its modules are loaded, and for every <<<launch>>>.
void __cudaRegisterFunction(
    void **module, const char *stub, char *device_function, const char *name, int limit, uint3 *thread, uint3 *block,
    dim3 *block_size, dim3 *grid_size, int *warp_size) {
    (void)module, (void)device_function, (void)limit, (void)thread, (void)block;
    (void)block_size, (void)grid_size, (void)warp_size;
    remember(stub, name);
}
void **__cudaRegisterFatBinary(void *binary) { (void)binary; static void *module; return &module; }
void __cudaRegisterFatBinaryEnd(void **module) { (void)module; }
void __cudaUnregisterFatBinary(void **module) { (void)module; }
void __cudaRegisterVar(void) {}

cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *stub) {
    *kernel = (cudaKernel_t)stub;
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(
    cudaKernel_t kernel, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t stream) {
    (void)args;
    return launch(kernel, grid, block, shared, stream);
}

static _Thread_local struct { dim3 grid, block; size_t shared; cudaStream_t stream; } pushed;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
    pushed.grid = grid, pushed.block = block, pushed.shared = shared, pushed.stream = stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared;
    *(cudaStream_t *)stream = pushed.stream;
    return cudaSuccess;
}
