/* Preloaded into a process: its n-th call of one kind on files under a folder goes wrong.

   FAULT="CALL N WHAT FOLDER": CALL is open (to write), read, write, rename, fsync, mkdir or unlink. WHAT is an errno,
   0 to be killed at the call, or -1 for a write that writes half. The variable is read at each call, so that a process
   which forks can set it for its child. The file named by FAULT_DONE is made when the call comes. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAILS(condition) do { if ((condition) != 1) return -1; } while (0)

static long calls;

/* What is wrong with this call: 1 nothing, else WHAT. */
static int fault(const char *call, const char *path) {
    const char *given = getenv("FAULT");
    char wanted[16], folder[4096], full[8192] = "";
    long nth;
    int what;
    if (!given || !path || sscanf(given, "%15s %ld %d %4095s", wanted, &nth, &what, folder) != 4) return 1;
    if (strcmp(wanted, call)) return 1;
    if (path[0] != '/' && getcwd(full, 4096)) strcat(full, "/");
    strncat(full, path, 4095);
    if (strncmp(full, folder, strlen(folder)) || ++calls != nth) return 1;
    const char *done = getenv("FAULT_DONE");
    if (done) close(REAL(open)(done, O_CREAT | O_WRONLY, 0644));
    if (what == 0) kill(getpid(), SIGKILL);
    if (what > 0) errno = what;
    return what;
}

static int fault_of_file(const char *call, int file) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 1;
    path[length] = 0;
    return fault(call, path);
}

#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...) {                                                                       \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = va_arg(rest, mode_t);                                                                            \
        va_end(rest);                                                                                                  \
        FAILS(fault(flags & (O_WRONLY | O_RDWR) ? "open" : "read", path));                                             \
        return REAL(name)(path, flags, mode);                                                                          \
    }
OPEN(open)
OPEN(open64)

ssize_t write(int file, const void *bytes, size_t count) {
    int what = fault_of_file("write", file);
    if (what == -1 && count > 1) count /= 2;
    else if (what != 1 && what != -1) return -1;
    return REAL(write)(file, bytes, count);
}

ssize_t read(int file, void *bytes, size_t count) {
    FAILS(fault_of_file("read", file));
    return REAL(read)(file, bytes, count);
}

int rename(const char *from, const char *to) {
    FAILS(fault("rename", to));
    return REAL(rename)(from, to);
}

int fsync(int file) {
    FAILS(fault_of_file("fsync", file));
    return REAL(fsync)(file);
}

int mkdir(const char *path, mode_t mode) {
    FAILS(fault("mkdir", path));
    return REAL(mkdir)(path, mode);
}

int unlink(const char *path) {
    FAILS(fault("unlink", path));
    return REAL(unlink)(path);
}
