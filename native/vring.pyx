# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Virtqueues in shared memory, seen from the device: split and packed (virtio 1.3, 2.7 and 2.8).

It owns the loads and stores on the rings, their ordering, and the proof that everything
a driver wrote there lies inside the memory that the frontend gave us.  It knows nothing
of sockets, eventfds or what the buffers mean: `pyvmm.backend` does.

A driver is hostile until shown otherwise.  Each value in a ring is loaded once, checked,
and used from the local copy; a ring that breaks the rules raises `RingError`.

In one file because the classes use each other's C fields, which Cython hides between modules.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memmove
from posix.unistd cimport write

cimport cython

from pyvmm.errors import RemoteProtocolError

cdef extern from *:
    """
    #include <endian.h>
    #include <stdint.h>

    /* Rings are little-endian; every access is one aligned load or store. */
    static inline uint16_t ring_load16(const char *p)
    { return le16toh(__atomic_load_n((const uint16_t *)p, __ATOMIC_RELAXED)); }
    static inline uint16_t ring_load16_acquire(const char *p)
    { return le16toh(__atomic_load_n((const uint16_t *)p, __ATOMIC_ACQUIRE)); }
    static inline uint32_t ring_load32(const char *p)
    { return le32toh(__atomic_load_n((const uint32_t *)p, __ATOMIC_RELAXED)); }
    static inline uint64_t ring_load64(const char *p)
    { return le64toh(__atomic_load_n((const uint64_t *)p, __ATOMIC_RELAXED)); }
    static inline void ring_store16(char *p, uint16_t v)
    { __atomic_store_n((uint16_t *)p, htole16(v), __ATOMIC_RELAXED); }
    static inline void ring_store16_release(char *p, uint16_t v)
    { __atomic_store_n((uint16_t *)p, htole16(v), __ATOMIC_RELEASE); }
    static inline void ring_store32(char *p, uint32_t v)
    { __atomic_store_n((uint32_t *)p, htole32(v), __ATOMIC_RELAXED); }
    static inline void ring_fence(void)
    { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
    """
    uint16_t ring_load16(const char *p) nogil
    uint16_t ring_load16_acquire(const char *p) nogil
    uint32_t ring_load32(const char *p) nogil
    uint64_t ring_load64(const char *p) nogil
    void ring_store16(char *p, uint16_t v) nogil
    void ring_store16_release(char *p, uint16_t v) nogil
    void ring_store32(char *p, uint32_t v) nogil
    void ring_fence() nogil

cdef extern from "inflight.h" nogil:
    int INFLIGHT_VERSION
    struct inflight_area:
        uint16_t version
    uint64_t inflight_room(uint64_t bytes)
    void inflight_taken(inflight_area *area, uint16_t head, uint64_t counter)
    void inflight_untaken(inflight_area *area, uint16_t head)
    void inflight_using(inflight_area *area, uint16_t head)
    void inflight_used(inflight_area *area, uint16_t head, uint16_t used_idx)
    void inflight_settle(inflight_area *area, uint32_t size, uint16_t used_idx)
    int64_t inflight_list(inflight_area *area, uint32_t size, uint16_t *heads, uint64_t *next_counter)

cdef extern from "<poll.h>" nogil:
    cdef struct pollfd:
        int fd
        short events
        short revents
    int POLLIN
    int poll(pollfd *fds, unsigned long count, int timeout)

cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len
    int RWF_NOWAIT
    ssize_t preadv2(int fd, const iovec *places, int count, int64_t offset, int flags)

# struct virtq_desc flags, virtq_avail flags and virtq_used flags
cdef enum:
    DESC_NEXT = 1
    DESC_WRITE = 2
    DESC_INDIRECT = 4
    AVAIL_NO_INTERRUPT = 1
    USED_NO_NOTIFY = 1
    DESC_BYTES = 16
    RING_HEADER = 4         # flags and idx, before both ring arrays
    USED_BYTES = 8
    MAX_SIZE = 32768
    LEAST_CHAIN_LIMIT = 1024    # drivers exceed the queue size with indirect tables; QEMU allows 1024
    # packed rings: descriptor flags, and flags of the event suppression structures
    DESC_AVAIL = 1 << 7
    DESC_USED = 1 << 15
    EVENT_BYTES = 4
    EVENTS_ON = 0
    EVENTS_OFF = 1
    EVENTS_AT = 2
    INLINE_SEGMENTS = 8
    ECHO_BATCH = 64 << 20   # bytes, until it is time to see whether to stop

cdef enum Verdict:
    FINE = 0
    BAD_INDEX
    BAD_ADDRESS
    BAD_ORDER
    BAD_INDIRECT
    TOO_LONG
    NO_MEMORY
    BAD_AVAIL

cdef tuple VERDICTS = (
    "fine",
    "descriptor index beyond its table",
    "buffer outside the guest's memory",
    "device-readable buffer after a device-writable one",
    "indirect descriptor that is not allowed or malformed",
    "descriptor chain too long, or a loop",
    "out of memory",
    "available index moved by more than the queue size",
)


class RingError(RemoteProtocolError):
    """The driver broke a rule of the virtqueue; the ring cannot go on."""


cdef struct Region:
    uint64_t guest
    uint64_t user
    uint64_t size
    char *host


cdef struct Segment:
    char *host
    uint32_t region
    uint32_t length


