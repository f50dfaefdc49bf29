/* The in-flight area of one split virtqueue: which chains a backend holds, kept in memory
 * that outlives it (QEMU's docs/interop/vhost-user.rst, "Inflight I/O tracking").
 *
 * It owns the order of the stores, which makes each moment between two of them a safe one to
 * be killed at, and what a successor reads from them.  It must not know rings: heads and used
 * indices come as numbers.  The frontend shares the memory, so every index is checked.
 */
#ifndef PYVMM_INFLIGHT_H
#define PYVMM_INFLIGHT_H

#include <stdint.h>
#include <stdlib.h>

#define INFLIGHT_VERSION 1

struct inflight_entry {         /* DescStateSplit */
    uint8_t inflight;
    uint8_t padding[5];
    uint16_t next;
    uint64_t counter;
};

struct inflight_area {          /* QueueRegionSplit */
    uint64_t features;
    uint16_t version;
    uint16_t desc_num;
    uint16_t last_batch_head;
    uint16_t used_idx;
    struct inflight_entry desc[];
};

struct inflight_order {
    uint64_t counter;
    uint16_t head;
};

/* All that a kill needs is that the compiler keeps the order: the memory is coherent. */
#define INFLIGHT_STORE(place, value) __atomic_store_n(&(place), (value), __ATOMIC_RELEASE)
#define INFLIGHT_LOAD(place) __atomic_load_n(&(place), __ATOMIC_RELAXED)

static inline uint64_t inflight_room(uint64_t bytes)
{
    if (bytes < sizeof(struct inflight_area))
        return 0;
    return (bytes - sizeof(struct inflight_area)) / sizeof(struct inflight_entry);
}

/* A chain was taken from the available ring. */
static inline void inflight_taken(struct inflight_area *area, uint16_t head, uint64_t counter)
{
    INFLIGHT_STORE(area->desc[head].counter, counter);
    INFLIGHT_STORE(area->desc[head].inflight, 1);
}

/* A chain was put back, as if never taken: the caller goes from the latest to the earliest. */
static inline void inflight_untaken(struct inflight_area *area, uint16_t head)
{
    INFLIGHT_STORE(area->desc[head].inflight, 0);
}

/* A batch of one chain goes to the used ring: call this before its index moves... */
static inline void inflight_using(struct inflight_area *area, uint16_t head)
{
    INFLIGHT_STORE(area->desc[head].next, INFLIGHT_LOAD(area->last_batch_head));
    INFLIGHT_STORE(area->last_batch_head, head);
}

/* ...and this after. */
static inline void inflight_used(struct inflight_area *area, uint16_t head, uint16_t used_idx)
{
    INFLIGHT_STORE(area->desc[head].inflight, 0);
    INFLIGHT_STORE(area->used_idx, used_idx);
}

/* Finish what the predecessor was killed in: its last batch is used, whatever the marks say. */
static inline void inflight_settle(struct inflight_area *area, uint32_t size, uint16_t used_idx)
{
    uint32_t batch = (uint16_t)(used_idx - INFLIGHT_LOAD(area->used_idx));
    uint16_t head = INFLIGHT_LOAD(area->last_batch_head);

    for (uint32_t i = 0; i < batch && i < size && head < size; i++) {
        INFLIGHT_STORE(area->desc[head].inflight, 0);
        head = INFLIGHT_LOAD(area->desc[head].next);
    }
    INFLIGHT_STORE(area->used_idx, used_idx);
}

static int inflight_compare(const void *left, const void *right)
{
    uint64_t a = ((const struct inflight_order *)left)->counter;
    uint64_t b = ((const struct inflight_order *)right)->counter;

    return a < b ? -1 : a > b;
}

/* The chains to submit again, in the order in which they were taken; how many, or -1. */
static inline int64_t inflight_list(
    struct inflight_area *area, uint32_t size, uint16_t *heads, uint64_t *next_counter)
{
    struct inflight_order *order = malloc(size * sizeof(*order));
    uint32_t count = 0;

    if (order == NULL)
        return -1;
    for (uint32_t head = 0; head < size; head++) {
        if (INFLIGHT_LOAD(area->desc[head].inflight) == 1) {
            order[count].head = (uint16_t)head;
            order[count++].counter = INFLIGHT_LOAD(area->desc[head].counter);
        }
    }
    qsort(order, count, sizeof(*order), inflight_compare);
    for (uint32_t i = 0; i < count; i++)
        heads[i] = order[i].head;
    *next_counter = count ? order[count - 1].counter + 1 : 0;
    free(order);
    return count;
}

#endif
