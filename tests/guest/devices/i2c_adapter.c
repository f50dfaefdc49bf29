/* Stands in for an I2C adapter where the host's kernel has none: a preloaded library for one backend.
 *
 * It owns three things of libc's: opendir and open are led below $I2C_ROOT for the adapter's names in
 * /sys and /dev, and the adapter's ioctls read and write the file there, 256 registers of one client.
 * The backend and everything beyond it are as they would be with i2c-stub.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/i2c-dev.h>
#include <linux/i2c.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

static const char *led(const char *path, char *room, size_t size)
{
	const char *root = getenv("I2C_ROOT");

	if (!root || (strncmp(path, "/sys/bus/i2c/", 13) && strncmp(path, "/dev/i2c-", 9)))
		return path;
	snprintf(room, size, "%s%s", root, path);
	return room;
}

DIR *opendir(const char *path)
{
	DIR *(*next)(const char *) = dlsym(RTLD_NEXT, "opendir");
	char room[4096];

	return next(led(path, room, sizeof room));
}

int open64(const char *path, int flags, ...)
{
	int (*next)(const char *, int, ...) = dlsym(RTLD_NEXT, "open64");
	char room[4096];
	va_list rest;
	int mode;

	va_start(rest, flags);
	mode = va_arg(rest, int);
	va_end(rest);
	return next(led(path, room, sizeof room), flags, mode);
}

/* The first byte written is a register's number; what follows goes there, and reads come from there. */
static int transfer(int fd, const struct i2c_rdwr_ioctl_data *data)
{
	off_t place = 0;

	for (unsigned i = 0; i < data->nmsgs; i++) {
		const struct i2c_msg *message = &data->msgs[i];
		ssize_t moved, length = message->len;

		if (message->flags & I2C_M_RD) {
			moved = pread(fd, message->buf, length, place);
		} else {
			place = message->buf[0];
			moved = 1 + pwrite(fd, message->buf + 1, length - 1, place);
		}
		if (moved != length) {
			errno = EIO;
			return -1;
		}
	}
	return data->nmsgs;
}

int ioctl(int fd, unsigned long request, ...)
{
	int (*next)(int, unsigned long, ...) = dlsym(RTLD_NEXT, "ioctl");
	va_list rest;
	void *argument;

	va_start(rest, request);
	argument = va_arg(rest, void *);
	va_end(rest);
	switch (request) {
	case I2C_FUNCS:
		*(unsigned long *)argument = I2C_FUNC_I2C;
		return 0;
	case I2C_SLAVE:
		return 0;
	case I2C_RDWR:
		return transfer(fd, argument);
	}
	return next(fd, request, argument);
}
