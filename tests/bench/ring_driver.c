/* A driver's hot loop for benchmarks: keep `depth` chains of one split virtqueue in flight.
 *
 * Whoever calls it has described the chains in the descriptor table; this only offers their
 * heads, kicks, waits for calls and offers again (virtio 1.3, section 2.7; no event index).
 * Built and called by tests/bench/rings.py. */
#include <poll.h>
#include <stdint.h>
#include <unistd.h>

struct job {
    char *memory;               /* guest address 0 */
    uint64_t desc, avail, used;
    uint32_t size, depth;
    uint32_t step;              /* heads are 0, step, 2 * step... */
    int32_t kick, call;
    uint32_t timeout_ms;
    uint64_t headers;           /* blk: request headers, 16 bytes each; 0: none */
    uint64_t sectors;           /* blk: where random sectors end */
    uint64_t count;             /* how many chains in all */
    uint64_t bytes;             /* result: used lengths, summed */
};

static uint64_t random_next(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static void offer(struct job *job, uint16_t *index, uint32_t slot, uint64_t *state)
{
    uint16_t *ring = (uint16_t *)(job->memory + job->avail + 4);

    if (job->headers)
        *(uint64_t *)(job->memory + job->headers + 16 * slot + 8) =
            random_next(state) % (job->sectors / 8) * 8;
    ring[*index % job->size] = (uint16_t)(slot * job->step);
    *index += 1;
}

static void publish(struct job *job, uint16_t index)
{
    uint64_t one = 1;

    __atomic_store_n((uint16_t *)(job->memory + job->avail + 2), index, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (!(__atomic_load_n((uint16_t *)(job->memory + job->used), __ATOMIC_ACQUIRE) & 1)) {
        if (write(job->kick, &one, 8) < 0)
            return;
    }
}

static int await_call(struct job *job)
{
    struct pollfd poll_fd = {.fd = job->call, .events = POLLIN};
    uint64_t drain;

    if (poll(&poll_fd, 1, (int)job->timeout_ms) <= 0)
        return -1;
    return read(job->call, &drain, 8) == 8 ? 0 : -1;
}

/* 0, or -1 when the device did not answer in time. */
int drive(struct job *job)
{
    uint16_t index = *(uint16_t *)(job->memory + job->avail + 2);
    uint16_t seen = *(uint16_t *)(job->memory + job->used + 2);
    uint64_t sent = 0, done = 0, state = 88172645463325252ull;

    for (uint32_t slot = 0; slot < job->depth && sent < job->count; slot++, sent++)
        offer(job, &index, slot, &state);
    publish(job, index);
    while (done < job->count) {
        uint16_t used = __atomic_load_n((uint16_t *)(job->memory + job->used + 2), __ATOMIC_ACQUIRE);

        if (used == seen) {
            if (await_call(job))
                return -1;
            continue;
        }
        for (; seen != used; seen++, done++) {
            uint32_t *element = (uint32_t *)(job->memory + job->used + 4) + 2 * (seen % job->size);

            job->bytes += element[1];
            if (sent < job->count) {
                offer(job, &index, element[0] / job->step, &state);
                sent++;
            }
        }
        publish(job, index);
    }
    return 0;
}
