/* Preloaded by tests/faults.py: fails the k-th call of a kind on what lies below a folder. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX], kind[16];
static long failing;
static int number;
static atomic_long seen;

/* Have call `k` of a kind (open, read, write, short, sync, rename, mkdir, remove) below `root` fail with an errno.
   Of kind `short`, write call `k` writes half of what it was given. With k = 0 calls are only counted. */
void fault_arm(const char *root, const char *what, long k, int error) {
    snprintf(folder, sizeof folder, "%s/", root);
    snprintf(kind, sizeof kind, "%s", what);
    failing = k, number = error, seen = 0;
}

long fault_seen(void) { return seen; }

static int hit(const char *what, const char *path) {
    if (strcmp(what, kind) || strncmp(path, folder, strlen(folder))) return 0;
    if (atomic_fetch_add(&seen, 1) + 1 != failing) return 0;
    errno = number;
    return 1;
}

static int hit_file(const char *what, int file) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = strcmp(what, kind) ? -1 : readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return hit(what, path);
}

static int hit_at(const char *what, int at, const char *path) {
    char link[64], whole[PATH_MAX * 2];
    if (path[0] == '/') return hit(what, path);
    if (strcmp(what, kind)) return 0;
    snprintf(link, sizeof link, at == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", at);
    ssize_t length = readlink(link, whole, PATH_MAX);
    if (length < 0) return 0;
    snprintf(whole + length, sizeof whole - length, "/%s", path);
    return hit(what, whole);
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define OPEN(name)                                                                  \
    int name(const char *path, int flags, ...) {                                    \
        va_list list;                                                               \
        va_start(list, flags);                                                      \
        mode_t mode = va_arg(list, mode_t);                                         \
        va_end(list);                                                               \
        REAL(name);                                                                 \
        return hit_at("open", AT_FDCWD, path) ? -1 : real(path, flags, mode);       \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                \
    int name(int at, const char *path, int flags, ...) {                            \
        va_list list;                                                               \
        va_start(list, flags);                                                      \
        mode_t mode = va_arg(list, mode_t);                                         \
        va_end(list);                                                               \
        REAL(name);                                                                 \
        return hit_at("open", at, path) ? -1 : real(at, path, flags, mode);         \
    }
OPENAT(openat)
OPENAT(openat64)

#define WRAP(what, test, result, name, parameters, ...)                             \
    result name parameters {                                                        \
        REAL(name);                                                                 \
        return test ? -1 : real(__VA_ARGS__);                                       \
    }
#define ON_FILE(what, result, name, parameters, ...) \
    WRAP(what, hit_file(what, file), result, name, parameters, __VA_ARGS__)
#define ON_PATH(what, name, parameters, ...) \
    WRAP(what, hit_at(what, AT_FDCWD, path), int, name, parameters, __VA_ARGS__)

ssize_t write(int file, const void *bytes, size_t count) {
    REAL(write);
    if (hit_file("write", file)) return -1;
    return real(file, bytes, count > 1 && hit_file("short", file) ? count / 2 : count);
}
ON_FILE("write", ssize_t, writev, (int file, const struct iovec *parts, int count), file, parts, count)
ON_FILE("write", ssize_t, pwrite64, (int file, const void *bytes, size_t count, off64_t at), file, bytes, count, at)
ON_FILE("sync", int, fsync, (int file), file)
ON_FILE("sync", int, fdatasync, (int file), file)
ON_FILE("read", ssize_t, read, (int file, void *bytes, size_t count), file, bytes, count)
ON_FILE("read", ssize_t, pread64, (int file, void *bytes, size_t count, off64_t at), file, bytes, count, at)
ON_FILE("read", ssize_t, preadv64, (int file, const struct iovec *parts, int count, off64_t at), file, parts, count, at)
ON_FILE("read", ssize_t, preadv64v2, (int file, const struct iovec *parts, int count, off64_t at, int flags), file, parts,
        count, at, flags)
ON_PATH("rename", rename, (const char *path, const char *to), path, to)
ON_PATH("mkdir", mkdir, (const char *path, mode_t mode), path, mode)
ON_PATH("remove", unlink, (const char *path), path)
ON_PATH("remove", rmdir, (const char *path), path)
WRAP("remove", hit_at("remove", at, path), int, unlinkat, (int at, const char *path, int flags), at, path, flags)
