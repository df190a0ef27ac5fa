// Products of matrices: sizes are remembered, nothing is multiplied.
#include <stdbool.h>

#include "record.h"

// libcudart's: a product is a step of the graph that its stream records.
bool enter_graph(void *stream, const char *call);

typedef struct { void *stream; } Context;
enum { SUCCESS = 0, EXECUTION_FAILED = 13 };

int cublasCreate_v2(Context **handle) { *handle = calloc(1, sizeof **handle); return SUCCESS; }
int cublasDestroy_v2(Context *handle) { free(handle); return SUCCESS; }
int cublasSetStream_v2(Context *handle, void *stream) { handle->stream = stream; return SUCCESS; }
int cublasGetMathMode(Context *handle, int *mode) { (void)handle; *mode = 0; return SUCCESS; }
const char *cublasGetStatusName(int status) { return status ? "a cuBLAS error" : "CUBLAS_STATUS_SUCCESS"; }
const char *cublasGetStatusString(int status) { return cublasGetStatusName(status); }

// All of them begin alike; what follows the sizes differs and is not looked at.
#define PRODUCT(name) \
    int name(Context *handle, int transa, int transb, int m, int n, int k) { \
        (void)transa, (void)transb; \
        if (!enter_graph(handle->stream, #name)) return EXECUTION_FAILED; \
        record("{\"event\": \"product\", \"call\": \"%s\", \"m\": %d, \"n\": %d, \"k\": %d}", #name, m, n, k); \
        return SUCCESS; \
    }
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmBatchedEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemmBatched)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasDgemmBatched)
PRODUCT(cublasDgemmStridedBatched)
