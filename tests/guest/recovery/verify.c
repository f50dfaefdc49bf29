/* The guest's only process: writes, reads back and compares blocks of /dev/vda, one worker a request.
 *
 * Worker w (argv[1] of them) has REGION blocks; operation n writes block n % REGION with a header
 * {n, w} and bytes that depend on both.  A write that was repeated late, lost or torn shows when the block is
 * read back, at once and again at the end, which is when the host has set the first byte of block 0.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BLOCK = 4096, REGION = 64 };

static unsigned char *buffer, *wanted;
static int disk;

static void fill(unsigned char *block, uint64_t operation, uint64_t worker)
{
    uint64_t *words = (uint64_t *)block;
    for (int i = 0; i < BLOCK / 8; i++)
        words[i] = (operation * 1000003 + worker) * 2654435761u + i;
    words[0] = operation;
    words[1] = worker;
}

static off_t place(uint64_t operation, int worker)
{
    return (off_t)(1 + worker * REGION + operation % REGION) * BLOCK;
}

static int differs(uint64_t operation, int worker)
{
    fill(wanted, operation, worker);
    return pread(disk, buffer, BLOCK, place(operation, worker)) != BLOCK || memcmp(buffer, wanted, BLOCK);
}

static int stopped(void)
{
    return pread(disk, buffer, BLOCK, 0) != BLOCK || buffer[0];
}

static int work(int worker)
{
    uint64_t operation = 0;
    int wrong = 0;
    do {
        fill(buffer, ++operation, worker);
        wrong += pwrite(disk, buffer, BLOCK, place(operation, worker)) != BLOCK;
        wrong += differs(operation, worker);
    } while (!stopped());
    for (int back = 0; back < REGION && (uint64_t)back < operation; back++)
        wrong += differs(operation - back, worker);
    printf("worker %d: %lu operations, %d wrong\n", worker, (unsigned long)operation, wrong);
    return wrong != 0;
}

int main(int argc, char **argv)
{
    int workers = argc > 1 ? atoi(argv[1]) : 1, failed = 0, status;
    mkdir("/dev", 0755), mount("d", "/dev", "devtmpfs", 0, 0);
    dup2(open("/dev/console", O_RDWR), 1);
    setvbuf(stdout, NULL, _IOLBF, 0);
    disk = open("/dev/vda", O_RDWR | O_DIRECT);
    if (disk < 0 || posix_memalign((void **)&buffer, BLOCK, BLOCK) || posix_memalign((void **)&wanted, BLOCK, BLOCK))
        printf("no disk\n");
    else
        for (int worker = 0; worker < workers; worker++)
            if (!fork())
                exit(work(worker));
    while (wait(&status) > 0)
        failed += status != 0;
    printf("%d workers, %d failed\n", workers, failed);
    fflush(stdout);
    reboot(RB_POWER_OFF);
}
