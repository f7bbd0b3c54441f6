// A GPU that computes nothing: what the imitated libraries share.
// SPDX-License-Identifier: MIT (LICENSE in the root of gpt2-lab)
//
// runtime.c  the CUDA runtime   what torch calls
// driver.c   the CUDA driver    what Triton and torch's expandable segments call
// cublas.c   cuBLAS             matmuls
// nvml.c     NVML               what torch asks about the machine
// nullgpu.c  devices, memory, streams, graphs and counters, on which the other four files rest
//
// All five files become one shared library, libcuda.so.1. dev/nullgpu/run preloads the library, so
// that its functions are found before those of NVIDIA's libraries. A function that is missing here
// is NVIDIA's own one, which reports that there is no driver.

#pragma once
#include <stdbool.h>
#include <stddef.h>

// ---------------------------------------------------------------------------------------------
// devices

struct null_card {
    const char *name;
    int compute_capability;    // 90 stands for 9.0
    double memory_gib;         // what cudaMemGetInfo reports for an unused card
    int multiprocessors;
    int threads_per_multiprocessor;
    int shared_kib;            // shared memory of a multiprocessor. A block may have 1 KiB less
    int l2_mib;
};

const struct null_card *null_card(void);  // of all devices: NULL_NAME, NULL_CC and NULL_MEMORY
int null_num_devices(void);               // NULL_DEVICES, 1 by default
int null_device(void);                    // the current device of this thread
void null_set_device(int device);
size_t null_total_memory(void);           // of one device, in bytes
size_t null_free_memory(void);            // of the current device, in bytes

// ---------------------------------------------------------------------------------------------
// memory

enum null_place { NULL_NOWHERE, NULL_ON_DEVICE, NULL_PINNED };  // NULL_NOWHERE: ordinary memory

// Device memory is addresses of host memory. The system gives a page only to who writes to it, so
// that 80 GiB of device memory cost nothing as long as nobody copies to them.
void *null_allocate(size_t size);          // on the current device. NULL if its memory is full
void *null_reserve(size_t size, enum null_place place);  // without counting the bytes
bool null_release(void *address);          // whether something had been allocated there
bool null_use_memory(int device, size_t size);    // count bytes. false if the memory is full
void null_unuse_memory(int device, size_t size);
enum null_place null_place_of(const void *address);
int null_device_of(const void *address);   // 0 if the address is not on a device

// ---------------------------------------------------------------------------------------------
// streams and graphs

struct null_graph { long operations; };    // kernels and copies that were recorded

struct null_stream { struct null_graph *graph; };  // the graph being recorded, or NULL

struct null_stream *null_new_stream(void);
struct null_graph *null_recorded_graph(void *stream);  // NULL if the stream does not record
void null_begin_capture(void *stream);
struct null_graph *null_end_capture(void *stream);
bool null_thread_is_capturing(void);       // whether this thread records on any stream
void null_replay(struct null_graph *graph);

// ---------------------------------------------------------------------------------------------
// work. A stream that records a graph only notes what would be done. NULL_TRACE=1 prints a line for
// each call of these functions
//
// A kernel might have changed any number on the device. Therefore the host gets back what it has
// sent as long as no kernel has been launched since; after that, it gets zeros.

enum null_direction { NULL_TO_DEVICE, NULL_TO_HOST, NULL_ON_THE_DEVICE, NULL_ON_THE_HOST };

void null_launch(void *stream, const char *kernel);
void null_copy(void *stream, enum null_direction direction, void *to, const void *from,
               size_t size);
void null_synchronize(const char *function);  // the host waits for the device

// All counters of this process as one JSON object. The text is valid until the next call of this
// thread. Python: ctypes.CDLL(None).null_statistics
const char *null_statistics(void);