cdef struct Segments:
    Segment *items
    uint32_t count
    uint32_t room
    uint32_t readable_count     # the first so many are device-readable
    uint64_t readable
    uint64_t writable
    Segment[INLINE_SEGMENTS] inline_items


cdef struct Descriptor:
    uint64_t address
    uint32_t length
    uint16_t flags
    uint16_t next


cdef struct Token:
    # what gives a chain back: its head or, in packed rings, its buffer ID, and how many
    # descriptors of the ring it takes
    uint16_t head
    uint16_t slots


cdef void segments_start(Segments *self) noexcept nogil:
    self.items = self.inline_items
    self.room = INLINE_SEGMENTS
    self.count = self.readable_count = 0
    self.readable = self.writable = 0


cdef void segments_clear(Segments *self) noexcept nogil:
    """As after `segments_start`, but keeping the room."""
    self.count = self.readable_count = 0
    self.readable = self.writable = 0


cdef uint64_t segments_echo(Segments *self) noexcept nogil:
    """Copy the readable bytes into the writable ones; how many fitted."""
    cdef uint64_t left = min(self.readable, self.writable), part, total = left
    cdef uint32_t source = 0, target = self.readable_count
    cdef uint64_t source_at = 0, target_at = 0
    while left:
        part = min(
            left,
            self.items[source].length - source_at,
            self.items[target].length - target_at,
        )
        memmove(self.items[target].host + target_at, self.items[source].host + source_at, part)
        left -= part
        source_at += part
        target_at += part
        if source_at == self.items[source].length:
            source += 1
            source_at = 0
        if target_at == self.items[target].length:
            target += 1
            target_at = 0
    return total


cdef bint await_kick(int kick_fd, int stop_fd, bint sleep) noexcept nogil:
    """Wait for a kick (`sleep`) or only look; false when it is time to stop."""
    cdef pollfd fds[2]
    cdef uint64_t drain
    cdef iovec place
    cdef ssize_t count
    fds[0].fd, fds[1].fd = kick_fd, stop_fd
    fds[0].events = fds[1].events = POLLIN
    fds[0].revents = fds[1].revents = 0
    if poll(fds, 2, -1 if sleep else 0) < 0:
        return True     # a signal: Python looks at it in its own threads
    if fds[1].revents:
        return False
    if not fds[0].revents:
        return True
    # it may be blocking, and somebody else may have been faster
    place.iov_base, place.iov_len = &drain, 8
    count = preadv2(kick_fd, &place, 1, -1, RWF_NOWAIT)
    if count < 0:
        return errno == EAGAIN or errno == EINTR
    return count > 0    # else no eventfd: it would be readable for ever


cdef void segments_free(Segments *self) noexcept nogil:
    if self.items != NULL and self.items != self.inline_items:
        free(self.items)
    self.items = NULL


cdef bint segments_grow(Segments *self) noexcept nogil:
    cdef uint32_t room = self.room * 4
    cdef Segment *items
    if self.items == self.inline_items:
        items = <Segment *> malloc(room * sizeof(Segment))
        if items != NULL:
            memcpy(items, self.inline_items, self.count * sizeof(Segment))
    else:
        items = <Segment *> realloc(self.items, room * sizeof(Segment))
    if items == NULL:
        return False
    self.items = items
    self.room = room
    return True


