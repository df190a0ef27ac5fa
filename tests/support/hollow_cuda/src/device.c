// Hoppers (SM 9.0, an H100's limits), one unless HOLLOW_CUDA_DEVICES says more; HOLLOW_CUDA_SM is another generation.
#include "runtime.h"

enum {
    SHARED_PER_BLOCK = 48 << 10, SHARED_OPT_IN = 227 << 10, SHARED_PER_PROCESSOR = 228 << 10, PROCESSORS = 132,
    REGISTERS = 65536, RUNTIME_VERSION = 13000
};

static int generation(void) {
    const char *chosen = getenv("HOLLOW_CUDA_SM");
    return chosen ? atoi(chosen) : 90;
}

static int devices(void) {
    const char *chosen = getenv("HOLLOW_CUDA_DEVICES");
    return chosen ? atoi(chosen) : 1;
}

static int current;  // of the whole process, which works on one of them

cudaError_t cudaGetDeviceCount(int *count) { *count = devices(); return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = current; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= devices()) return cudaErrorInvalidDevice;
    current = device;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) { *version = RUNTIME_VERSION; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = RUNTIME_VERSION; return cudaSuccess; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    if (device < 0 || device >= devices()) return cudaErrorInvalidDevice;
    *properties = (struct cudaDeviceProp){
        .name = "hollow", .major = generation() / 10, .minor = generation() % 10,
        .totalGlobalMem = (size_t)DEVICE_GIB << 30, .multiProcessorCount = PROCESSORS, .warpSize = 32,
        .sharedMemPerBlock = SHARED_PER_BLOCK, .sharedMemPerBlockOptin = SHARED_OPT_IN,
        .sharedMemPerMultiprocessor = SHARED_PER_PROCESSOR, .reservedSharedMemPerBlock = 1 << 10,
        .regsPerBlock = REGISTERS, .regsPerMultiprocessor = REGISTERS, .l2CacheSize = 50 << 20,
        .maxThreadsPerBlock = 1024, .maxThreadsPerMultiProcessor = 2048, .maxBlocksPerMultiProcessor = 32,
        .maxThreadsDim = {1024, 1024, 64}, .maxGridSize = {2147483647, 65535, 65535}, .totalConstMem = 65536,
        .textureAlignment = 512, .asyncEngineCount = 3, .concurrentKernels = 1, .unifiedAddressing = 1,
        .cooperativeLaunch = 1, .clusterLaunch = 1, .memoryPoolsSupported = 1};
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    struct cudaDeviceProp properties;
    cudaError_t error = cudaGetDeviceProperties(&properties, device);
    if (error) return error;
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = properties.major; break;
        case cudaDevAttrComputeCapabilityMinor: *value = properties.minor; break;
        case cudaDevAttrMultiProcessorCount: *value = PROCESSORS; break;
        case cudaDevAttrWarpSize: *value = 32; break;
        case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
        case cudaDevAttrMaxBlocksPerMultiprocessor: *value = 32; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = SHARED_PER_BLOCK; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = SHARED_OPT_IN; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = SHARED_PER_PROCESSOR; break;
        case cudaDevAttrReservedSharedMemoryPerBlock: *value = 1 << 10; break;
        case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: *value = REGISTERS; break;
        case cudaDevAttrL2CacheSize: *value = properties.l2CacheSize; break;
        case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
        case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = 65535; break;
        case cudaDevAttrCooperativeLaunch: case cudaDevAttrMemoryPoolsSupported: *value = 1; break;
        default: *value = 0;
    }
    return cudaSuccess;
}

const char *cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "cudaSuccess";
        case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
        case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
        case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
        case cudaErrorStreamCaptureInvalidated: return "cudaErrorStreamCaptureInvalidated";
        default: return "a CUDA error";
    }
}

const char *cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

// Driver functions that are asked for by name (cuTensorMapEncodeTiled describes tiles to TMA): all do nothing.
static int do_nothing(void) { return 0; }

cudaError_t cudaGetDriverEntryPointByVersion(
    const char *name, void **function, unsigned int version, unsigned long long flags,
    enum cudaDriverEntryPointQueryResult *result) {
    (void)name, (void)version, (void)flags;
    *function = (void *)do_nothing;
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

void hollow_mark(const char *name) { record("{\"event\": \"mark\", \"name\": \"%s\"}", name); }
