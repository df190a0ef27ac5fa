// Streams, events and graphs. Work is done when it is given, so there is nothing to wait for; what counts is who waits,
// and what a driver refuses while a stream records a graph.
#include "runtime.h"

// What a graph holds: how many steps, and work of other libraries that is done whenever the graph is (NCCL's).
enum { MOST_WORK = 1024 };
typedef int (*Work)(void *data);
typedef struct { int steps, works; struct { Work run; void *data; } work[MOST_WORK]; } Graph;

static cudaStream_t recorded;  // the stream that records, NULL without
static Graph *graph_of_stream; // the one that is recorded
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
    if (is_capturing()) graph_of_stream->steps++;
    return true;
}

// Let work be done later, each time that the graph is; false where none is recorded, and it has to be done now.
bool hollow_enqueue(cudaStream_t stream, Work run, void *data) {
    if (!is_capturing() || !enter_graph(stream, "an exchange")) return false;
    if (graph_of_stream->works == MOST_WORK) abort();
    graph_of_stream->work[graph_of_stream->works].run = run;
    graph_of_stream->work[graph_of_stream->works++].data = data;
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

cudaError_t cudaStreamQuery(cudaStream_t stream) {
    (void)stream;
    return refused_in_capture(__func__) ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

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
    recorded = stream, graph_of_stream = calloc(1, sizeof *graph_of_stream), spoiled = false;
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
    *graph = (cudaGraph_t)graph_of_stream;
    record("{\"event\": \"captured\", \"steps\": %d}", graph_of_stream->steps);
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
    (void)flags;
    *executable = (cudaGraphExec_t)graph;
    return graph ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    (void)stream;
    Graph *graph = (Graph *)executable;
    record("{\"event\": \"replay\", \"steps\": %d, \"exchanges\": %d}", graph->steps, graph->works);
    for (int i = 0; i < graph->works; i++)
        if (graph->work[i].run(graph->work[i].data)) return cudaErrorUnknown;
    return cudaSuccess;
}