@cython.final
cdef class GuestMemory:
    """The guest's memory as one immutable set of mapped regions.

    `regions` yields `(guest_address, user_address, buffer)`; the user address is the one
    that the frontend uses in ring addresses, the buffer is writable and contiguous and its
    length is the region's.  Buffers stay mapped while this object, or a chain or a view
    made from it, lives.  Overlapping regions raise ValueError.
    """

    cdef Region *regions
    cdef Py_buffer *buffers
    cdef uint32_t count
    cdef uint32_t held
    cdef tuple writable_views
    cdef tuple readable_views

    def __cinit__(self, regions=()):
        cdef uint32_t i
        rows = sorted(((int(g), int(u), b) for g, u, b in regions), key=lambda row: row[0])
        self.regions = <Region *> calloc(len(rows) + 1, sizeof(Region))
        self.buffers = <Py_buffer *> calloc(len(rows) + 1, sizeof(Py_buffer))
        if self.regions == NULL or self.buffers == NULL:
            raise MemoryError()
        for i, (guest, user, buffer) in enumerate(rows):
            PyObject_GetBuffer(buffer, &self.buffers[i], PyBUF_SIMPLE | PyBUF_WRITABLE)
            self.held = i + 1
            self._add(i, guest, user)
        self.count = len(rows)
        self.writable_views = tuple(memoryview(row[2]).cast("B") for row in rows)
        self.readable_views = tuple(view.toreadonly() for view in self.writable_views)

    cdef int _add(self, uint32_t i, uint64_t guest, uint64_t user) except -1:
        cdef Region *region = &self.regions[i]
        cdef uint64_t size = self.buffers[i].len
        if guest + size < guest or user + size < user:
            raise ValueError(f"region at {guest:#x} runs over the end of the address space")
        if i and guest < self.regions[i - 1].guest + self.regions[i - 1].size:
            raise ValueError(f"region at {guest:#x} overlaps the one before it")
        region.guest = guest
        region.user = user
        region.size = size
        region.host = <char *> self.buffers[i].buf
        return 0

    def __dealloc__(self):
        cdef uint32_t i
        for i in range(self.held):
            PyBuffer_Release(&self.buffers[i])
        free(self.buffers)
        free(self.regions)

    def __len__(self):
        return self.count

    def view(self, uint64_t address, uint64_t length):
        """A writable memoryview of `length` bytes at a guest address, inside one region."""
        cdef int64_t i = self.find(address)
        if i < 0 or length > self.regions[i].size - (address - self.regions[i].guest):
            raise ValueError(f"guest memory {address:#x}+{length:#x} is not mapped")
        start = address - self.regions[i].guest
        return self.writable_views[i][start:start + length]

    cdef int64_t find(self, uint64_t address) noexcept nogil:
        cdef uint32_t i
        for i in range(self.count):
            if address - self.regions[i].guest < self.regions[i].size:
                return i
        return -1

    cdef char *span(self, uint64_t address, uint64_t length) noexcept nogil:
        """Host address of bytes that must lie inside one region; NULL when they do not."""
        cdef int64_t i = self.find(address)
        if i < 0 or length > self.regions[i].size - (address - self.regions[i].guest):
            return NULL
        return self.regions[i].host + (address - self.regions[i].guest)

    cdef char *user_span(self, uint64_t address, uint64_t length) noexcept nogil:
        """As `span`, for an address in the frontend's own address space."""
        cdef uint32_t i
        cdef Region *region
        for i in range(self.count):
            region = &self.regions[i]
            if address - region.user < region.size and length <= region.size - (address - region.user):
                return region.host + (address - region.user)
        return NULL

    cdef Verdict collect(self, Segments *out, uint64_t address, uint32_t length) noexcept nogil:
        """Append the buffer to `out`, in parts where it spans adjacent regions."""
        cdef int64_t i
        cdef uint64_t offset, part
        while length:
            i = self.find(address)
            if i < 0:
                return BAD_ADDRESS
            offset = address - self.regions[i].guest
            part = min(<uint64_t> length, self.regions[i].size - offset)
            if out.count == out.room and not segments_grow(out):
                return NO_MEMORY
            out.items[out.count].host = self.regions[i].host + offset
            out.items[out.count].region = <uint32_t> i
            out.items[out.count].length = <uint32_t> part
            out.count += 1
            address += part
            length -= <uint32_t> part
        return FINE


cdef GuestMemory NOTHING_MAPPED = GuestMemory()


cdef list arrays_of(list views, dtype):
    from numpy import frombuffer        # costs more than a guest's start: only who asks pays

    return [frombuffer(view, dtype) for view in views]


cdef object only_of(list arrays, dtype):
    from numpy import empty

    if len(arrays) > 1:
        raise ValueError(f"the bytes are in {len(arrays)} places; ask for the arrays of each")
    return arrays[0] if arrays else empty(0, dtype)


