/* The guest around the command: modules, the command port, mounts, power.
 *
 * Every failure that keeps the command from running is fatal() with the cause in words,
 * because an errno alone does not say which of kernel, device and host is to blame.
 */
#define _GNU_SOURCE
#include "init.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#define MODULES "/modules/"
#define PORTS "/sys/class/virtio-ports"
#define NEW_ROOT "/newroot"
#define LOWER "/lower"
#define UPPER "/upper"
#define PORT_DEADLINE_MS 30000
#define DEVICE_DEADLINE_MS 3000

static void make_directories(const char *path, mode_t mode)
{
	char copy[4096];

	snprintf(copy, sizeof copy, "%s", path);
	for (char *at = copy + 1; *at; at++) {
		if (*at != '/')
			continue;
		*at = 0;
		mkdir(copy, 0755);
		*at = '/';
	}
	mkdir(copy, mode);
}

/* A mount that some kernels lack and that the command may do without. */
static void optional_mount(const char *type, const char *target, unsigned long flags, const char *options)
{
	mkdir(target, 0755);
	mount(type, target, type, flags, options);
}

static void open_console(void)
{
	int fd = open("/dev/console", O_RDWR | O_NOCTTY);

	if (fd < 0)
		fd = open("/dev/null", O_RDWR);
	if (fd < 0)
		return;
	for (int i = 0; i < 3; i++)
		dup2(fd, i);
	if (fd > 2)
		close(fd);
}

void system_early(void)
{
	const unsigned long plain = MS_NOSUID | MS_NODEV | MS_NOEXEC;

	umask(0);
	optional_mount("devtmpfs", "/dev", MS_NOSUID, "mode=0755");
	optional_mount("proc", "/proc", plain, NULL);
	optional_mount("sysfs", "/sys", plain, NULL);
	open_console();
}

/* -- modules ------------------------------------------------------------------------ */

static void load_module(const char *name, const char *parameters)
{
	char path[600];
	int fd;

	snprintf(path, sizeof path, MODULES "%s", name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || (syscall(SYS_finit_module, fd, parameters, 0) && errno != EEXIST))
		warning("module %s: %s", name, strerror(errno));
	if (fd >= 0)
		close(fd);
	unlink(path);	/* its memory is the guest's */
}

void system_load_modules(void)
{
	FILE *order = fopen(MODULES "order", "re");
	char line[512];

	if (!order)
		return;	/* all that is needed is built in */
	while (fgets(line, sizeof line, order)) {
		char *parameters;

		line[strcspn(line, "\n")] = 0;
		parameters = strchr(line, ' ');
		if (parameters)
			*parameters++ = 0;
		if (*line)
			load_module(line, parameters ? parameters : "");
	}
	fclose(order);
}

/* -- the command port ---------------------------------------------------------------- */

static bool port_has_name(const char *entry)
{
	char path[512], name[sizeof PORT_NAME + 1] = "";
	int fd;

	snprintf(path, sizeof path, PORTS "/%s/name", entry);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	if (read(fd, name, sizeof name - 1) < 0)
		name[0] = 0;
	close(fd);
	name[strcspn(name, "\n")] = 0;
	return !strcmp(name, PORT_NAME);
}

static int try_port(void)
{
	DIR *ports = opendir(PORTS);
	struct dirent *entry;
	char path[512];
	int fd = -1;

	if (!ports)
		return -1;
	while (fd < 0 && (entry = readdir(ports))) {
		if (entry->d_name[0] == '.' || !port_has_name(entry->d_name))
			continue;
		snprintf(path, sizeof path, "/dev/%s", entry->d_name);
		fd = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
	}
	closedir(ports);
	return fd;
}

static bool host_is_there(int fd)
{
	struct pollfd pfd = { .fd = fd, .events = POLLOUT };

	return poll(&pfd, 1, 0) > 0 && pfd.revents & POLLOUT && !(pfd.revents & POLLHUP);
}

/* The port's name and the host's end arrive by control messages some time after the
 * device is bound, so look again and again. */
