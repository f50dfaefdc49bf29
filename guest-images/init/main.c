/* Life of the guest's first process: stages, event loop, orderly end.
 *
 * It is one thread around poll(); nothing but the very end waits for anything else.
 */
#define _GNU_SOURCE
#include "init.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define BYE_DEADLINE_MS 10000
#define TERM_GRACE_MS 500
#define KILL_GRACE_MS 2000	/* who is still there hangs in the kernel */
#define TTY_DRAIN_MS 100	/* what a terminal's line discipline may still hold back */

static struct spec spec;
static struct command command = { .in = -1, .out = -1, .err = -1 };

int64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

void stage(const char *name)
{
	struct timespec now;
	uint8_t payload[64];
	uint64_t ns;
	size_t length = strlen(name);

	clock_gettime(CLOCK_BOOTTIME, &now);
	ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
	memcpy(payload, &ns, 8);	/* x86 is little endian */
	memcpy(payload + 8, name, length);
	wire_send(FRAME_STAGE, payload, 8 + length);
}

static void say(enum frame_type type, const char *word, const char *format, va_list arguments)
{
	char text[1024];

	vsnprintf(text, sizeof text, format, arguments);
	fprintf(stderr, "pyvmm-init: %s: %s\n", word, text);
	wire_send(type, text, strlen(text));
}

void warning(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	say(FRAME_WARNING, "warning", format, arguments);
	va_end(arguments);
}

/* -- the end --------------------------------------------------------------------------- */

/* The host answers the last frame: only then has it everything, and the power may go. */
static void wait_for_bye(void)
{
	int64_t deadline = now_ms() + BYE_DEADLINE_MS;
	enum frame_type type = 0;
	const uint8_t *payload;
	size_t size;
	int got;

	if (!wire_attached() || !wire_flush_all(deadline))
		return;
	while ((got = wire_receive(&type, &payload, &size)) >= 0) {
		struct pollfd pfd = { .fd = -1 };

		if (got && type == FRAME_BYE)
			return;
		if (now_ms() > deadline)
			return;
		if (!got)
			poll(&pfd, 1, 1);
	}
}

_Noreturn void fatal(const char *format, ...)
{
	static bool dying;
	va_list arguments;

	va_start(arguments, format);
	say(FRAME_ERROR, "fatal", format, arguments);
	va_end(arguments);
	if (!dying) {	/* the wire itself may be what failed */
		dying = true;
		wait_for_bye();
	}
	system_power_off();
}

static void reap(void)
{
	int status;
	pid_t pid;

	while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
		if (pid == command.pid && !command.ended) {
			command.ended = true;
			command.status = status;
		}
	}
}

static bool children_left(void)
{
	reap();
	return waitpid(-1, NULL, WNOHANG) == 0;
}

/* What the command left behind is asked to end, then made to. */
static void end_processes(void)
{
	int64_t deadline = now_ms() + TERM_GRACE_MS;

	if (!children_left())
		return;
	kill(-1, SIGTERM);
	kill(-1, SIGCONT);
	while (children_left() && now_ms() < deadline)
		usleep(2000);
	deadline = now_ms() + KILL_GRACE_MS;
	while (children_left() && now_ms() < deadline) {
		kill(-1, SIGKILL);
		usleep(2000);
	}
}

static _Noreturn void finish(void)
{
	bool signalled = WIFSIGNALED(command.status);

	end_processes();
	system_unmount(&spec);
	stage("ended");
	wire_send_pair(FRAME_EXIT, signalled,
		       (uint32_t)(signalled ? WTERMSIG(command.status) : WEXITSTATUS(command.status)));
	wait_for_bye();
	system_power_off();
}

static _Noreturn void host_is_gone(void)
{
	end_processes();
	system_unmount(&spec);
	system_power_off();
}

/* -- frames from the host --------------------------------------------------------------- */

static uint32_t le32(const uint8_t *at)
{
	return at[0] | at[1] << 8 | at[2] << 16 | (uint32_t)at[3] << 24;
}

static void close_stream(uint32_t stream)
{
	if (stream == 1)
		command_close(&command, &command.out);
	else if (stream == 2)
		command_close(&command, &command.err);
}