@cython.final
@cython.freelist(64)
cdef class Chain:
    """One descriptor chain: device-readable bytes, then device-writable bytes (virtio 1.3, section 2.7.4).

    `readable` and `writable` count the bytes not yet read and not yet written; `read` and
    `write` move through them like a file, the views give the same bytes without a copy.
    `push` returns the chain to the driver, once, and `pushed` says whether that was done; a
    chain whose ring has stopped meanwhile is dropped silently.
    """

    cdef Ring ring
    cdef GuestMemory memory
    cdef Segments parts
    cdef uint64_t read_at
    cdef uint64_t write_at
    cdef Token token
    cdef readonly bint pushed

    def __cinit__(self, Ring ring not None):
        segments_start(&self.parts)
        self.ring = ring
        self.memory = ring.memory

    def __dealloc__(self):
        segments_free(&self.parts)

    @property
    def head(self):
        """The index of its first descriptor (section 2.7.5); in packed rings its buffer ID."""
        return self.token.head

    @property
    def slots(self):
        """How many descriptors of the ring it takes, for `Ring.use`; of a split ring always 1."""
        return self.token.slots

    @property
    def readable(self):
        """Device-readable bytes that are left to read."""
        return self.parts.readable - self.read_at

    @property
    def writable(self):
        """Device-writable bytes that are left to write."""
        return self.parts.writable - self.write_at

    @property
    def written(self):
        """Bytes written so far: the used length (section 2.7.8) that `push` reports by default."""
        return self.write_at

    def read(self, int64_t size=-1):
        """Return the next `size` device-readable bytes (all that are left by default)."""
        cdef uint64_t left = self.parts.readable - self.read_at
        cdef uint64_t want = left if size < 0 else min(<uint64_t> size, left)
        data = PyBytes_FromStringAndSize(NULL, <Py_ssize_t> want)
        self._copy(0, self.parts.readable_count, self.read_at, PyBytes_AS_STRING(data), want, False)
        self.read_at += want
        return data

    def write(self, data):
        """Copy `data` into the next device-writable bytes; return how many fitted."""
        cdef Py_buffer source
        cdef uint64_t count
        PyObject_GetBuffer(data, &source, PyBUF_SIMPLE)
        count = min(<uint64_t> source.len, self.parts.writable - self.write_at)
        self._copy(
            self.parts.readable_count, self.parts.count, self.write_at, <char *> source.buf, count, True
        )
        PyBuffer_Release(&source)
        self.write_at += count
        return count

    def readable_views(self):
        """Read-only memoryviews of the device-readable bytes that are left, in order."""
        return self._views(self.memory.readable_views, 0, self.parts.readable_count, self.read_at)

    def writable_views(self):
        """Memoryviews of the device-writable bytes that are left, in order."""
        return self._views(
            self.memory.writable_views, self.parts.readable_count, self.parts.count, self.write_at
        )

    def readable_arrays(self, dtype="u1"):
        """`readable_views` as read-only NumPy arrays of `dtype`; ValueError where a view has a rest."""
        return arrays_of(self.readable_views(), dtype)

    def writable_arrays(self, dtype="u1"):
        """`writable_views` as NumPy arrays of `dtype`: what is stored there is in the guest at once."""
        return arrays_of(self.writable_views(), dtype)

    def readable_array(self, dtype="u1"):
        """The device-readable bytes that are left as one array, without a copy.

        ValueError when they are in several places, as drivers may have it: `readable_arrays`.
        """
        return only_of(self.readable_arrays(dtype), dtype)

    def writable_array(self, dtype="u1"):
        """The device-writable bytes that are left as one array; ValueError as `readable_array`."""
        return only_of(self.writable_arrays(dtype), dtype)

    def skip(self, uint64_t count):
        """Count bytes taken from `readable_views` as read."""
        if count > self.parts.readable - self.read_at:
            raise ValueError(f"{count} bytes are more than the chain has left to read")
        self.read_at += count

    def wrote(self, uint64_t count):
        """Count bytes put into `writable_views` as written."""
        if count > self.parts.writable - self.write_at:
            raise ValueError(f"{count} bytes are more than the chain has left to write")
        self.write_at += count

    def push(self, length=None):
        """Give the chain back (section 2.7.8); `length` overrides the count of written bytes.

        ValueError, and nothing is done, when it was given back before or `used_length` finds it wrong.
        """
        cdef uint64_t used
        if self.pushed:
            raise ValueError("the chain was already given back to the driver")
        used = self.write_at if length is None else self.used_length(length)
        self.pushed = True
        self.ring.complete(&self.token, used)

    def used_length(self, length=None):
        """What `push(length)` tells the driver (section 2.7.8); ValueError when there is no room for it."""
        if length is None:
            return self.write_at
        if not 0 <= length <= self.parts.writable:
            raise ValueError(f"{length} bytes in a chain with room for {self.parts.writable}")
        return length

    cdef void _copy(
        self, uint32_t first, uint32_t end, uint64_t skip, char *data, uint64_t count, bint to_guest
    ) noexcept:
        cdef uint32_t i
        cdef uint64_t part
        cdef Segment *segment
        for i in range(first, end):
            segment = &self.parts.items[i]
            if skip >= segment.length:
                skip -= segment.length
                continue
            part = min(segment.length - skip, count)
            # memmove: a device may copy a chain's own view into the chain
            if to_guest:
                memmove(segment.host + skip, data, part)
            else:
                memmove(data, segment.host + skip, part)
            data += part
            count -= part
            skip = 0
            if count == 0:
                return

    cdef list _views(self, tuple regions, uint32_t first, uint32_t end, uint64_t skip):
        """One view for each run of buffers that follow one another in one region."""
        cdef list views = []
        cdef uint32_t i, region = 0
        cdef uint64_t start, begin = 0, stop = 0
        cdef Segment *segment
        for i in range(first, end):
            segment = &self.parts.items[i]
            if skip >= segment.length:
                skip -= segment.length
                continue
            start = <uint64_t> (segment.host - self.memory.regions[segment.region].host) + skip
            if start != stop or segment.region != region:
                if stop > begin:
                    views.append(regions[region][begin:stop])
                begin, region = start, segment.region
            stop = start + segment.length - skip
            skip = 0
        if stop > begin:
            views.append(regions[region][begin:stop])
        return views


