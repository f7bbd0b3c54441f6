// The imitated machine: devices, memory, streams, graphs and counters.
// SPDX-License-Identifier: MIT (LICENSE in the root of gpt2-lab)

#define _GNU_SOURCE
#include "nullgpu.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { MAX_DEVICES = 16 };

// one lock for everything that several threads change
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

// ---------------------------------------------------------------------------------------------
// devices

// From NVIDIA's data sheets and from the table of compute capabilities in the CUDA programming
// guide. The memory is what is left of the nominal size on cards in use. The first card is the
// default, and the first card of a compute capability is the one that NULL_CC chooses.
static const struct null_card CARDS[] = {
    {"NVIDIA H100 80GB HBM3", 90, 79.1, 132, 2048, 228, 50},
    {"NVIDIA H200", 90, 139.8, 132, 2048, 228, 60},
    {"NVIDIA B200", 100, 178.3, 148, 2048, 228, 126},
    {"NVIDIA A100-SXM4-80GB", 80, 79.1, 108, 2048, 164, 40},
    {"NVIDIA A100-SXM4-40GB", 80, 39.4, 108, 2048, 164, 40},
    {"NVIDIA GeForce RTX 5090", 120, 31.3, 170, 1536, 100, 96},
    {"NVIDIA GeForce RTX 4090", 89, 23.5, 128, 1536, 100, 72},
    {"NVIDIA L4", 89, 22.0, 58, 1536, 100, 48},  // before L40S, whose name begins alike
    {"NVIDIA L40S", 89, 44.4, 142, 1536, 100, 96},
    {"NVIDIA GeForce RTX 3090", 86, 23.6, 82, 1536, 100, 6},
    {"NVIDIA A10G", 86, 22.1, 80, 1536, 100, 6},
    {"Tesla T4", 75, 14.6, 40, 1024, 64, 4},
    {"Tesla V100-SXM2-32GB", 70, 31.7, 80, 2048, 96, 6},
};
enum { NUM_CARDS = sizeof CARDS / sizeof CARDS[0] };

static struct null_card card;
static int num_devices;
static __thread int device;  // the current device belongs to a thread, as in CUDA
static bool tracing;

static double number_from_environment(const char *name, double otherwise) {
    const char *text = getenv(name);
    if (!text || !*text)
        return otherwise;
    char *end;
    double number = strtod(text, &end);
    if (*end || number <= 0) {
        fprintf(stderr, "nullgpu: %s is %s, but it must be a positive number\n", name, text);
        exit(2);
    }
    return number;
}

// The card that NULL_NAME names in full or in part, else the first one with the compute capability
// NULL_CC, else the first one of the table.
static struct null_card choose_card(const char *name, int compute_capability) {
    for (int i = 0; i < NUM_CARDS; i++)
        if (name ? strstr(CARDS[i].name, name) != NULL
                 : CARDS[i].compute_capability == compute_capability)
            return CARDS[i];
    return CARDS[0];
}

// Runs when the library is loaded, before any other function of it.
__attribute__((constructor)) static void read_environment(void) {
    const char *name = getenv("NULL_NAME");
    name = name && *name ? name : NULL;
    int compute_capability = (int)number_from_environment("NULL_CC", 0);
    card = choose_card(name, compute_capability);
    if (name)
        card.name = name;
    if (compute_capability)
        card.compute_capability = compute_capability;
    card.memory_gib = number_from_environment("NULL_MEMORY", card.memory_gib);
    num_devices = (int)number_from_environment("NULL_DEVICES", 1);
    if (num_devices > MAX_DEVICES)
        num_devices = MAX_DEVICES;
    tracing = number_from_environment("NULL_TRACE", 0.5) >= 1;
}

const struct null_card *null_card(void) { return &card; }
int null_num_devices(void) { return num_devices; }
int null_device(void) { return device; }
void null_set_device(int number) { device = number; }

// ---------------------------------------------------------------------------------------------
// work

static struct {
    long launches;         // kernels and matmuls, except those that were recorded in a graph
    long captures;         // graphs that were recorded
    long captured;         // kernels, matmuls and copies in these graphs
    long replays;          // launches of a graph
    long replayed;         // kernels, matmuls and copies in the graphs that were launched
    long synchronizations; // calls in which the host waits for the device
    long copies[3], bytes_copied[3];  // by null_direction, except those that were recorded
    long allocations;      // calls that asked for device memory
    long failed_allocations;
    size_t used[MAX_DEVICES], peak[MAX_DEVICES];  // bytes of device memory, on each device
} count;

// Print a line of NULL_TRACE=1. Called under the lock.
#define TRACE(...) do { if (tracing) fprintf(stderr, "nullgpu: " __VA_ARGS__); } while (0)