static void handle(enum frame_type type, const uint8_t *payload, size_t size)
{
	if (type == FRAME_STDIN)
		streams_accept_input(&command, payload, size);
	else if (type == FRAME_SIGNAL && size == 4)
		command_signal(&command, (int)le32(payload));
	else if (type == FRAME_WINDOW && size == 4)
		command_resize(&command, payload[0] | payload[1] << 8, payload[2] | payload[3] << 8);
	else if (type == FRAME_CLOSE && size == 4)
		close_stream(le32(payload));
	else if (type == FRAME_CREDIT && size == 8 && le32(payload) - 1 < 2)
		streams_credit(le32(payload), le32(payload + 4));
	else
		fatal("the host sent frame type %d of %zu bytes, which means nothing here", type, size);
}

static void receive(void)
{
	enum frame_type type;
	const uint8_t *payload;
	size_t size;
	int got;

	while ((got = wire_receive(&type, &payload, &size)) > 0)
		handle(type, payload, size);
	if (got < 0)
		host_is_gone();
}

static void receive_spec(int port)
{
	struct pollfd pfd = { .fd = port, .events = POLLIN };
	enum frame_type type;
	const uint8_t *payload;
	size_t size;
	char *copy;
	int got;

	if (!wire_flush_all(now_ms() + BYE_DEADLINE_MS))
		host_is_gone();
	while (!(got = wire_receive(&type, &payload, &size)))
		poll(&pfd, 1, -1);
	if (got < 0)
		host_is_gone();
	if (type != FRAME_SPEC)
		fatal("the host began with frame type %d", type);
	copy = malloc(size + 1);
	if (!copy)
		fatal("no memory for the command's description");
	memcpy(copy, payload, size + 1);
	spec_parse(&spec, copy, size);
}

static void say_hello(void)
{
	struct utsname name;
	uint8_t payload[4 + sizeof name.release] = { PROTOCOL_VERSION };

	uname(&name);
	memcpy(payload + 4, name.release, strlen(name.release));
	wire_send(FRAME_HELLO, payload, 4 + strlen(name.release));
}

/* -- the loop --------------------------------------------------------------------------- */

static int watch_children(void)
{
	sigset_t set;
	int fd;

	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	sigprocmask(SIG_BLOCK, &set, NULL);
	fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
	if (fd < 0)
		fatal("signalfd: %s", strerror(errno));
	return fd;
}

enum { PORT, CHILD, IN, OUT, ERR, POLLED };

static void wait_for_events(int port, int child, int timeout)
{
	struct pollfd fds[POLLED] = {
		[PORT] = { port, POLLIN | (wire_pending() ? POLLOUT : 0), 0 },
		[CHILD] = { child, POLLIN, 0 },
		[IN] = { streams_input_waits(&command) ? command.in : -1, POLLOUT, 0 },
		[OUT] = { streams_may_flow(1) ? command.out : -1, POLLIN, 0 },
		[ERR] = { streams_may_flow(2) ? command.err : -1, POLLIN, 0 },
	};
	struct signalfd_siginfo info;

	poll(fds, POLLED, timeout);
	if (fds[CHILD].revents)
		while (read(child, &info, sizeof info) > 0)
			;
}

/* All that the ended command wrote is with the host or on its way.  A terminal gives its
 * last bytes late; it says end of file when nobody else holds it. */
static bool drained(bool out_more, bool err_more, int64_t since)
{
	if (out_more || err_more)
		return false;
	return !command.tty || command.out < 0 || now_ms() - since > TTY_DRAIN_MS;
}

static _Noreturn void serve(int port, int child)
{
	int64_t ended = 0;

	for (;;) {
		bool out_more, err_more;

		receive();
		reap();
		if (command.ended && !ended)
			ended = now_ms();
		streams_pump_input(&command);
		out_more = streams_pump_output(&command, 1);
		err_more = streams_pump_output(&command, 2);
		if (!wire_flush())
			host_is_gone();
		if (ended && drained(out_more, err_more, ended))
			finish();
		wait_for_events(port, child, ended ? TTY_DRAIN_MS / 4 : -1);
	}
}

int main(void)
{
	int port, child;

	if (getpid() != 1) {
		fprintf(stderr, "pyvmm-init is the first process of a guest, nothing else\n");
		return 2;
	}
	signal(SIGPIPE, SIG_IGN);
	system_early();
	stage("init");
	system_load_modules();
	stage("modules");
	port = system_open_port();
	wire_attach(port);
	say_hello();
	stage("port");
	receive_spec(port);
	system_root(&spec);
	stage("root");
	system_mounts(&spec);
	child = watch_children();
	command_start(&command, &spec);
	stage("command");
	serve(port, child);
}
