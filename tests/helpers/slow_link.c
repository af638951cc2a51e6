/* A slow link to the file server: each call below on the study's files takes DELAY microseconds
   more.  For LD_PRELOAD; tests/test_turn.py compiles it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void cross_the_link(int file) {
    char link[64], name[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, name, sizeof name - 1);
    name[length < 0 ? 0 : length] = 0;
    if (strstr(name, "study.db"))
        usleep(atoi(getenv("DELAY")));
}

#define FIND(real, name) \
    if (!real) \
        *(void **)&real = dlsym(RTLD_NEXT, name)

#define CONTROL(name) \
    int name(int file, int command, ...) { \
        static int (*real)(int, int, ...); \
        va_list more; \
        FIND(real, #name); \
        va_start(more, command); \
        void *given = va_arg(more, void *); \
        va_end(more); \
        cross_the_link(file); \
        return real(file, command, given); \
    }
CONTROL(fcntl)
CONTROL(fcntl64)

ssize_t pread64(int file, void *bytes, size_t size, off_t at) {
    static ssize_t (*real)(int, void *, size_t, off_t);
    FIND(real, "pread64");
    cross_the_link(file);
    return real(file, bytes, size, at);
}

int fdatasync(int file) {
    static int (*real)(int);
    FIND(real, "fdatasync");
    cross_the_link(file);
    return real(file);
}
