// cuBLAS and cuBLASLt of a GPU that computes nothing: the functions that torch calls for matmuls,
// matrix-vector products and dot products in float16, bfloat16 and float32.
// SPDX-License-Identifier: MIT (LICENSE in the root of gpt2-lab)
//
// NVIDIA's headers are not needed: every function returns 0, CUBLAS_STATUS_SUCCESS, and uses few of
// its arguments. The others are left out, because in the calling conventions of x86-64 and AArch64
// the caller removes them.

#include "nullgpu.h"

#include <stdlib.h>
#include <string.h>

struct handle { void *stream; };

int cublasCreate_v2(struct handle **handle) {
    *handle = calloc(1, sizeof **handle);
    return 0;
}

int cublasDestroy_v2(struct handle *handle) { free(handle); return 0; }
int cublasSetStream_v2(struct handle *handle, void *stream) { handle->stream = stream; return 0; }
int cublasSetWorkspace_v2(void) { return 0; }
int cublasSetMathMode(void) { return 0; }
int cublasGetMathMode(struct handle *handle, int *mode) { *mode = 0; return 0; }
int cublasSetPointerMode_v2(void) { return 0; }
int cublasGetPointerMode_v2(struct handle *handle, int *mode) { *mode = 0; return 0; }
int cublasSetSmCountTarget(void) { return 0; }

#define PRODUCT(name) \
    int name(struct handle *handle) { null_launch(handle->stream, #name); return 0; }

PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDotEx)

// ---------------------------------------------------------------------------------------------
// cuBLASLt: matmuls with a bias or an activation, described by objects that are never read here

static int create(void **object) { *object = malloc(1); return 0; }

int cublasLtMatmulDescCreate(void **object) { return create(object); }
int cublasLtMatmulDescDestroy(void *object) { free(object); return 0; }
int cublasLtMatmulDescSetAttribute(void) { return 0; }
int cublasLtMatmulPreferenceCreate(void **object) { return create(object); }
int cublasLtMatmulPreferenceDestroy(void *object) { free(object); return 0; }
int cublasLtMatmulPreferenceSetAttribute(void) { return 0; }
int cublasLtMatrixLayoutCreate(void **object) { return create(object); }
int cublasLtMatrixLayoutDestroy(void *object) { free(object); return 0; }
int cublasLtMatrixLayoutSetAttribute(void) { return 0; }

// One algorithm is found. Its description, cublasLtMatmulHeuristicResult_t, has 96 bytes
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c,
                                   void *d, void *preference, int wanted, void *results,
                                   int *num_found) {
    memset(results, 0, 96);
    *num_found = 1;
    return 0;
}

int cublasLtMatmul(void *handle, void *operation, const void *alpha, const void *a, void *layout_a,
                   const void *b, void *layout_b, const void *beta, const void *c, void *layout_c,
                   void *d, void *layout_d, const void *algorithm, void *workspace,
                   size_t workspace_size, void *stream) {
    null_launch(stream, "cublasLtMatmul");
    return 0;
}
