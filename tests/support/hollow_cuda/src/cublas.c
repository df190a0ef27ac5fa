// Products of matrices: sizes are remembered, nothing is multiplied.
#include "record.h"

typedef void *Handle;
static int something;

int cublasCreate_v2(Handle *handle) { *handle = &something; return 0; }
int cublasGetMathMode(Handle handle, int *mode) { (void)handle; *mode = 0; return 0; }
const char *cublasGetStatusName(int status) { return status ? "a cuBLAS error" : "CUBLAS_STATUS_SUCCESS"; }
const char *cublasGetStatusString(int status) { return cublasGetStatusName(status); }

static int product(const char *call, int m, int n, int k) {
    record("{\"event\": \"product\", \"call\": \"%s\", \"m\": %d, \"n\": %d, \"k\": %d}", call, m, n, k);
    return 0;
}

// All of them begin alike; what follows the sizes differs and is not looked at.
#define PRODUCT(name) \
    int name(Handle h, int transa, int transb, int m, int n, int k) { \
        (void)h, (void)transa, (void)transb; \
        return product(#name, m, n, k); \
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
