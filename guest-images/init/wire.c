/* Frames on the command port: u8 type, u8[3] zero, u32 length (little endian), payload.
 *
 * The port is never waited for here but in wire_flush_all: the event loop in main.c polls
 * it.  Outgoing frames are queued, also before there is a port; who produces bulk data looks at wire_pending first.
 */
#include "init.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int port = -1;

static struct {
	uint8_t *data;
	size_t start, end, room;
} out;

static struct {
	uint8_t header[HEADER_SIZE];
	uint8_t *payload;
	size_t have, size;	/* bytes of header and payload; payload size */
	bool delivered;
} in;

void wire_attach(int fd)
{
	port = fd;
}

bool wire_attached(void)
{
	return port >= 0;
}

size_t wire_pending(void)
{
	return out.end - out.start;
}

static void put_le32(uint8_t *at, uint32_t value)
{
	for (int i = 0; i < 4; i++)
		at[i] = (uint8_t)(value >> 8 * i);
}

static uint32_t get_le32(const uint8_t *at)
{
	return at[0] | at[1] << 8 | at[2] << 16 | (uint32_t)at[3] << 24;
}

static void reserve(size_t size)
{
	if (out.start && out.end + size > out.room) {
		memmove(out.data, out.data + out.start, out.end - out.start);
		out.end -= out.start;
		out.start = 0;
	}
	if (out.end + size > out.room) {
		out.room = (out.end + size) * 2;
		out.data = realloc(out.data, out.room);
		if (!out.data)
			abort();
	}
}

void wire_send(enum frame_type type, const void *payload, size_t size)
{
	uint8_t header[HEADER_SIZE] = { (uint8_t)type };

	put_le32(header + 4, (uint32_t)size);
	reserve(HEADER_SIZE + size);
	memcpy(out.data + out.end, header, HEADER_SIZE);
	if (size)
		memcpy(out.data + out.end + HEADER_SIZE, payload, size);
	out.end += HEADER_SIZE + size;
}

void wire_send_pair(enum frame_type type, uint32_t first, uint32_t second)
{
	uint8_t payload[8];

	put_le32(payload, first);
	put_le32(payload + 4, second);
	wire_send(type, payload, sizeof payload);
}

bool wire_flush(void)
{
	while (out.start < out.end) {
		ssize_t n = write(port, out.data + out.start, out.end - out.start);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return errno == EAGAIN;
		out.start += (size_t)n;
	}
	out.start = out.end = 0;
	return true;
}

bool wire_flush_all(int64_t deadline_ms)
{
	while (wire_flush() && out.start < out.end) {
		struct pollfd pfd = { .fd = port, .events = POLLOUT };
		int64_t left = deadline_ms - now_ms();

		if (left <= 0)
			break;
		if (poll(&pfd, 1, (int)left) > 0 && pfd.revents & POLLHUP)
			break;
	}
	return out.start == out.end;
}

/* Bring in.have up to `want`: 1 done, 0 not yet, -1 the host is gone. */
static int fill(uint8_t *base, size_t offset, size_t want)
{
	while (in.have < want) {
		ssize_t n = read(port, base + in.have - offset, want - in.have);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EAGAIN)
			return 0;
		if (n <= 0)	/* 0: nobody has the host's end open */
			return -1;
		in.have += (size_t)n;
	}
	return 1;
}

int wire_receive(enum frame_type *type, const uint8_t **payload, size_t *size)
{
	int got;

	if (in.delivered) {
		free(in.payload);
		memset(&in, 0, sizeof in);
	}
	if (in.have < HEADER_SIZE) {
		got = fill(in.header, 0, HEADER_SIZE);
		if (got <= 0)
			return got;
		in.size = get_le32(in.header + 4);
		if (in.size > SPEC_MAX)
			fatal("a frame of %zu bytes from the host", in.size);
		in.payload = malloc(in.size + 1);	/* + 1: text gets a NUL */
		if (!in.payload)
			fatal("no memory for a frame of %zu bytes", in.size);
	}
	got = fill(in.payload, HEADER_SIZE, HEADER_SIZE + in.size);
	if (got <= 0)
		return got;
	in.payload[in.size] = 0;
	in.delivered = true;
	*type = in.header[0];
	*payload = in.payload;
	*size = in.size;
	return 1;
}
