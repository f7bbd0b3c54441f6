// The CUDA runtime (libcudart.so.13) of a GPU that computes nothing. NVIDIA's documentation of the
// "CUDA Runtime API" says what each function should do; a comment here says what is different.
// SPDX-License-Identifier: MIT (LICENSE in the root of gpt2-lab)

#define _GNU_SOURCE
#include "nullgpu.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define CUDA_VERSION_HERE 13000  // 13.0

// the error of the last call that failed in this thread, until somebody asks
static __thread cudaError_t last_error = cudaSuccess;

static cudaError_t fail(cudaError_t error) { return last_error = error; }

cudaError_t cudaPeekAtLastError(void) { return last_error; }

cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

// ---------------------------------------------------------------------------------------------
// devices

cudaError_t cudaDriverGetVersion(int *version) { *version = CUDA_VERSION_HERE; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return cudaDriverGetVersion(version); }
cudaError_t cudaGetDeviceCount(int *count) { *count = null_num_devices(); return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = null_device(); return cudaSuccess; }

cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= null_num_devices())
        return fail(cudaErrorInvalidDevice);
    null_set_device(device);
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    const struct null_card *card = null_card();
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "%s", card->name);
    p->uuid.bytes[0] = (char)(device + 1);
    p->major = card->compute_capability / 10;
    p->minor = card->compute_capability % 10;
    p->totalGlobalMem = null_total_memory();
    p->multiProcessorCount = card->multiprocessors;
    p->l2CacheSize = card->l2_mib << 20;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = card->threads_per_multiprocessor;
    p->maxBlocksPerMultiProcessor = 32;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlock = 48 << 10;
    p->sharedMemPerMultiprocessor = (size_t)card->shared_kib << 10;
    // from 8.0 on, CUDA keeps 1 KiB of a block's shared memory for itself
    p->reservedSharedMemPerBlock = card->compute_capability >= 80 ? 1 << 10 : 0;
    p->sharedMemPerBlockOptin = p->sharedMemPerMultiprocessor - p->reservedSharedMemPerBlock;
    p->textureAlignment = 512;
    p->memoryBusWidth = 5120;
    p->pciBusID = device + 1;
    p->unifiedAddressing = p->canMapHostMemory = p->concurrentKernels = 1;
    p->cooperativeLaunch = p->streamPrioritiesSupported = 1;
    return cudaSuccess;
}

// Torch asks for few attributes. A flag that is not listed is 1: the card can do it.
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    struct cudaDeviceProp p;
    cudaGetDeviceProperties(&p, device);
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxBlockDimX: *value = p.maxThreadsDim[0]; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = (int)p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = p.regsPerBlock; break;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
    default: *value = 1;
    }
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int device) {
    snprintf(id, (size_t)length, "0000:%02x:00.0", device + 1);
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = device != peer;
    return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) { return cudaSuccess; }

cudaError_t cudaDeviceSynchronize(void) {
    if (null_thread_is_capturing())
        return fail(cudaErrorStreamCaptureUnsupported);
    null_synchronize(__func__);
    return cudaSuccess;
}

cudaError_t cudaProfilerStart(void) { return cudaSuccess; }
cudaError_t cudaProfilerStop(void) { return cudaSuccess; }

// ---------------------------------------------------------------------------------------------
// memory

cudaError_t cudaMalloc(void **address, size_t size) {
    *address = NULL;
    if (!size)
        return cudaSuccess;
    *address = null_allocate(size);
    return *address ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}