// Whether an operation is recorded in a graph instead of being carried out. Called under the lock.
static bool record(void *stream) {
    struct null_graph *graph = null_recorded_graph(stream);
    if (!graph)
        return false;
    graph->operations++;
    count.captured++;
    return true;
}

// What the host has sent since the last kernel was launched, the newest last. More is forgotten.
// Larger copies are never carried out, because the host would need as much memory as the device.
#define MOST_BYTES_SENT ((size_t)1 << 20)
static struct { const char *start; size_t size; } sent[64];
static size_t num_sent;

static void remember_sent(void *to, const void *from, size_t size) {
    enum { MOST = sizeof sent / sizeof sent[0] };
    if (size > MOST_BYTES_SENT)
        return;
    memcpy(to, from, size);
    if (num_sent == MOST)
        memmove(sent, sent + 1, --num_sent * sizeof sent[0]);
    sent[num_sent].start = to;
    sent[num_sent++].size = size;
}

static bool was_sent(const char *start, size_t size) {
    for (size_t i = 0; i < num_sent; i++)
        if (sent[i].start <= start && start + size <= sent[i].start + sent[i].size)
            return true;
    return false;
}

void null_launch(void *stream, const char *kernel) {
    pthread_mutex_lock(&lock);
    bool recorded = record(stream);
    if (!recorded) {
        count.launches++;
        num_sent = 0;
    }
    TRACE("%s %s\n", recorded ? "record" : "launch", kernel);
    pthread_mutex_unlock(&lock);
}

static void carry_out_copy(enum null_direction direction, void *to, const void *from, size_t size) {
    count.copies[direction]++;
    count.bytes_copied[direction] += (long)size;
    if (direction == NULL_TO_DEVICE)
        remember_sent(to, from, size);
    else if (direction == NULL_ON_THE_DEVICE)
        num_sent = 0;
    else if (was_sent(from, size))
        memcpy(to, from, size);
    else
        memset(to, 0, size);
}

void null_copy(void *stream, enum null_direction direction, void *to, const void *from,
               size_t size) {
    static const char *const NAMES[] = {"to the device", "to the host", "on the device"};
    if (direction == NULL_ON_THE_HOST) {
        memmove(to, from, size);
        return;
    }
    pthread_mutex_lock(&lock);
    bool recorded = record(stream);
    if (!recorded)
        carry_out_copy(direction, to, from, size);
    TRACE("%s %zu bytes %s\n", recorded ? "record copy of" : "copy", size, NAMES[direction]);
    pthread_mutex_unlock(&lock);
}

void null_synchronize(const char *function) {
    pthread_mutex_lock(&lock);
    count.synchronizations++;
    TRACE("synchronize by %s\n", function);
    pthread_mutex_unlock(&lock);
}

// ---------------------------------------------------------------------------------------------
// counters

const char *null_statistics(void) {
    static __thread char text[1024];
    const char *rank = getenv("RANK");  // torchrun sets it
    size_t used = 0, peak = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < num_devices; i++) {
        used += count.used[i];
        peak += count.peak[i];
    }
    snprintf(text, sizeof text,
             "{\"rank\": %d, \"launches\": %ld, \"captures\": %ld, \"captured\": %ld, "
             "\"replays\": %ld, \"replayed\": %ld, \"synchronizations\": %ld, "
             "\"copies_to_device\": %ld, \"bytes_to_device\": %ld, "
             "\"copies_to_host\": %ld, \"bytes_to_host\": %ld, "
             "\"copies_on_device\": %ld, \"bytes_on_device\": %ld, "
             "\"allocations\": %ld, \"failed_allocations\": %ld, "
             "\"allocated_bytes\": %zu, \"peak_allocated_bytes\": %zu}",
             rank ? atoi(rank) : 0, count.launches, count.captures, count.captured,
             count.replays, count.replayed, count.synchronizations,
             count.copies[NULL_TO_DEVICE], count.bytes_copied[NULL_TO_DEVICE],
             count.copies[NULL_TO_HOST], count.bytes_copied[NULL_TO_HOST],
             count.copies[NULL_ON_THE_DEVICE], count.bytes_copied[NULL_ON_THE_DEVICE],
             count.allocations, count.failed_allocations, used, peak);
    pthread_mutex_unlock(&lock);
    return text;
}

// NULL_STATS=1 prints the counters when a process ends. Compilers and other helper processes, in
// which the library is loaded as well, allocate nothing on a device and print nothing.
__attribute__((destructor)) static void print_statistics(void) {
    const char *wanted = getenv("NULL_STATS");
    if (wanted && *wanted && count.allocations)
        fprintf(stderr, "nullgpu statistics: %s\n", null_statistics());
}