int system_open_port(void)
{
	int64_t deadline = now_ms() + PORT_DEADLINE_MS;
	int fd = -1;

	if (access(PORTS, F_OK))	/* the driver makes the directory when it starts */
		fatal("the guest's kernel has no virtio_console, built in or as a module in the initramfs");
	while (now_ms() < deadline) {
		if (fd < 0)
			fd = try_port();
		if (fd >= 0 && host_is_there(fd))
			return fd;
		usleep(2000);
	}
	if (fd >= 0)
		fatal("nobody holds the host's end of the port '" PORT_NAME "'");
	fatal("the guest has no virtio-console port named '" PORT_NAME "'");
}

/* -- mounts ---------------------------------------------------------------------------- */

static const struct {
	const char *name;
	unsigned long flag;
} mount_flags[] = {
	{ "ro", MS_RDONLY }, { "rw", 0 }, { "nosuid", MS_NOSUID }, { "nodev", MS_NODEV },
	{ "noexec", MS_NOEXEC }, { "sync", MS_SYNCHRONOUS }, { "dirsync", MS_DIRSYNC },
	{ "noatime", MS_NOATIME }, { "nodiratime", MS_NODIRATIME }, { "relatime", MS_RELATIME },
	{ "bind", MS_BIND }, { "rbind", MS_BIND | MS_REC },
};

static bool flag_of(const char *option, unsigned long *flags)
{
	for (size_t i = 0; i < sizeof mount_flags / sizeof *mount_flags; i++) {
		if (!strcmp(option, mount_flags[i].name)) {
			*flags |= mount_flags[i].flag;
			return true;
		}
	}
	return false;
}

/* Split mount(8)'s options into flags and what the file system reads itself. */
static unsigned long split_options(const char *options, char *data, size_t size)
{
	unsigned long flags = 0;
	char copy[4096], *save = NULL;

	data[0] = 0;
	snprintf(copy, sizeof copy, "%s", options ? options : "");
	for (char *o = strtok_r(copy, ",", &save); o; o = strtok_r(NULL, ",", &save)) {
		if (flag_of(o, &flags))
			continue;
		snprintf(data + strlen(data), size - strlen(data), "%s%s", *data ? "," : "", o);
	}
	return flags;
}

static const char *reason(const struct mount_spec *m, int error)
{
	bool virtiofs = !strcmp(m->type, "virtiofs");

	if (error == ENODEV)
		return "the guest's kernel has no such file system, built in or as a module in the initramfs";
	if (virtiofs && error == EINVAL)
		return "no virtio-fs device has this tag";
	if (error == ENOENT || error == ENXIO)
		return "no such device in the guest";
	return strerror(error);
}

/* Devices appear some time after their driver, so absence is retried for a while. */
static void mount_or_die(const struct mount_spec *m, const char *target)
{
	int64_t deadline = now_ms() + DEVICE_DEADLINE_MS;
	char data[4096];
	unsigned long flags = split_options(m->options, data, sizeof data);
	int error;

	for (;;) {
		if (!mount(m->source, target, m->type, flags, *data ? data : NULL))
			return;
		error = errno;
		if (now_ms() > deadline || (error != ENOENT && error != ENXIO && error != EINVAL))
			break;
		usleep(5000);
	}
	fatal("cannot mount %s '%s' on %s: %s", m->type, m->source, m->target, reason(m, error));
}

/* The mount's source says what lies below: nothing else in the guest could tell. */
static bool mount_overlay(const struct mount_spec *lower)
{
	char source[128];

	snprintf(source, sizeof source, "%s:%s", lower->type, lower->source);
	mkdir(UPPER, 0755);
	if (mount("tmpfs", UPPER, "tmpfs", 0, "mode=0755"))
		return false;
	mkdir(UPPER "/data", 0755);
	mkdir(UPPER "/work", 0755);
	return !mount(source, NEW_ROOT, "overlay", 0,
		      "lowerdir=" LOWER ",upperdir=" UPPER "/data,workdir=" UPPER "/work");
}

