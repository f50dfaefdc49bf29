/* The command's standard streams and their flow.
 *
 * Bulk data moves only while the other side has given credit and the queue to the port is
 * short, so that a slow reader stops the command and nothing else: signals, window sizes
 * and the end always get through.
 */
#define _GNU_SOURCE
#include "init.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#define QUEUE_SHORT (4u * FRAME_MAX)	/* bulk data waits while more is queued */
#define CONTROL_D 4

static uint8_t input[STDIN_WINDOW];
static size_t input_start, input_end, input_used;
static bool input_over;
static size_t credit[3] = { 0, OUTPUT_WINDOW, OUTPUT_WINDOW };

void streams_credit(uint32_t stream, uint32_t bytes)
{
	credit[stream] += bytes;
}

/* -- standard input ------------------------------------------------------------------- */

void streams_accept_input(struct command *command, const uint8_t *data, size_t size)
{
	if (!size)
		input_over = true;
	if (command->in < 0) {	/* nobody reads: let the host go on */
		if (size)
			wire_send_pair(FRAME_CREDIT, 0, (uint32_t)size);
		return;
	}
	if (input_end - input_start + size > sizeof input)
		fatal("the host sent more input than it was allowed to");
	if (input_end + size > sizeof input) {
		memmove(input, input + input_start, input_end - input_start);
		input_end -= input_start;
		input_start = 0;
	}
	memcpy(input + input_end, data, size);
	input_end += size;
}

static void give_credit(size_t size)
{
	input_used += size;
	if (input_used >= STDIN_WINDOW / 4) {
		wire_send_pair(FRAME_CREDIT, 0, (uint32_t)input_used);
		input_used = 0;
	}
}

static void close_input(struct command *command)
{
	give_credit(input_end - input_start);
	input_start = input_end = 0;
	command_close(command, &command->in);
}

static void end_input(struct command *command)
{
	char end = CONTROL_D;

	if (command->tty && write(command->in, &end, 1) < 0 && errno == EAGAIN)
		return;	/* the terminal is full: again when it is not */
	close_input(command);
}

void streams_pump_input(struct command *command)
{
	while (command->in >= 0 && input_start < input_end) {
		ssize_t n = write(command->in, input + input_start, input_end - input_start);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EAGAIN)
			return;
		if (n < 0) {
			close_input(command);
			return;
		}
		input_start += (size_t)n;
		give_credit((size_t)n);
	}
	if (command->in >= 0 && input_over)
		end_input(command);
}

bool streams_input_waits(const struct command *command)
{
	return command->in >= 0 && (input_start < input_end || input_over);
}

/* -- standard output and error ------------------------------------------------------- */

bool streams_may_flow(int stream)
{
	return credit[stream] > 0 && wire_pending() < QUEUE_SHORT;
}

bool streams_pump_output(struct command *command, int stream)
{
	int *fd = stream == 1 ? &command->out : &command->err;
	static uint8_t buffer[FRAME_MAX];

	while (*fd >= 0 && streams_may_flow(stream)) {
		size_t want = credit[stream] < sizeof buffer ? credit[stream] : sizeof buffer;
		ssize_t n = read(*fd, buffer, want);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EAGAIN)
			return false;
		if (n <= 0) {	/* a terminal whose last user left says EIO */
			command_close(command, fd);
			return false;
		}
		credit[stream] -= (size_t)n;
		wire_send(stream == 1 ? FRAME_STDOUT : FRAME_STDERR, buffer, (size_t)n);
	}
	return *fd >= 0;
}