// ---------------------------------------------------------------------------------------------
// memory

struct range {  // addresses that were handed out
    struct range *next;
    char *start;
    size_t size;
    size_t counted;  // bytes that count as used on the device
    enum null_place place;
    int device;
};

static struct range *ranges;  // some hundreds at most, because torch allocates large blocks

size_t null_total_memory(void) { return (size_t)(card.memory_gib * (1ul << 30)); }

size_t null_free_memory(void) {
    pthread_mutex_lock(&lock);
    size_t free_bytes = null_total_memory() - count.used[device];
    pthread_mutex_unlock(&lock);
    return free_bytes;
}

bool null_use_memory(int number, size_t size) {
    pthread_mutex_lock(&lock);
    count.allocations++;
    bool fits = size <= null_total_memory() - count.used[number];
    if (fits) {
        count.used[number] += size;
        if (count.used[number] > count.peak[number])
            count.peak[number] = count.used[number];
    } else {
        count.failed_allocations++;
    }
    TRACE("%s %zu bytes on device %d\n", fits ? "allocate" : "out of memory for", size, number);
    pthread_mutex_unlock(&lock);
    return fits;
}

void null_unuse_memory(int number, size_t size) {
    pthread_mutex_lock(&lock);
    count.used[number] -= size;
    TRACE("free %zu bytes on device %d\n", size, number);
    pthread_mutex_unlock(&lock);
}

static void *reserve(size_t size, enum null_place place, size_t counted) {
    void *start = mmap(NULL, size, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    struct range *range = malloc(sizeof *range);
    if (start == MAP_FAILED || !range) {
        fprintf(stderr, "nullgpu: the host has no addresses for %zu bytes\n", size);
        abort();
    }
    *range = (struct range){ranges, start, size, counted, place, device};
    pthread_mutex_lock(&lock);
    range->next = ranges;
    ranges = range;
    pthread_mutex_unlock(&lock);
    return start;
}

void *null_reserve(size_t size, enum null_place place) { return reserve(size, place, 0); }

void *null_allocate(size_t size) {
    return null_use_memory(device, size) ? reserve(size, NULL_ON_DEVICE, size) : NULL;
}

bool null_release(void *address) {
    pthread_mutex_lock(&lock);
    struct range **link = &ranges;
    while (*link && (*link)->start != address)
        link = &(*link)->next;
    struct range *range = *link;
    if (range)
        *link = range->next;
    pthread_mutex_unlock(&lock);
    if (!range)
        return false;
    munmap(range->start, range->size);  // the pages go back to the system
    if (range->counted)
        null_unuse_memory(range->device, range->counted);
    free(range);
    return true;
}

static struct range find_range(const void *address) {
    struct range found = {.place = NULL_NOWHERE};
    pthread_mutex_lock(&lock);
    for (struct range *range = ranges; range; range = range->next)
        if (range->start <= (char *)address && (char *)address < range->start + range->size)
            found = *range;
    pthread_mutex_unlock(&lock);
    return found;
}

enum null_place null_place_of(const void *address) { return find_range(address).place; }
int null_device_of(const void *address) { return find_range(address).device; }

// ---------------------------------------------------------------------------------------------
// streams and graphs

static __thread int captures_of_this_thread;

struct null_stream *null_new_stream(void) { return calloc(1, sizeof(struct null_stream)); }

struct null_graph *null_recorded_graph(void *stream) {
    // 0, 1 and 2 are CUDA's names of the default streams, on which nothing can be recorded
    return (size_t)stream <= 2 ? NULL : ((struct null_stream *)stream)->graph;
}

bool null_thread_is_capturing(void) { return captures_of_this_thread > 0; }

void null_begin_capture(void *stream) {
    pthread_mutex_lock(&lock);
    ((struct null_stream *)stream)->graph = calloc(1, sizeof(struct null_graph));
    count.captures++;
    TRACE("capture begins\n");
    pthread_mutex_unlock(&lock);
    captures_of_this_thread++;
}

struct null_graph *null_end_capture(void *stream) {
    pthread_mutex_lock(&lock);
    struct null_graph *graph = null_recorded_graph(stream);
    ((struct null_stream *)stream)->graph = NULL;
    TRACE("capture ends with %ld operations\n", graph ? graph->operations : 0);
    pthread_mutex_unlock(&lock);
    captures_of_this_thread--;
    return graph;
}

void null_replay(struct null_graph *graph) {
    pthread_mutex_lock(&lock);
    count.replays++;
    count.replayed += graph->operations;
    num_sent = 0;
    TRACE("replay of a graph of %ld operations\n", graph->operations);
    pthread_mutex_unlock(&lock);
}