cdef class Ring:
    """What both formats share; `desc`, `avail` and `used` are user addresses of the frontend.

    In packed rings these are the descriptor ring, the driver's and the device's event
    suppression structures.  A ring that is misaligned or not inside one mapped region, or
    whose size the format does not allow, raises ValueError.  Use it from one thread at a time.

    Subclasses begin in `__cinit__`, so that there is no ring without a place.
    """

    cdef GuestMemory memory
    cdef char *desc
    cdef char *avail
    cdef char *used
    cdef readonly uint32_t size
    cdef readonly bint event_idx
    cdef readonly bint indirect
    cdef readonly bint running
    cdef readonly bint resumed
    cdef readonly uint16_t next_avail
    cdef readonly uint16_t next_used

    def __cinit__(self):
        self.memory = NOTHING_MAPPED

    def move(self, GuestMemory memory not None, uint64_t desc, uint64_t avail, uint64_t used):
        """Go on in other memory at the same indices: the frontend changed its regions."""
        self._map(memory, desc, avail, used)

    cdef int _map(self, GuestMemory memory, uint64_t desc, uint64_t avail, uint64_t used) except -1:
        return 0

    cdef char *_place(
        self, GuestMemory memory, name, uint64_t address, uint64_t align, uint64_t length
    ) except NULL:
        cdef char *host = memory.user_span(address, length)
        if address % align or <uint64_t> host % align:
            raise ValueError(f"{name} at {address:#x} is not aligned to {align}")
        if host == NULL:
            raise ValueError(f"{name} at {address:#x}+{length:#x} is outside the guest's memory")
        return host

    def stop(self):
        """End the ring: `pop` gives nothing more and chains still held are dropped."""
        self.running = False

    def pop(self):
        """Return the next available `Chain`, or None.  Raises RingError on a broken ring."""
        cdef Chain chain
        cdef Verdict verdict
        if not self.running or not self.available():
            return None
        chain = Chain.__new__(Chain, self)
        verdict = self.take(&chain.parts, &chain.token)
        if verdict != FINE:
            self.running = False
            raise RingError(f"virtqueue: {VERDICTS[<int> verdict]} (head {chain.token.head})")
        return chain

    def enable_kicks(self):
        """Ask for a kick at the next buffer; true when one came in the meantime."""
        return self.wants_kick()

    def should_call(self):
        """Whether the chains pushed since the last question need a used buffer notification."""
        return self.wants_call()

    def use(self, uint16_t head, uint64_t length, uint16_t slots=1):
        """Put any element on the used ring, right or wrong, of so many descriptors: for tests of drivers.

        ValueError when the ring does not have so many.
        """
        cdef Token token
        if not 0 < slots <= self.size:
            raise ValueError(f"{slots} descriptors of a ring of {self.size}")
        token.head, token.slots = head, slots
        self.complete(&token, length)

    def echo(self, int kick_fd, int call_fd, int stop_fd):
        """Serve the ring here, without the GIL, until `stop_fd` is readable; return the count.

        Each chain's device-readable bytes are copied into its device-writable bytes, as many
        as fit.  Needs no Python per chain: for benchmarks, and for tests of drivers.
        Raises RingError on a broken ring.
        """
        cdef Segments parts
        cdef Verdict verdict
        cdef uint64_t count = 0
        segments_start(&parts)
        with nogil:
            while True:
                verdict = self.echo_batch(&parts, call_fd, &count)
                if verdict != FINE:
                    break
                if not await_kick(kick_fd, stop_fd, not self.wants_kick()):
                    break
        segments_free(&parts)
        if verdict != FINE:
            self.running = False
            raise RingError(f"virtqueue: {VERDICTS[<int> verdict]}")
        return count

    cdef Verdict echo_batch(self, Segments *parts, int call_fd, uint64_t *count) noexcept nogil:
        """Echo what is available now, at most one ring full and not much more than ECHO_BATCH."""
        cdef Verdict verdict
        cdef Token token
        cdef uint64_t one = 1, echoed, bytes = 0
        cdef uint32_t turns = self.size
        while turns and bytes < ECHO_BATCH and self.available():
            segments_clear(parts)
            verdict = self.take(parts, &token)
            if verdict != FINE:
                return verdict
            echoed = segments_echo(parts)
            self.complete(&token, echoed)
            bytes += echoed
            count[0] += 1
            turns -= 1
        if self.wants_call() and call_fd >= 0:
            # A full counter is a pending call already.  If it blocks, whoever is about to set
            # `stop_fd` makes room: to look first would cost each call a system call more.
            write(call_fd, &one, 8)
        return FINE

    cdef bint wants_kick(self) noexcept nogil:
        """Ask for a kick at the next buffer; whether there is one already."""
        return False

    cdef bint available(self) noexcept nogil:
        """Whether there is a chain to `take`."""
        return False

    cdef Verdict take(self, Segments *out, Token *token) noexcept nogil:
        """Collect the next chain, which the caller has seen to be available."""
        return BAD_AVAIL

    cdef void complete(self, Token *token, uint64_t length) noexcept nogil:
        """Give one chain back, visible to the driver at once; nothing if the ring has stopped."""

    cdef bint wants_call(self) noexcept nogil:
        """Whether the driver wants to be told about what was completed since the last question."""
        return False

    cdef Verdict add(self, Segments *out, Descriptor *item) noexcept nogil:
        cdef Verdict verdict = self.memory.collect(out, item.address, item.length)
        if item.flags & DESC_WRITE:
            out.writable += item.length
        elif out.writable:
            return BAD_ORDER
        else:
            out.readable += item.length
            out.readable_count = out.count
        if out.readable + out.writable > <uint64_t> 1 << 32:
            return TOO_LONG     # section 2.7.5.1: what a used length of 32 bits could not tell
        return verdict