/* Returns whether the root can be written to. */
static bool assemble_root(const struct spec *spec)
{
	mkdir(NEW_ROOT, 0755);
	if (!spec->overlay) {
		mount_or_die(&spec->root, NEW_ROOT);
		return true;
	}
	mkdir(LOWER, 0755);
	mount_or_die(&spec->root, LOWER);
	if (mount_overlay(&spec->root))
		return true;
	warning("no writable overlay over the root (%s): it is read-only, but for /tmp, /var/tmp and /run",
		errno == ENODEV ? "the guest's kernel has no overlay file system" : strerror(errno));
	umount2(UPPER, MNT_DETACH);
	if (mount(LOWER, NEW_ROOT, NULL, MS_MOVE, NULL))
		fatal("cannot move the root into place: %s", strerror(errno));
	return false;
}

static void move_into_root(const char *path, const char *target)
{
	if (mount(path, target, NULL, MS_MOVE, NULL))
		warning("%s is not in the root file system, so it has none (%s)", path, strerror(errno));
}

static void switch_root(void)
{
	move_into_root("/dev", NEW_ROOT "/dev");
	move_into_root("/proc", NEW_ROOT "/proc");
	move_into_root("/sys", NEW_ROOT "/sys");
	unlink("/init");	/* the running program keeps its pages only as long as needed */
	if (chdir(NEW_ROOT) || mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/"))
		fatal("cannot enter the root file system: %s", strerror(errno));
}

void system_root(const struct spec *spec)
{
	bool writable = true;

	if (spec->root.type && *spec->root.type) {
		writable = assemble_root(spec);
		switch_root();
	}
	if (!writable) {
		optional_mount("tmpfs", "/tmp", MS_NOSUID | MS_NODEV, "mode=1777");
		optional_mount("tmpfs", "/var/tmp", MS_NOSUID | MS_NODEV, "mode=1777");
	}
}

static void device_links(void)
{
	static const char *const links[][2] = {
		{ "/proc/self/fd", "/dev/fd" }, { "fd/0", "/dev/stdin" },
		{ "fd/1", "/dev/stdout" }, { "fd/2", "/dev/stderr" },
	};

	for (size_t i = 0; i < sizeof links / sizeof *links; i++)
		(void)!symlink(links[i][0], links[i][1]);
}

static void loopback_up(void)
{
	struct ifreq request = { .ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING };
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	if (fd < 0)
		return;	/* a kernel without a network */
	ioctl(fd, SIOCSIFFLAGS, &request);
	close(fd);
}

/* The kernel gives its first process 4096 descriptors at most; file servers want more. */
static void raise_limits(void)
{
	struct rlimit limit = { 1024, 1048576 };

	setrlimit(RLIMIT_NOFILE, &limit);
}

void system_mounts(const struct spec *spec)
{
	const unsigned long plain = MS_NOSUID | MS_NODEV | MS_NOEXEC;

	optional_mount("devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, "mode=0620,gid=5,ptmxmode=0666");
	optional_mount("tmpfs", "/dev/shm", MS_NOSUID | MS_NODEV, "mode=1777");
	optional_mount("tmpfs", "/run", MS_NOSUID | MS_NODEV, "mode=0755");
	optional_mount("cgroup2", "/sys/fs/cgroup", plain, NULL);
	mkdir("/tmp", 01777);
	device_links();
	loopback_up();
	raise_limits();
	for (size_t i = 0; i < spec->mount_count; i++) {
		make_directories(spec->mounts[i].target, 0755);
		mount_or_die(&spec->mounts[i], spec->mounts[i].target);
	}
	if (spec->hostname && sethostname(spec->hostname, strlen(spec->hostname)))
		warning("hostname '%s': %s", spec->hostname, strerror(errno));
	umask(022);
}

void system_unmount(const struct spec *spec)
{
	sync();
	for (size_t i = spec->mount_count; i-- > 0;)
		umount2(spec->mounts[i].target, MNT_DETACH);
	if (spec->root.type && *spec->root.type && !spec->overlay)
		mount(NULL, "/", NULL, MS_REMOUNT | MS_RDONLY, NULL);
}

_Noreturn void system_power_off(void)
{
	sync();
	reboot(RB_POWER_OFF);
	reboot(RB_AUTOBOOT);	/* no way to power off: a reset ends the machine too */
	for (;;)
		pause();
}
