/* Programs of known cost, for `./do vm --accuracy`: KIND and how much, seconds or MiB.
 *
 * A burner of CPU time goes on until the clocks of its processes have what was asked for, and prints
 * what they had: the truth. The kernel starts a process's clock at its fork, so exec is in it. The
 * end of a process no clock of its own shows: who waits for it gets it with its rusage (wait4(2)), and
 * for those that nobody waits for it is taken to be that of another one that just ends. A toucher of
 * memory writes every page of what it was asked for, and has it for half a second.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { HOLD = 500000, PARTS = 4, CHAIN = 10, PAGE = 4096, BSS = 128 << 20 };

static _Atomic int64_t *used; /* nanoseconds, of processes that nobody waits for, */
static _Atomic int64_t *ends; /* and their number; both lie in memory shared by all */
static volatile char segment[BSS];

static int64_t clock_of(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static void burn_user(clockid_t clock, int64_t until) {
    volatile unsigned spin = 0;
    while (clock_of(clock) < until)
        for (int i = 0; i < 1000; i++) spin += i;
}

static void burn_system(clockid_t clock, int64_t until) {
    char block[PAGE];
    int zero = open("/dev/zero", O_RDONLY);
    while (clock_of(clock) < until)
        if (read(zero, block, sizeof block) != sizeof block) abort();
}

static void *thread(void *until) {
    burn_user(CLOCK_THREAD_CPUTIME_ID, *(int64_t *)until);
    return NULL;
}

static void threads(int64_t total) {
    pthread_t each[PARTS];
    int64_t share = total / PARTS;
    for (int i = 0; i < PARTS; i++)
        if (pthread_create(&each[i], NULL, thread, &share)) abort();
    for (int i = 0; i < PARTS; i++) pthread_join(each[i], NULL);
}

static void end_unseen(void) {
    *used += clock_of(CLOCK_PROCESS_CPUTIME_ID);
    *ends += 1;
    _exit(0);
}

/* What all children had in the end that were waited for, and those that these waited for. */
static int64_t waited_for(void) {
    struct rusage usage;
    while (wait(NULL) > 0) continue;
    if (getrusage(RUSAGE_CHILDREN, &usage)) abort();
    return (usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1000000000LL
        + (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1000LL;
}

/* What the end of a process costs, beyond what it knows of. */
static int64_t cost_of_an_end(void) {
    if (fork() == 0) end_unseen();
    int64_t cost = waited_for() - *used;
    *used = *ends = 0;
    return cost;
}

/* Nobody that we know of waits for these; the pipe tells that they are gone. */
static void orphans(int64_t total) {
    int line[2];
    char byte;
    if (pipe(line)) abort();
    for (int i = 0; i < PARTS; i++)
        if (fork() == 0) {
            if (fork() == 0) {
                setsid();
                burn_user(CLOCK_PROCESS_CPUTIME_ID, total / PARTS);
                end_unseen();
            }
            _exit(0);
        }
    close(line[1]);
    while (wait(NULL) > 0) continue;
    while (read(line[0], &byte, 1) > 0) continue;
}

static void children(int64_t total, int unseen) {
    if (unseen) signal(SIGCHLD, SIG_IGN);
    for (int i = 0; i < PARTS; i++)
        if (fork() == 0) {
            burn_user(CLOCK_PROCESS_CPUTIME_ID, total / PARTS);
            if (unseen) end_unseen();
            _exit(0);
        }
    while (wait(NULL) > 0) continue; /* ECHILD once all are gone, SIGCHLD ignored or not */
}

static void chain(char **argv, int64_t total) {
    int done = argv[3] ? atoi(argv[3]) + 1 : 1;
    char count[16];
    burn_user(CLOCK_PROCESS_CPUTIME_ID, total / CHAIN * done);
    if (done == CHAIN) _exit(0);
    snprintf(count, sizeof count, "%d", done);
    execl(argv[0], argv[0], argv[1], argv[2], count, NULL);
    abort();
}

static void touch(volatile char *at, size_t size) {
    for (size_t i = 0; i < size; i += PAGE) at[i] = 1;
}

static char *mapped(size_t size, int flags, int file) {
    char *at = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, file, 0);
    if (at == MAP_FAILED) abort();
    return at;
}

static void in_tmpfs(size_t size) {
    static char block[1 << 16];
    const char *path = "/dev/shm/sandboxd-accuracy";
    int file = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    memset(block, 1, sizeof block);
    for (size_t left = size; left > 0;) {
        ssize_t part = left < sizeof block ? left : sizeof block;
        if (write(file, block, part) != part) abort();
        left -= part;
    }
    usleep(HOLD);
    unlink(path);
}

/* Half of it is the parent's; the child writes to its copy of that half. */
static void copied(size_t size) {
    char *half = mapped(size / 2, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    touch(half, size / 2);
    if (fork() == 0) {
        touch(half, size / 2);
        usleep(HOLD);
        _exit(0);
    }
    wait(NULL);
}

static int memory(const char *kind, size_t size) {
    if (!strcmp(kind, "heap")) {
        char *at = malloc(size);
        if (!at) abort();
        touch(at, size);
    } else if (!strcmp(kind, "mmap")) {
        touch(mapped(size, MAP_PRIVATE | MAP_ANONYMOUS, -1), size);
    } else if (!strcmp(kind, "shared")) {
        touch(mapped(size, MAP_SHARED | MAP_ANONYMOUS, -1), size);
    } else if (!strcmp(kind, "tmpfs")) {
        in_tmpfs(size);
        return 1;
    } else if (!strcmp(kind, "copied")) {
        copied(size);
        return 1;
    } else if (!strcmp(kind, "bss")) {
        touch(segment, BSS);
        if (size > BSS) touch(mapped(size - BSS, MAP_PRIVATE | MAP_ANONYMOUS, -1), size - BSS);
    } else {
        return 0;
    }
    usleep(HOLD);
    return 1;
}

static void burn(char **argv, int64_t total) {
    if (!strcmp(argv[1], "user")) burn_user(CLOCK_PROCESS_CPUTIME_ID, total);
    else if (!strcmp(argv[1], "system")) burn_system(CLOCK_PROCESS_CPUTIME_ID, total);
    else if (!strcmp(argv[1], "threads")) threads(total);
    else if (!strcmp(argv[1], "children")) children(total, 0);
    else if (!strcmp(argv[1], "orphans")) orphans(total);
    else if (!strcmp(argv[1], "ignored")) children(total, 1);
    else if (!strcmp(argv[1], "chain")) chain(argv, total);
    else abort();
    _exit(0);
}

int main(int argc, char **argv) {
    if (argc < 3) return 2;
    double amount = atof(argv[2]);
    if (memory(argv[1], (size_t)(amount * (1 << 20)))) return 0;
    int64_t total = (int64_t)(amount * 1e9);
    if (argc > 3) chain(argv, total);
    used = (void *)mapped(PAGE, MAP_SHARED | MAP_ANONYMOUS, -1);
    ends = used + 1;
    int64_t end = cost_of_an_end();
    if (fork() == 0) burn(argv, total);
    int64_t all = waited_for() + *used + (*ends + 1) * end; /* and our own */
    printf("%lld\n", (long long)(all + clock_of(CLOCK_PROCESS_CPUTIME_ID)));
    return 0;
}