cudaError_t cudaFree(void *address) {
    return !address || null_release(address) ? cudaSuccess : fail(cudaErrorInvalidValue);
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    *free_bytes = null_free_memory();
    *total = null_total_memory();
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **address, size_t size, unsigned flags) {
    *address = null_reserve(size ? size : 1, NULL_PINNED);
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *address) { return cudaFree(address); }
cudaError_t cudaHostRegister(void *address, size_t size, unsigned flags) { return cudaSuccess; }
cudaError_t cudaHostUnregister(void *address) { return cudaSuccess; }

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes,
                                     const void *address) {
    enum null_place place = null_place_of(address);
    memset(attributes, 0, sizeof *attributes);
    attributes->type = place == NULL_ON_DEVICE ? cudaMemoryTypeDevice
                     : place == NULL_PINNED ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    attributes->device = null_device_of(address);
    attributes->devicePointer = place == NULL_NOWHERE ? NULL : (void *)address;
    attributes->hostPointer = place == NULL_PINNED ? (void *)address : NULL;
    return cudaSuccess;
}

static enum null_direction direction_of(const void *to, const void *from,
                                        enum cudaMemcpyKind kind) {
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (kind == cudaMemcpyDefault) {
        to_device = null_place_of(to) == NULL_ON_DEVICE;
        from_device = null_place_of(from) == NULL_ON_DEVICE;
    }
    if (to_device)
        return from_device ? NULL_ON_THE_DEVICE : NULL_TO_DEVICE;
    return from_device ? NULL_TO_HOST : NULL_ON_THE_HOST;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
    null_copy(stream, direction_of(to, from, kind), to, from, size);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    if (null_thread_is_capturing())
        return fail(cudaErrorStreamCaptureImplicit);
    cudaMemcpyAsync(to, from, size, kind, NULL);
    null_synchronize(__func__);
    return cudaSuccess;
}

// counts as one copy for each row
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                              size_t width, size_t height, enum cudaMemcpyKind kind,
                              cudaStream_t stream) {
    for (size_t row = 0; row < height; row++)
        cudaMemcpyAsync((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width,
                        kind, stream);
    return cudaSuccess;
}

cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device,
                                size_t size, cudaStream_t stream) {
    return cudaMemcpyAsync(to, from, size, cudaMemcpyDeviceToDevice, stream);
}

cudaError_t cudaMemsetAsync(void *address, int value, size_t size, cudaStream_t stream) {
    null_launch(stream, "memset");
    return cudaSuccess;
}

cudaError_t cudaMemset(void *address, int value, size_t size) {
    return cudaMemsetAsync(address, value, size, NULL);
}

// variables in device code: one page of memory stands for all of them
cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
    static char page[4096];
    *address = page;
    return cudaSuccess;
}

cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *from, size_t size, size_t offset,
                               enum cudaMemcpyKind kind) {
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------
// streams and events. Everything is finished as soon as it has been asked for

cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    *stream = (cudaStream_t)null_new_stream();
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    return cudaStreamCreate(stream);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    return cudaStreamCreate(stream);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) { free(stream); return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaSuccess; }

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    if (null_recorded_graph(stream))
        return fail(cudaErrorStreamCaptureUnsupported);
    null_synchronize(__func__);
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = 0;
    return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *argument) {
    function(argument);
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    *event = malloc(1);
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { free(event); return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaSuccess; }

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    null_synchronize(__func__);
    return cudaSuccess;
}

// Always the same time, so that Inductor's and Triton's autotuning chooses the same every time
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    *milliseconds = 0.1f;
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------
// graphs