@cython.final
cdef class VRing(Ring):
    """One split virtqueue; its size is a power of two up to 32768.

    `base` is the available index to start from.  The used index goes on from what the
    ring holds.

    `inflight` is writable memory in which the chains in hand are marked.  If a predecessor has
    used it, the chains that it held come again, before new ones, and the marks decide
    where the available index goes on; `base` then does not count, and `resumed` is true.
    """

    cdef uint32_t mask
    cdef uint16_t signalled
    cdef object inflight_view       # keeps `area` mapped
    cdef inflight_area *area        # NULL: chains are not tracked
    cdef uint64_t counter
    cdef uint16_t *again            # chains of a predecessor: `again_count`, `again_at` of them taken
    cdef uint32_t again_count
    cdef uint32_t again_at
    cdef uint64_t fresh             # chains taken from the available ring

    def __cinit__(
        self, GuestMemory memory not None, uint32_t size, uint64_t desc, uint64_t avail, uint64_t used, *,
        uint32_t base=0, bint event_idx=False, bint indirect=False, inflight=None
    ):
        if not 0 < size <= MAX_SIZE or size & (size - 1):
            raise ValueError(f"queue size {size} is not a power of two up to {MAX_SIZE}")
        self.size = size
        self.mask = size - 1
        self.event_idx = event_idx
        self.indirect = indirect
        self._map(memory, desc, avail, used)
        self.next_avail = <uint16_t> base
        self.next_used = self.signalled = ring_load16(self.used + 2)
        if inflight is not None:
            self._track(inflight)
        self.running = True

    def __dealloc__(self):
        free(self.again)

    @property
    def base(self):
        """What GET_VRING_BASE tells: the next available index."""
        return self.next_avail

    cdef int _track(self, inflight) except -1:
        """Mark chains in `inflight` from now on, and take over those of a predecessor."""
        cdef Py_buffer buffer
        cdef int64_t count
        view = memoryview(inflight)
        PyObject_GetBuffer(view, &buffer, PyBUF_SIMPLE | PyBUF_WRITABLE)
        self.area = <inflight_area *> buffer.buf
        room = inflight_room(buffer.len)
        aligned = not <uint64_t> buffer.buf % 8
        PyBuffer_Release(&buffer)       # `view` still holds the memory
        if room < self.size or not aligned:
            raise ValueError(f"in-flight area of {room} entries for a queue of {self.size}")
        self.inflight_view = view
        if self.area.version != INFLIGHT_VERSION:
            inflight_settle(self.area, 0, self.next_used)
            self.area.version = <uint16_t> INFLIGHT_VERSION
            return 0
        self.again = <uint16_t *> calloc(self.size, sizeof(uint16_t))
        inflight_settle(self.area, self.size, self.next_used)
        count = -1 if self.again == NULL else inflight_list(self.area, self.size, self.again, &self.counter)
        if count < 0:
            raise MemoryError()
        self.again_count = <uint32_t> count
        self.next_avail = <uint16_t> (self.next_used + count)
        self.resumed = True
        return 0

    cdef int _map(self, GuestMemory memory, uint64_t desc, uint64_t avail, uint64_t used) except -1:
        # the event words are there even when EVENT_IDX was not negotiated (section 2.7.6)
        cdef char *places[3]
        places[0] = self._place(memory, "descriptor table", desc, 16, DESC_BYTES * self.size)
        places[1] = self._place(memory, "available ring", avail, 2, RING_HEADER + 2 * self.size + 2)
        places[2] = self._place(memory, "used ring", used, 4, RING_HEADER + USED_BYTES * self.size + 2)
        self.desc, self.avail, self.used = places[0], places[1], places[2]
        self.memory = memory
        return 0

    def pending(self):
        """How many chains the driver has made available and nobody has popped."""
        fresh = <uint16_t> (ring_load16_acquire(self.avail + 2) - self.next_avail)
        return fresh + self.again_count - self.again_at

    def rewind(self, uint16_t count):
        """Un-pop the last `count` chains; the caller drops them and has pushed none."""
        while count and self.fresh:
            count -= 1
            self.fresh -= 1
            self.next_avail -= 1
            head = ring_load16(self.avail + RING_HEADER + 2 * (self.next_avail & self.mask))
            if self.area != NULL and head < self.size:
                inflight_untaken(self.area, head)
        self.again_at -= min(<uint32_t> count, self.again_at)

    def disable_kicks(self):
        """Tell the driver that kicks are not needed for now; a hint."""
        if not self.event_idx:
            ring_store16(self.used, USED_NO_NOTIFY)

    cdef bint wants_kick(self) noexcept nogil:
        """Section 2.7.7.1."""
        if self.event_idx:
            ring_store16(self.used + RING_HEADER + USED_BYTES * self.size, self.next_avail)
        else:
            ring_store16(self.used, 0)
        ring_fence()
        return self.available()

    cdef bint available(self) noexcept nogil:
        return self.again_at < self.again_count or ring_load16_acquire(self.avail + 2) != self.next_avail

    cdef Verdict take(self, Segments *out, Token *token) noexcept nogil:
        """Collect the next chain and mark it as in hand."""
        cdef Verdict verdict
        cdef uint16_t available
        token.slots = 1
        if self.again_at < self.again_count:
            token.head = self.again[self.again_at]
            self.again_at += 1
            return self.follow(out, token.head)
        available = ring_load16_acquire(self.avail + 2) - self.next_avail
        if available > self.size:
            return BAD_AVAIL
        token.head = ring_load16(self.avail + RING_HEADER + 2 * (self.next_avail & self.mask))
        verdict = self.follow(out, token.head)
        if verdict == FINE:
            if self.area != NULL:
                inflight_taken(self.area, token.head, self.counter)
                self.counter += 1
            self.next_avail += 1
            self.fresh += 1
        return verdict

    cdef Verdict follow(self, Segments *out, uint32_t index) noexcept nogil:
        """Walk one chain through the ring's table and at most one indirect table."""
        cdef Descriptor item
        cdef Verdict verdict
        cdef const char *table = self.desc
        cdef bint nested = False    # the table may be the ring's own: its place does not tell
        cdef uint32_t length = self.size, left = max(self.size, <uint32_t> LEAST_CHAIN_LIMIT)
        while True:
            if index >= length:
                return BAD_INDEX
            load_descriptor(&item, table + DESC_BYTES * <uint64_t> index)
            if item.flags & DESC_INDIRECT:
                if not self.indirect or nested or item.flags & DESC_NEXT:
                    return BAD_INDIRECT
                if item.length == 0 or item.length % DESC_BYTES:
                    return BAD_INDIRECT
                table = self.memory.span(item.address, item.length)
                if table == NULL:
                    return BAD_ADDRESS
                nested, length, index = True, item.length // DESC_BYTES, 0
                continue
            if left == 0:
                return TOO_LONG
            left -= 1
            verdict = self.add(out, &item)
            if verdict != FINE or not item.flags & DESC_NEXT:
                return verdict
            index = item.next

    cdef void complete(self, Token *token, uint64_t length) noexcept nogil:
        """Put one element on the used ring."""
        cdef char *slot = self.used + RING_HEADER + USED_BYTES * (self.next_used & self.mask)
        if not self.running:
            return
        ring_store32(slot, token.head)
        ring_store32(slot + 4, <uint32_t> length)
        self.next_used += 1
        if self.area == NULL or token.head >= self.size:
            ring_store16_release(self.used + 2, self.next_used)
            return
        inflight_using(self.area, token.head)
        ring_store16_release(self.used + 2, self.next_used)
        inflight_used(self.area, token.head, self.next_used)

    cdef bint wants_call(self) noexcept nogil:
        cdef uint16_t before = self.signalled, event
        if before == self.next_used or not self.running:
            return False
        self.signalled = self.next_used
        ring_fence()    # the used index must be visible before the driver's wish is read
        if not self.event_idx:
            return not ring_load16(self.avail) & AVAIL_NO_INTERRUPT
        event = ring_load16(self.avail + RING_HEADER + 2 * self.size)
        return <uint16_t> (self.next_used - event - 1) < <uint16_t> (self.next_used - before)


