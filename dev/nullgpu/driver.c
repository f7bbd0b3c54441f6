// The CUDA driver (libcuda.so.1) of a GPU that computes nothing: the part that Triton's launcher,
// Inductor and torch's expandable segments call. NVIDIA's documentation of the "CUDA Driver API"
// says what each function should do; a comment here says what is different.
// SPDX-License-Identifier: MIT (LICENSE in the root of gpt2-lab)

#include "nullgpu.h"

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void *null_driver_function(const char *name);  // in runtime.c

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { cudaDriverGetVersion(version); return CUDA_SUCCESS; }

CUresult cuGetProcAddress(const char *name, void **function, int version, cuuint64_t flags,
                          CUdriverProcAddressQueryResult *result) {
    *function = null_driver_function(name);
    if (result)
        *result = CU_GET_PROC_ADDRESS_SUCCESS;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char **text) {
    *text = error == CUDA_SUCCESS ? "CUDA_SUCCESS" : "an error of the null GPU";
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) { return cuGetErrorName(error, text); }

// ---------------------------------------------------------------------------------------------
// devices and contexts. The context of a device is its number plus one

CUresult cuDeviceGetCount(int *count) { *count = null_num_devices(); return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int number) { *device = number; return CUDA_SUCCESS; }

CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    snprintf(name, (size_t)length, "%s", null_card()->name);
    return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem(size_t *bytes, CUdevice device) {
    *bytes = null_total_memory();
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid(CUuuid *uuid, CUdevice device) {
    memset(uuid, 0, sizeof *uuid);
    uuid->bytes[0] = (char)(device + 1);
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    switch (attribute) {  // what the runtime does not know; the numbers of the others are the same
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: *value = 1755000; break;  // kHz
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = 2619000; break;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 5120; break;  // bits
    default: cudaDeviceGetAttribute(value, (enum cudaDeviceAttr)attribute, device);
    }
    return CUDA_SUCCESS;
}

static CUcontext context_of(CUdevice device) { return (CUcontext)((size_t)device + 1); }

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    *context = context_of(device);
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease(CUdevice device) { return CUDA_SUCCESS; }

CUresult cuCtxGetCurrent(CUcontext *context) {
    *context = context_of(null_device());
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
    if (context)
        null_set_device((int)(size_t)context - 1);
    return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent(CUcontext context) { return cuCtxSetCurrent(context); }
CUresult cuCtxPopCurrent(CUcontext *context) { return cuCtxGetCurrent(context); }
CUresult cuCtxGetDevice(CUdevice *device) { *device = null_device(); return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
    *value = 1 << 20;
    return CUDA_SUCCESS;
}

CUresult cuStreamGetCtx(CUstream stream, CUcontext *context) { return cuCtxGetCurrent(context); }

// ---------------------------------------------------------------------------------------------
// memory. Torch's expandable segments reserve addresses first and give memory to them later

CUresult cuMemGetInfo(size_t *free_bytes, size_t *total) {
    cudaMemGetInfo(free_bytes, total);
    return CUDA_SUCCESS;
}

CUresult cuMemGetAllocationGranularity(size_t *granularity, const CUmemAllocationProp *properties,
                                       CUmemAllocationGranularity_flags flags) {
    *granularity = 2 << 20;
    return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr *address, size_t size, size_t alignment,
                             CUdeviceptr wanted, unsigned long long flags) {
    *address = (CUdeviceptr)null_reserve(size, NULL_ON_DEVICE);
    return CUDA_SUCCESS;
}

CUresult cuMemAddressFree(CUdeviceptr address, size_t size) {
    return null_release((void *)address) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

struct chunk { int device; size_t size; };  // memory without an address

CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size,
                     const CUmemAllocationProp *properties, unsigned long long flags) {
    int device = properties->location.id;
    if (!null_use_memory(device, size))
        return CUDA_ERROR_OUT_OF_MEMORY;
    struct chunk *chunk = malloc(sizeof *chunk);
    *chunk = (struct chunk){device, size};
    *handle = (CUmemGenericAllocationHandle)chunk;
    return CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    struct chunk *chunk = (struct chunk *)handle;
    null_unuse_memory(chunk->device, chunk->size);
    free(chunk);
    return CUDA_SUCCESS;
}

CUresult cuMemMap(CUdeviceptr address, size_t size, size_t offset,
                  CUmemGenericAllocationHandle handle, unsigned long long flags) {
    return CUDA_SUCCESS;
}

CUresult cuMemUnmap(CUdeviceptr address, size_t size) { return CUDA_SUCCESS; }

CUresult cuMemSetAccess(CUdeviceptr address, size_t size, const CUmemAccessDesc *access,
                        size_t count) {
    return CUDA_SUCCESS;
}

// Triton asks this for every tensor that a kernel gets. The error tells it that a tensor is on the
// CPU, as with a real driver
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
    if (null_place_of((void *)address) == NULL_NOWHERE)
        return CUDA_ERROR_INVALID_VALUE;
    if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
        *(CUdeviceptr *)value = address;
    return CUDA_SUCCESS;
}

// ---------------------------------------------------------------------------------------------
// modules and kernels. ptxas has compiled them; here they are only names

static CUresult load_module(CUmodule *module) { *module = malloc(1); return CUDA_SUCCESS; }

CUresult cuModuleLoad(CUmodule *module, const char *file) { return load_module(module); }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { return load_module(module); }

CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned num_options,
                            CUjit_option *options, void **values) {
    return load_module(module);
}

CUresult cuModuleUnload(CUmodule module) { free(module); return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    *function = (CUfunction)strdup(name);
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = 40; break;
    default: *value = 0;  // above all, no register is spilled to local memory
    }
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction function,
                                                     int block_size, size_t shared) {
    *blocks = 2;
    return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function,
                                      const CUlaunchConfig *config) {
    *clusters = 2;
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                        unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                        CUstream stream, void **arguments, void **extra) {
    null_launch(stream, (const char *)function);
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments,
                          void **extra) {
    null_launch(config->hStream, (const char *)function);
    return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(
        CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
        const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
        const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
        CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
        CUtensorMapFloatOOBfill fill) {
    memset(map, 0, sizeof *map);
    return CUDA_SUCCESS;
}
