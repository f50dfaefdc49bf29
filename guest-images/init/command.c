/* The command: its pipes or its pseudo terminal, its start, signals for it.
 *
 * It is the leader of a session of its own, so that a signal reaches all of it.  What
 * keeps it from starting is reported the way a shell does: text on its standard error,
 * status 127 for a program that is not there, 126 for one that cannot be run.
 */
#define _GNU_SOURCE
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

static void nonblocking(int fd)
{
	fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

static void make_pipe(int *read_end, int *write_end)
{
	int ends[2];

	if (pipe2(ends, O_CLOEXEC))
		fatal("pipe: %s", strerror(errno));
	*read_end = ends[0];
	*write_end = ends[1];
}

static int open_terminal(struct command *command, const struct spec *spec)
{
	int master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
	char name[64];
	int slave = -1;

	if (master >= 0 && !unlockpt(master) && !ptsname_r(master, name, sizeof name))
		slave = open(name, O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (slave < 0)
		fatal("cannot make a terminal: %s (is /dev/pts mounted?)", strerror(errno));
	command->in = command->out = master;
	command->err = -1;
	command_resize(command, spec->rows, spec->columns);
	return slave;
}

static void become_user(const struct spec *spec)
{
	if (!spec->uid && !spec->gid)
		return;
	if (setgroups(spec->group_count, spec->groups) || setgid(spec->gid) || setuid(spec->uid)) {
		fprintf(stderr, "pyvmm: cannot become user %u: %s\n", spec->uid, strerror(errno));
		_exit(126);
	}
}

static _Noreturn void run(const struct spec *spec, const int fds[3])
{
	sigset_t none;
	int error;

	setsid();
	for (int i = 0; i < 3; i++)
		dup2(fds[i], i);	/* fds are above 2, so this also drops O_CLOEXEC */
	if (spec->tty)
		ioctl(0, TIOCSCTTY, 0);
	signal(SIGPIPE, SIG_DFL);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	become_user(spec);
	if (spec->cwd && chdir(spec->cwd)) {
		fprintf(stderr, "pyvmm: cannot enter '%s' in the guest: %s\n", spec->cwd, strerror(errno));
		_exit(126);
	}
	environ = spec->env;
	execvp(spec->argv[0], spec->argv);
	error = errno;
	fprintf(stderr, "pyvmm: cannot run '%s' in the guest: %s\n", spec->argv[0], strerror(error));
	_exit(error == ENOENT ? 127 : 126);
}

void command_start(struct command *command, const struct spec *spec)
{
	int fds[3];

	command->tty = spec->tty;
	if (spec->tty) {
		fds[0] = fds[1] = fds[2] = open_terminal(command, spec);
	} else {
		make_pipe(&fds[0], &command->in);
		make_pipe(&command->out, &fds[1]);
		make_pipe(&command->err, &fds[2]);
		nonblocking(command->err);
		nonblocking(command->in);
	}
	nonblocking(command->out);
	command->pid = fork();
	if (command->pid < 0)
		fatal("fork: %s", strerror(errno));
	if (!command->pid)
		run(spec, fds);
	for (int i = 0; i < (spec->tty ? 1 : 3); i++)
		close(fds[i]);
}

void command_signal(const struct command *command, int number)
{
	if (!command->ended && kill(-command->pid, number))
		kill(command->pid, number);	/* it has not reached setsid yet */
}

void command_resize(const struct command *command, unsigned rows, unsigned columns)
{
	struct winsize size = { .ws_row = (unsigned short)rows, .ws_col = (unsigned short)columns };

	if (command->out >= 0)
		ioctl(command->out, TIOCSWINSZ, &size);
}

void command_close(struct command *command, int *fd)
{
	if (*fd < 0)
		return;
	if (command->tty) {	/* one descriptor serves both directions */
		if (fd == &command->in) {
			command->in = -1;
			return;
		}
		command->in = -1;
	}
	close(*fd);
	*fd = -1;
}
