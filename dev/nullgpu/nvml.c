// NVIDIA's management library (libnvidia-ml.so.1) of a GPU that computes nothing: what torch asks
// before it uses expandable segments, and when it explains that memory ran out.
// SPDX-License-Identifier: MIT (LICENSE in the root of gpt2-lab)

enum { SUCCESS = 0, NOT_SUPPORTED = 3 };  // of nvmlReturn_t

int nvmlInit_v2(void) { return SUCCESS; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 13000; return SUCCESS; }

int nvmlDeviceGetHandleByPciBusId_v2(const char *id, void **device) {
    static char only_device;
    *device = &only_device;
    return SUCCESS;
}

int nvmlDeviceGetNvLinkRemoteDeviceType(void) { return NOT_SUPPORTED; }
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void) { return NOT_SUPPORTED; }

int nvmlDeviceGetComputeRunningProcesses(void *device, unsigned *count, void *processes) {
    *count = 0;
    return SUCCESS;
}

// The caller has set the answer to zeros, which say that the device is not part of a fabric
int nvmlDeviceGetGpuFabricInfoV(void) { return SUCCESS; }