static enum cudaStreamCaptureStatus capture_status(cudaStream_t stream) {
    return null_recorded_graph(stream) ? cudaStreamCaptureStatusActive
                                       : cudaStreamCaptureStatusNone;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = capture_status(stream);
    return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(
        cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
        cudaGraph_t *graph, const cudaGraphNode_t **dependencies,
        const cudaGraphEdgeData **edges, size_t *num_dependencies) {
    struct null_graph *recorded = null_recorded_graph(stream);
    *status = capture_status(stream);
    if (id)
        *id = (unsigned long long)recorded;  // another one for each capture
    if (graph)
        *graph = (cudaGraph_t)recorded;
    if (dependencies)
        *dependencies = NULL;
    if (edges)
        *edges = NULL;
    if (num_dependencies)
        *num_dependencies = 0;
    return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    static __thread enum cudaStreamCaptureMode current = cudaStreamCaptureModeGlobal;
    enum cudaStreamCaptureMode previous = current;
    current = *mode;
    *mode = previous;
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    if ((size_t)stream <= 2)  // a default stream
        return fail(cudaErrorStreamCaptureUnsupported);
    null_begin_capture(stream);
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    *graph = (cudaGraph_t)null_end_capture(stream);
    return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    *count = (size_t)((struct null_graph *)graph)->operations;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph,
                                          unsigned long long flags) {
    struct null_graph *copied = malloc(sizeof *copied);
    *copied = *(struct null_graph *)graph;
    *executable = (cudaGraphExec_t)copied;
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    null_replay((struct null_graph *)executable);
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) { free(graph); return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { free(graph); return cudaSuccess; }

// ---------------------------------------------------------------------------------------------
// kernels: how compiled CUDA code announces and launches them. nvcc writes calls of the functions
// with two underscores for `kernel<<<grid, block, shared, stream>>>(...)`

struct launch_options { dim3 grid, block; size_t shared; void *stream; };
static __thread struct launch_options pushed;  // between <<<...>>> and the launch

struct kernel { const void *function; const char *name; };
static struct kernel *kernels;  // only with NULL_TRACE, because there are 40,000
static size_t num_kernels;

static const char *kernel_name(const void *function) {
    for (size_t i = 0; i < num_kernels; i++)
        if (kernels[i].function == function)
            return kernels[i].name;
    return "kernel";
}

void **__cudaRegisterFatBinary(void *binary) { static void *handle; return &handle; }
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
char __cudaInitModule(void **handle) { return 1; }

void __cudaRegisterVar(void **handle, char *variable, char *address, const char *name, int external,
                       size_t size, int constant, int global) {}

void __cudaRegisterFunction(void **handle, const char *function, char *device_function,
                            const char *name, int thread_limit, void *thread, void *block,
                            dim3 *block_size, dim3 *grid_size, int *warp_size) {
    if (!getenv("NULL_TRACE"))
        return;
    if (num_kernels % 4096 == 0)
        kernels = realloc(kernels, (num_kernels + 4096) * sizeof *kernels);
    kernels[num_kernels++] = (struct kernel){function, name};
}

// the handle of a kernel is the address of its function on the host
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    pushed = (struct launch_options){grid, block, shared, stream};
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = pushed.grid;
    *block = pushed.block;
    *shared = pushed.shared;
    *(void **)stream = pushed.stream;
    return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments,
                             size_t shared, cudaStream_t stream) {
    null_launch(stream, kernel_name(function));
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments,
                               size_t shared, cudaStream_t stream) {
    return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function,
                                void **arguments) {
    null_launch(config->stream, kernel_name(function));
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32;
    attributes->binaryVersion = attributes->ptxVersion = null_card()->compute_capability;
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute,
                                 int value) {
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
        int *blocks, const void *function, int block_size, size_t shared, unsigned flags) {
    *blocks = 2;
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------
// functions of the driver, by name. Torch asks for all functions that it might call one day, and
// stops if one is missing. A function that driver.c lacks is therefore one that always fails

static int not_supported(void) { return 801; }  // CUDA_ERROR_NOT_SUPPORTED

void *null_driver_function(const char *name) {
    char successor[128];  // some functions have a newer version, which cuda.h calls NAME_v2
    snprintf(successor, sizeof successor, "%s_v2", name);
    void *function = dlsym(RTLD_DEFAULT, successor);
    if (!function)
        function = dlsym(RTLD_DEFAULT, name);
    return function ? function : (void *)not_supported;
}

cudaError_t cudaGetDriverEntryPointByVersion(
        const char *name, void **function, unsigned version, unsigned long long flags,
        enum cudaDriverEntryPointQueryResult *result) {
    *function = null_driver_function(name);
    if (result)
        *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
