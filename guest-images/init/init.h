/* The guest's first process: shared declarations.
 *
 * One small static program is /init of every initramfs that pyvmm builds.  It loads the
 * modules it finds there, opens the virtio-console port named "pyvmm.command", and does
 * what the host says over it: mounts, one command, its streams, its end.  Nothing is
 * configured on the kernel's command line.  The protocol is described in
 * pyvmm/guest/protocol.py, which is its other end.
 *
 *   main.c     life of the process: stages, event loop, orderly end
 *   wire.c     frames on the port, queue of outgoing bytes
 *   spec.c     what the host wants run, parsed
 *   system.c   modules, port, mounts, root
 *   command.c  the command: pipes or pseudo terminal, start, exit status
 *   streams.c  its standard streams and their flow
 */
#ifndef PYVMM_INIT_H
#define PYVMM_INIT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

enum frame_type {
	/* host to guest */
	FRAME_SPEC = 1,		/* NUL-terminated records "key=value" */
	FRAME_STDIN = 2,	/* bytes; an empty frame is end of file */
	FRAME_SIGNAL = 3,	/* u32 number */
	FRAME_WINDOW = 4,	/* u16 rows, u16 columns */
	FRAME_CLOSE = 5,	/* u32 stream: nobody reads it any more */
	FRAME_BYE = 6,		/* the host has seen FRAME_EXIT or FRAME_ERROR */
	/* both ways */
	FRAME_CREDIT = 8,	/* u32 stream, u32 bytes that may be sent in addition */
	/* guest to host */
	FRAME_HELLO = 16,	/* u32 version, kernel release */
	FRAME_STAGE = 17,	/* u64 nanoseconds of CLOCK_BOOTTIME, name */
	FRAME_STDOUT = 18,
	FRAME_STDERR = 19,
	FRAME_EXIT = 20,	/* u32 0 exited or 1 killed by a signal, u32 status or signal */
	FRAME_ERROR = 21,	/* text: the guest cannot do what was asked */
	FRAME_WARNING = 22,	/* text */
};

#define PROTOCOL_VERSION 1
#define PORT_NAME "pyvmm.command"
#define HEADER_SIZE 8
#define SPEC_MAX (4u << 20)
#define FRAME_MAX (32u * 1024 - HEADER_SIZE)	/* the port takes 32 KiB at once */
#define STDIN_WINDOW (64u * 1024)
#define OUTPUT_WINDOW (256u * 1024)

struct mount_spec {
	const char *target, *source, *type, *options;
};

struct spec {
	char **argv, **env;
	const char *cwd, *hostname;
	uid_t uid;
	gid_t gid;
	gid_t *groups;
	size_t group_count;
	bool tty, overlay;
	unsigned rows, columns;
	struct mount_spec root;
	struct mount_spec *mounts;
	size_t mount_count;
};

struct command {
	pid_t pid;
	int in, out, err;	/* our ends; -1 when closed; on a terminal in == out, err == -1 */
	bool tty, ended;
	int status;		/* as from waitpid */
};

/* main.c */
void warning(const char *format, ...) __attribute__((format(printf, 1, 2)));
_Noreturn void fatal(const char *format, ...) __attribute__((format(printf, 1, 2)));
void stage(const char *name);
int64_t now_ms(void);

/* wire.c */
void wire_attach(int port);
bool wire_attached(void);
void wire_send(enum frame_type type, const void *payload, size_t size);
void wire_send_pair(enum frame_type type, uint32_t first, uint32_t second);
size_t wire_pending(void);
bool wire_flush(void);				/* false: the host is gone */
bool wire_flush_all(int64_t deadline_ms);
/* One frame if it is there: 1 a frame, 0 not yet, -1 the host is gone.  The payload is
 * valid until the next call. */
int wire_receive(enum frame_type *type, const uint8_t **payload, size_t *size);

/* spec.c */
void spec_parse(struct spec *spec, char *text, size_t size);

/* system.c */
void system_early(void);
void system_load_modules(void);
int system_open_port(void);
void system_root(const struct spec *spec);
void system_mounts(const struct spec *spec);
void system_unmount(const struct spec *spec);
_Noreturn void system_power_off(void);

/* command.c */
void command_start(struct command *command, const struct spec *spec);
void command_signal(const struct command *command, int number);
void command_resize(const struct command *command, unsigned rows, unsigned columns);
void command_close(struct command *command, int *fd);

/* streams.c; streams are numbered as the command's descriptors are */
void streams_credit(uint32_t stream, uint32_t bytes);
void streams_accept_input(struct command *command, const uint8_t *data, size_t size);
void streams_pump_input(struct command *command);
bool streams_input_waits(const struct command *command);	/* for the command to read */
bool streams_may_flow(int stream);
/* Move what one stream has to the wire.  Returns false when it has nothing now. */
bool streams_pump_output(struct command *command, int stream);

#endif