@cython.final
cdef class PackedRing(Ring):
    """One packed virtqueue of up to 32768 descriptors (section 2.8).

    `base` is what SET_VRING_BASE says: the next available index in bits 0 to 14 and its wrap
    counter in bit 15, then the same of the next used one.  A new ring starts with both
    wrap counters at 1: `PackedRing.FRESH`.
    """

    FRESH = 0x8000_8000

    cdef bint avail_wrap
    cdef bint used_wrap
    cdef uint32_t in_hand           # descriptors of chains taken and not given back
    cdef uint64_t unsignalled       # descriptors given back since the last question
    cdef uint64_t taken             # chains in all
    cdef uint16_t *slots            # of the last `size` chains, for `rewind`

    def __cinit__(
        self, GuestMemory memory not None, uint32_t size, uint64_t desc, uint64_t avail, uint64_t used, *,
        uint32_t base=0x8000_8000, bint event_idx=False, bint indirect=False
    ):
        if not 0 < size <= MAX_SIZE:
            raise ValueError(f"queue size {size} is not from 1 to {MAX_SIZE}")
        self.size = size
        self.event_idx = event_idx
        self.indirect = indirect
        self._map(memory, desc, avail, used)
        self.next_avail, self.avail_wrap = base & 0x7FFF, base >> 15 & 1
        self.next_used, self.used_wrap = base >> 16 & 0x7FFF, base >> 31
        if self.next_avail >= size or self.next_used >= size:
            raise ValueError(f"base {base:#x} is beyond a queue of {size}")
        self.slots = <uint16_t *> calloc(size, sizeof(uint16_t))
        if self.slots == NULL:
            raise MemoryError()
        self.in_hand = self.distance()
        self.running = True

    def __dealloc__(self):
        free(self.slots)

    @property
    def base(self):
        """What GET_VRING_BASE tells."""
        return (
            self.next_avail | self.avail_wrap << 15
            | self.next_used << 16 | <uint64_t> self.used_wrap << 31
        )

    cdef uint32_t distance(self) noexcept nogil:
        """How many descriptors the base says a predecessor held, which nobody gives back now."""
        if self.avail_wrap == self.used_wrap:
            return self.next_avail - self.next_used if self.next_avail >= self.next_used else 0
        return min(self.size, self.size + self.next_avail - self.next_used)

    cdef int _map(self, GuestMemory memory, uint64_t desc, uint64_t avail, uint64_t used) except -1:
        cdef char *places[3]
        places[0] = self._place(memory, "descriptor ring", desc, 16, DESC_BYTES * self.size)
        places[1] = self._place(memory, "driver event suppression", avail, 4, EVENT_BYTES)
        places[2] = self._place(memory, "device event suppression", used, 4, EVENT_BYTES)
        self.desc, self.avail, self.used = places[0], places[1], places[2]
        self.memory = memory
        return 0

    def pending(self):
        """How many chains the driver has made available and nobody has popped."""
        cdef uint32_t at = self.next_avail, left = self.size
        cdef bint wrap = self.avail_wrap
        cdef uint16_t flags
        cdef uint64_t count = 0
        while left:
            flags = ring_load16_acquire(self.desc + DESC_BYTES * at + 14)
            if not is_available(flags, wrap):
                break
            count += 1
            while left:
                left -= 1
                at += 1
                if at == self.size:
                    at, wrap = 0, not wrap
                if not flags & DESC_NEXT:
                    break
                flags = ring_load16(self.desc + DESC_BYTES * at + 14)
        return count

    def rewind(self, uint16_t count):
        """Un-pop the last `count` chains; the caller drops them and has pushed none."""
        cdef uint16_t slots
        while count and self.taken:
            count -= 1
            self.taken -= 1
            slots = self.slots[self.taken % self.size]
            self.in_hand -= slots
            if slots > self.next_avail:
                self.next_avail += self.size
                self.avail_wrap = not self.avail_wrap
            self.next_avail -= slots

    def disable_kicks(self):
        """Tell the driver that kicks are not needed for now; a hint."""
        ring_store16(self.used + 2, EVENTS_OFF)

    cdef bint wants_kick(self) noexcept nogil:
        """Section 2.8.10."""
        if self.event_idx:
            ring_store16(self.used, self.next_avail | <uint16_t> (self.avail_wrap << 15))
            ring_store16_release(self.used + 2, EVENTS_AT)
        else:
            ring_store16(self.used + 2, EVENTS_ON)
        ring_fence()
        return self.available()

    cdef bint available(self) noexcept nogil:
        return is_available(
            ring_load16_acquire(self.desc + DESC_BYTES * <uint64_t> self.next_avail + 14), self.avail_wrap
        )

    cdef Verdict take(self, Segments *out, Token *token) noexcept nogil:
        """Collect the chain from `next_avail` on; its ID is in its last descriptor."""
        cdef Descriptor item
        cdef Verdict verdict
        cdef uint32_t at = self.next_avail
        token.slots = 0
        while True:
            load_packed(&item, self.desc + DESC_BYTES * <uint64_t> at)
            token.head = item.next
            token.slots += 1
            if token.slots + self.in_hand > self.size:
                return TOO_LONG if token.slots > 1 else BAD_AVAIL
            if item.flags & DESC_INDIRECT:
                verdict = self.add_table(out, &item, token.slots)
            else:
                verdict = self.add(out, &item)
            if verdict != FINE:
                return verdict
            at = at + 1 if at + 1 < self.size else 0
            if not item.flags & DESC_NEXT:
                break
        if token.head >= self.size:
            return BAD_INDEX
        self.slots[self.taken % self.size] = token.slots
        self.taken += 1
        self.in_hand += token.slots
        self.avail_wrap ^= self.next_avail + token.slots >= self.size
        self.next_avail = <uint16_t> at
        return FINE

    cdef Verdict add_table(self, Segments *out, Descriptor *item, uint32_t slots) noexcept nogil:
        """All of an indirect table: there only WRITE counts (section 2.8.7)."""
        cdef Descriptor entry
        cdef Verdict verdict = FINE
        cdef const char *table
        cdef uint32_t i, count = item.length // DESC_BYTES
        if not self.indirect or slots > 1 or item.flags & DESC_NEXT:
            return BAD_INDIRECT
        if item.length == 0 or item.length % DESC_BYTES:
            return BAD_INDIRECT
        if count > max(self.size, <uint32_t> LEAST_CHAIN_LIMIT):
            return TOO_LONG
        table = self.memory.span(item.address, item.length)
        if table == NULL:
            return BAD_ADDRESS
        for i in range(count):
            load_packed(&entry, table + DESC_BYTES * <uint64_t> i)
            if entry.flags & DESC_INDIRECT:
                return BAD_INDIRECT
            verdict = self.add(out, &entry)
            if verdict != FINE:
                break
        return verdict

    cdef void complete(self, Token *token, uint64_t length) noexcept nogil:
        """Write a used descriptor; the flags make it one, so they come last."""
        cdef char *slot = self.desc + DESC_BYTES * <uint64_t> self.next_used
        cdef uint16_t flags = DESC_WRITE if length else 0
        if not self.running:
            return
        if self.used_wrap:
            flags |= DESC_AVAIL | DESC_USED
        ring_store32(slot + 8, <uint32_t> length)
        ring_store16(slot + 12, token.head)
        ring_store16_release(slot + 14, flags)
        self.in_hand -= min(self.in_hand, <uint32_t> token.slots)
        self.unsignalled += token.slots
        if self.next_used + token.slots >= self.size:
            self.used_wrap = not self.used_wrap
            self.next_used = <uint16_t> (self.next_used + token.slots - self.size)
        else:
            self.next_used += token.slots

    cdef bint wants_call(self) noexcept nogil:
        cdef uint16_t wish, place
        cdef int64_t event, passed = <int64_t> self.unsignalled
        if not passed or not self.running:
            return False
        self.unsignalled = 0
        ring_fence()    # the used descriptors must be visible before the driver's wish is read
        wish = ring_load16_acquire(self.avail + 2) & 3
        if wish != EVENTS_AT or not self.event_idx:
            return wish != EVENTS_OFF
        place = ring_load16(self.avail)
        event = place & 0x7FFF
        if (place >> 15) != self.used_wrap:
            event -= self.size
        return passed >= self.size or self.next_used - passed <= event < self.next_used


cdef inline bint is_available(uint16_t flags, bint wrap) noexcept nogil:
    """Whether the driver has made this descriptor available in the round of `wrap` (section 2.8.1)."""
    cdef bint avail = (flags & DESC_AVAIL) != 0, used = (flags & DESC_USED) != 0
    return avail == wrap and used != wrap


cdef inline void load_packed(Descriptor *out, const char *at) noexcept nogil:
    """A packed descriptor; `next` takes its buffer ID."""
    out.address = ring_load64(at)
    out.length = ring_load32(at + 8)
    out.next = ring_load16(at + 12)
    out.flags = ring_load16(at + 14)


cdef inline void load_descriptor(Descriptor *out, const char *at) noexcept nogil:
    out.address = ring_load64(at)
    out.length = ring_load32(at + 8)
    out.flags = ring_load16(at + 12)
    out.next = ring_load16(at + 14)
