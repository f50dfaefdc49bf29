/* An echo backend's loop in C, to compare ours with: the same rules, the same checks.
 *
 * One split virtqueue without event index; memory is one region from guest address 0.  Each chain's
 * device-readable bytes go into its device-writable bytes (virtio 1.3, section 2.7).  Runs in a
 * thread of tests/bench/echo.py until the stop descriptor is readable.
 */
#include <poll.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

struct ring {
    char *memory;
    uint64_t memory_size;
    uint64_t desc, avail, used;
    uint32_t size;
    int32_t kick, call, stop;
    uint64_t count;             /* result */
};

struct desc {
    uint64_t address;
    uint32_t length;
    uint16_t flags, next;
};

enum { NEXT = 1, WRITE = 2, MOST = 64 };

struct part {
    char *at;
    uint32_t length;
};

static int collect(struct ring *ring, uint16_t head, struct part *in, struct part *out, int *ins, int *outs)
{
    const struct desc *table = (const struct desc *)(ring->memory + ring->desc);
    uint32_t index = head;

    *ins = *outs = 0;
    for (uint32_t left = ring->size; left; left--) {
        if (index >= ring->size)
            return -1;
        struct desc item = table[index];
        if (item.address > ring->memory_size || item.length > ring->memory_size - item.address)
            return -1;
        struct part part = {ring->memory + item.address, item.length};
        if (*ins + *outs == MOST)
            return -1;
        if (item.flags & WRITE)
            out[(*outs)++] = part;
        else if (*outs)
            return -1;
        else
            in[(*ins)++] = part;
        if (!(item.flags & NEXT))
            return 0;
        index = item.next;
    }
    return -1;
}

static uint32_t copy(struct part *in, struct part *out, int ins, int outs)
{
    uint32_t total = 0, from = 0, to = 0;
    int i = 0, o = 0;

    while (i < ins && o < outs) {
        uint32_t a = in[i].length - from, b = out[o].length - to, part = a < b ? a : b;

        memmove(out[o].at + to, in[i].at + from, part);
        total += part, from += part, to += part;
        if (from == in[i].length)
            i++, from = 0;
        if (to == out[o].length)
            o++, to = 0;
    }
    return total;
}

static int batch(struct ring *ring, uint16_t *seen)
{
    uint16_t *used_index = (uint16_t *)(ring->memory + ring->used + 2), used = *used_index, before = used;
    uint16_t *avail_index = (uint16_t *)(ring->memory + ring->avail + 2);
    uint16_t *heads = (uint16_t *)(ring->memory + ring->avail + 4);
    uint32_t *elements = (uint32_t *)(ring->memory + ring->used + 4);
    struct part in[MOST], out[MOST];
    uint64_t one = 1;
    int ins, outs;

    while (__atomic_load_n(avail_index, __ATOMIC_ACQUIRE) != *seen) {
        uint16_t head = heads[*seen % ring->size];

        if (collect(ring, head, in, out, &ins, &outs))
            return -1;
        ++*seen;
        elements[2 * (used % ring->size)] = head;
        elements[2 * (used % ring->size) + 1] = copy(in, out, ins, outs);
        __atomic_store_n(used_index, ++used, __ATOMIC_RELEASE);
        ring->count++;
    }
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (used != before && !(*(uint16_t *)(ring->memory + ring->avail) & 1))
        return write(ring->call, &one, 8) == 8 ? 0 : -1;
    return 0;
}

/* 0 when stopped, -1 when the driver broke a rule. */
int echo_loop(struct ring *ring)
{
    uint16_t seen = 0, *flags = (uint16_t *)(ring->memory + ring->used);
    uint16_t *avail_index = (uint16_t *)(ring->memory + ring->avail + 2);
    uint64_t drain;

    for (;;) {
        struct pollfd fds[2] = {{.fd = ring->kick, .events = POLLIN}, {.fd = ring->stop, .events = POLLIN}};

        if (batch(ring, &seen))
            return -1;
        __atomic_store_n(flags, 0, __ATOMIC_RELAXED);
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        poll(fds, 2, __atomic_load_n(avail_index, __ATOMIC_ACQUIRE) == seen ? -1 : 0);
        if (fds[1].revents)
            return 0;
        if (fds[0].revents && read(ring->kick, &drain, 8) != 8)
            return -1;
    }
}
