/* Stands in for a GPIO chip where the host's kernel has none: a preloaded library for one backend.
 *
 * It owns the names and ioctls of /dev/gpiochip0, which are led to $GPIO_ROOT: the file `lines` has
 * one byte a line, '0' or '1', which is the line's level, and the pipe `edges-N` is where whoever moves
 * line N puts what the kernel would report (struct gpio_v2_line_event).  libgpiod, the backend and
 * everything beyond it are as they would be with gpio-sim.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/gpio.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#define NODE "/dev/gpiochip0"
#define NUMBER makedev(254, 0)
#define LINES 8
#define FILES 1024

static int levels = -1;                  /* the file `lines` */
static __u64 flags_of[LINES];
static unsigned char line_of[FILES];     /* of each descriptor of a request, one line and one more */

static int open_below(const char *name, int flags)
{
	int (*next)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
	char path[4096];

	snprintf(path, sizeof path, "%s/%s", getenv("GPIO_ROOT"), name);
	return next(path, flags | O_CLOEXEC);
}

int open(const char *path, int flags, ...)
{
	int (*next)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
	va_list rest;
	int mode;

	if (!strcmp(path, NODE))
		return levels = open_below("lines", O_RDWR);
	va_start(rest, flags);
	mode = va_arg(rest, int);
	va_end(rest);
	return next(path, flags, mode);
}

static int status_of(const char *name, const char *path, struct stat *status)
{
	int (*next)(const char *, struct stat *) = dlsym(RTLD_NEXT, name);

	if (strcmp(path, NODE))
		return next(path, status);
	memset(status, 0, sizeof *status);
	status->st_mode = S_IFCHR | 0600;
	status->st_rdev = NUMBER;
	return 0;
}

int stat(const char *path, struct stat *status)
{
	return status_of("stat", path, status);
}

int lstat(const char *path, struct stat *status)
{
	return status_of("lstat", path, status);
}

/* What kind of device a number is of: libgpiod looks in /sys. */
char *realpath(const char *path, char *room)
{
	char *(*next)(const char *, char *) = dlsym(RTLD_NEXT, "realpath");
	char ours[64];

	snprintf(ours, sizeof ours, "/sys/dev/char/%u:%u/subsystem", major(NUMBER), minor(NUMBER));
	return strcmp(path, ours) ? next(path, room) : strdup("/sys/bus/gpio");
}

static int describe_chip(struct gpiochip_info *info)
{
	memset(info, 0, sizeof *info);
	strcpy(info->name, "gpiochip0");
	strcpy(info->label, "stand-in");
	info->lines = LINES;
	return 0;
}

static int describe_line(struct gpio_v2_line_info *info)
{
	unsigned line = info->offset;

	memset(info, 0, sizeof *info);
	info->offset = line;
	info->flags = flags_of[line];
	snprintf(info->name, sizeof info->name, "line-%u", line);
	return 0;
}

static int set_level(unsigned line, int level)
{
	return pwrite(levels, level ? "1" : "0", 1, line) == 1 ? 0 : -1;
}

/* An output gets the level that is asked for; a request may say nothing of the direction. */
static int configure(unsigned line, const struct gpio_v2_line_config *config)
{
	__u64 level = 0;

	flags_of[line] = config->flags;
	for (unsigned i = 0; i < config->num_attrs; i++) {
		if (config->attrs[i].attr.id == GPIO_V2_LINE_ATTR_ID_FLAGS)
			flags_of[line] = config->attrs[i].attr.flags;
		if (config->attrs[i].attr.id == GPIO_V2_LINE_ATTR_ID_OUTPUT_VALUES)
			level = config->attrs[i].attr.values;
	}
	return flags_of[line] & GPIO_V2_LINE_FLAG_OUTPUT ? set_level(line, level & 1) : 0;
}

static int request_line(struct gpio_v2_line_request *request)
{
	char name[16];

	snprintf(name, sizeof name, "edges-%u", request->offsets[0]);
	request->fd = open_below(name, O_RDWR | O_NONBLOCK);
	if (request->num_lines != 1 || request->fd < 0 || request->fd >= FILES) {
		errno = EINVAL;
		return -1;
	}
	line_of[request->fd] = 1 + request->offsets[0];
	return configure(request->offsets[0], &request->config);
}

static int move_level(unsigned request, unsigned line, struct gpio_v2_line_values *values)
{
	char level;

	if (request == GPIO_V2_LINE_SET_VALUES_IOCTL)
		return set_level(line, values->bits & 1);
	if (pread(levels, &level, 1, line) != 1)
		return -1;
	values->bits = level == '1';
	return 0;
}

int ioctl(int fd, unsigned long request, ...)
{
	int (*next)(int, unsigned long, ...) = dlsym(RTLD_NEXT, "ioctl");
	va_list rest;
	void *argument;

	va_start(rest, request);
	argument = va_arg(rest, void *);
	va_end(rest);
	switch ((unsigned)request) { /* some callers have it in an int, whose sign is extended */
	case GPIO_GET_CHIPINFO_IOCTL:
		return describe_chip(argument);
	case GPIO_V2_GET_LINEINFO_IOCTL:
		return describe_line(argument);
	case GPIO_V2_GET_LINE_IOCTL:
		return request_line(argument);
	case GPIO_V2_LINE_SET_CONFIG_IOCTL:
		return configure(line_of[fd] - 1, argument);
	case GPIO_V2_LINE_GET_VALUES_IOCTL:
	case GPIO_V2_LINE_SET_VALUES_IOCTL:
		return move_level(request, line_of[fd] - 1, argument);
	}
	return next(fd, request, argument);
}
