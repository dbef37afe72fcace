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

enum { OPEN, READ, WRITE, SHORT, SYNC, RENAME, MKDIR, REMOVE, KINDS };

static char folder[PATH_MAX];
static int kind, number;
static long failing;
static atomic_long seen[KINDS];

/* Have call `k` of a kind below `root` fail with an errno. Of kind SHORT, write call `k` writes half of what it was
   given. With k = 0 calls are only counted. */
void fault_arm(const char *root, int what, long k, int error) {
    snprintf(folder, sizeof folder, "%s/", root);
    kind = what, failing = k, number = error;
    memset(seen, 0, sizeof seen);
}

long fault_seen(int what) { return seen[what]; }

static int hit(int what, const char *path) {
    if (!folder[0] || strncmp(path, folder, strlen(folder))) return 0;
    if (atomic_fetch_add(&seen[what], 1) + 1 != failing || what != kind) return 0;
    errno = number;
    return 1;
}

static int hit_file(int what, int file) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = folder[0] ? readlink(link, path, sizeof path - 1) : -1;
    if (length < 0) return 0;
    path[length] = 0;
    return hit(what, path);
}

static int hit_at(int what, int at, const char *path) {
    char link[64], whole[PATH_MAX * 2];
    if (path[0] == '/') return hit(what, path);
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, at == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", at);
    ssize_t length = readlink(link, whole, PATH_MAX);
    if (length < 0) return 0;
    snprintf(whole + length, sizeof whole - length, "/%s", path);
    return hit(what, whole);
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define OPENING(name)                                                                \
    int name(const char *path, int flags, ...) {                                    \
        va_list list;                                                               \
        va_start(list, flags);                                                      \
        mode_t mode = va_arg(list, mode_t);                                         \
        va_end(list);                                                               \
        REAL(name);                                                                 \
        return hit_at(OPEN, AT_FDCWD, path) ? -1 : real(path, flags, mode);       \
    }
OPENING(open)
OPENING(open64)

#define OPENAT(name)                                                                \
    int name(int at, const char *path, int flags, ...) {                            \
        va_list list;                                                               \
        va_start(list, flags);                                                      \
        mode_t mode = va_arg(list, mode_t);                                         \
        va_end(list);                                                               \
        REAL(name);                                                                 \
        return hit_at(OPEN, at, path) ? -1 : real(at, path, flags, mode);         \
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
    if (hit_file(WRITE, file)) return -1;
    return real(file, bytes, count > 1 && hit_file(SHORT, file) ? count / 2 : count);
}
ON_FILE(WRITE, ssize_t, writev, (int file, const struct iovec *parts, int count), file, parts, count)
ON_FILE(WRITE, ssize_t, pwrite64, (int file, const void *bytes, size_t count, off64_t at), file, bytes, count, at)
ON_FILE(SYNC, int, fsync, (int file), file)
ON_FILE(SYNC, int, fdatasync, (int file), file)
ON_FILE(READ, ssize_t, read, (int file, void *bytes, size_t count), file, bytes, count)
ON_FILE(READ, ssize_t, pread64, (int file, void *bytes, size_t count, off64_t at), file, bytes, count, at)
ON_FILE(READ, ssize_t, preadv64, (int file, const struct iovec *parts, int count, off64_t at), file, parts, count, at)
ON_FILE(READ, ssize_t, preadv64v2, (int file, const struct iovec *parts, int count, off64_t at, int flags), file, parts,
        count, at, flags)
ON_PATH(RENAME, rename, (const char *path, const char *to), path, to)
ON_PATH(MKDIR, mkdir, (const char *path, mode_t mode), path, mode)
ON_PATH(REMOVE, unlink, (const char *path), path)
ON_PATH(REMOVE, rmdir, (const char *path), path)
WRAP(REMOVE, hit_at(REMOVE, at, path), int, unlinkat, (int at, const char *path, int flags), at, path, flags)
