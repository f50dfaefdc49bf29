/* The guest's first process: loads the driver, has texts made upper case, unloads it; over and over. */
#include <ctype.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { ROUNDS = 30, TEXTS = 6 };

static int load(const char *name)
{
	char path[128];
	snprintf(path, sizeof path, "/modules/%s.ko", name);
	int fd = open(path, O_RDONLY);
	int failed = (int)syscall(SYS_finit_module, fd, "", 0);
	close(fd);
	return failed;
}

int main(void)
{
	int good = 0, failed = 0, wrong = 0;
	char name[100];

	mount("dev", "/dev", "devtmpfs", 0, "");
	FILE *order = fopen("/modules/order", "r");
	while (fgets(name, sizeof name, order)) {
		name[strcspn(name, ".\n")] = 0;
		if (strcmp(name, "upper"))
			load(name);
	}
	for (int round = 0; round < ROUNDS; round++) {
		if (load("upper"))
			perror("upper.ko");
		int fd = open("/dev/upper", O_RDWR);
		for (int i = 0; i < TEXTS; i++) {
			char text[32], answer[64] = "";
			int size = snprintf(text, sizeof text, "text %d of %d", i, round);
			if (write(fd, text, (size_t)size) != size) {
				failed++;
				continue;
			}
			ssize_t got = pread(fd, answer, sizeof answer, 0);
			for (int c = 0; c < size; c++)
				text[c] = (char)toupper(text[c]);
			if (got == size && !memcmp(answer, text, (size_t)size))
				good++;
			else
				wrong++;
		}
		close(fd);
		syscall(SYS_delete_module, "upper", 0);
	}
	printf("good %d failed %d wrong %d\n", good, failed, wrong);
	fflush(stdout);
	reboot(RB_POWER_OFF);
}
