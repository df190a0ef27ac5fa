// Streams, events and graphs. Work is done when it is given, so there is nothing to wait for; what counts is who waits,
// and what a driver refuses while a stream records a graph.
#include "runtime.h"

static cudaStream_t recorded;  // the stream that records, NULL without
static int steps;              // of the graph that is recorded
static bool spoiled;

bool is_capturing(void) { return recorded != NULL; }

bool refused_in_capture(const char *call) {
    if (!is_capturing()) return false;
    spoiled = true;
    record("{\"event\": \"refused\", \"call\": \"%s\", \"why\": \"a graph is recorded\"}", call);
    return true;
}

bool enter_graph(cudaStream_t stream, const char *call) {
    if (is_capturing() && stream != recorded) {
        spoiled = true;
        record("{\"event\": \"refused\", \"call\": \"%s\", \"why\": \"another stream than the recorded one\"}", call);
        return false;
    }
    steps += is_capturing();
    return true;
}

static cudaError_t synchronize(const char *call) {
    if (refused_in_capture(call)) return cudaErrorStreamCaptureUnsupported;
    record("{\"event\": \"synchronize\", \"call\": \"%s\"}", call);
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) { (void)stream; return synchronize(__func__); }
cudaError_t cudaDeviceSynchronize(void) { return synchronize(__func__); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { (void)event; return synchronize(__func__); }

cudaError_t cudaStreamCreate(cudaStream_t *stream) { *stream = new_handle(); return cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned int flags) {
    (void)flags;
    return cudaStreamCreate(stream);
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { *event = new_handle(); return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned int flags) {
    (void)flags;
    return cudaEventCreate(event);
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    (void)start, (void)end;
    *milliseconds = 1;  // all tactics are equally fast, so that the first that fits is chosen
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    (void)mode;
    if (stream == NULL || is_capturing()) return cudaErrorStreamCaptureUnsupported;
    recorded = stream, steps = 0, spoiled = false;
    record("{\"event\": \"capture\"}");
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = stream && stream == recorded ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    if (stream != recorded) return cudaErrorStreamCaptureUnmatched;
    recorded = NULL;
    *graph = NULL;
    if (spoiled) return cudaErrorStreamCaptureInvalidated;
    *graph = (cudaGraph_t)(size_t)(steps + 1);  // a handle that says how much it holds
    record("{\"event\": \"captured\", \"steps\": %d}", steps);
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
    (void)flags;
    *executable = (cudaGraphExec_t)graph;
    return graph ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    (void)stream;
    record("{\"event\": \"replay\", \"steps\": %zu}", (size_t)executable - 1);
    return cudaSuccess;
}
