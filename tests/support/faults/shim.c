/* Faults of a disk, for tests: loaded by LD_PRELOAD, it stands between a process and libc and makes chosen calls fail.
 *
 * A fault is one line, given as $FAULT_SPEC before the process starts or to faults_arm() while it runs:
 *
 *     calls=pwrite+sendfile path=/out/ at=3 times=1 byte=0 what=error:28
 *
 * calls   pwrite write pread read copy sendfile fsync fdatasync rename create open fallocate truncate unlink mkdir close;
 *         each stands for all of libc's names of it (pwrite, pwrite64, pwritev2 ...)
 * path    part of the file's path, which a descriptor is asked for; of a rename, of either path
 * not     part of a path that is left alone all the same
 * at      the first matching call that meets the fault, counted from 1
 * times   how many calls meet it from there on; 0: all
 * every   only each so-manyth of these
 * byte    calls on data meet it only from this byte of the written (or read) file on; one that reaches over it is cut short
 * what    error:ERRNO  short:BYTES  zero  corrupt (one bit, in silence)  slow:MILLISECONDS  stuck (for ever)  none
 *
 * Several faults are separated by ";"; a call meets the first that it matches and that is due.
 *
 * Each matching call is a line of the file $FAULT_LOG: "+" where it met the fault, "-" where not, the call, the path.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum what { NONE, FAIL, SHORT, ZERO, CORRUPT, SLOW, STUCK };

struct fault {
    char calls[256], path[512], not[512];
    long at, times, every, byte, number;
    enum what what;
    atomic_long num_matching;
};
static struct fault faults[4];
static int num_faults;
static char log_path[512];

static void set(char *field, size_t size, const char *value) {
    strncpy(field, value, size - 1);
    field[size - 1] = 0;
}

static void set_one(struct fault *fault, char *spec) {
    static const char *names[] = {"none", "error", "short", "zero", "corrupt", "slow", "stuck"};
    char *word;
    memset(fault, 0, sizeof *fault);
    fault->at = fault->every = 1;
    fault->byte = -1;
    while ((word = strtok_r(spec, " ", &spec))) {
        char *value = strchr(word, '=');
        if (value) *value++ = 0;
        if (!value) goto unknown;
        if (!strcmp(word, "calls")) {
            fault->calls[0] = '+';
            set(fault->calls + 1, sizeof fault->calls - 2, value);
            strcat(fault->calls, "+");
        } else if (!strcmp(word, "path")) set(fault->path, sizeof fault->path, value);
        else if (!strcmp(word, "not")) set(fault->not, sizeof fault->not, value);
        else if (!strcmp(word, "at")) fault->at = atol(value);
        else if (!strcmp(word, "times")) fault->times = atol(value);
        else if (!strcmp(word, "every")) fault->every = atol(value);
        else if (!strcmp(word, "byte")) fault->byte = atol(value);
        else if (!strcmp(word, "what")) {
            char *number = strchr(value, ':');
            int i = 0;
            if (number) { *number++ = 0; fault->number = atol(number); }
            while (i < 7 && strcmp(value, names[i])) i++;
            if (i == 7) goto unknown;
            fault->what = i;
        } else goto unknown;
        continue;
    unknown:
        fprintf(stderr, "shim: %s is no setting\n", word);
        _exit(97);
    }
}

void faults_arm(const char *spec, const char *log) {
    char copy[2048], *rest = copy, *one;
    set(copy, sizeof copy, spec);
    set(log_path, sizeof log_path, log ? log : "");
    num_faults = 0;
    while (num_faults < 4 && (one = strtok_r(rest, ";", &rest))) set_one(&faults[num_faults++], one);
}

__attribute__((constructor)) static void arm_at_start(void) {
    const char *spec = getenv("FAULT_SPEC"), *rank = getenv("FAULT_RANK"), *mine = getenv("RANK");
    if (spec && (!rank || (mine && !strcmp(rank, mine)))) faults_arm(spec, getenv("FAULT_LOG"));
}

static void note(char sign, const char *call, const char *path) {
    char line[4400];
    if (!log_path[0]) return;
    int length = snprintf(line, sizeof line, "%c %s %s\n", sign, call, path);
    int fd = syscall(SYS_openat, AT_FDCWD, log_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (fd >= 0) { syscall(SYS_write, fd, line, length); syscall(SYS_close, fd); }
}

/* The fault that this call meets, or none. *length, where given, is cut where the call reaches over a fault's first byte. */
static const struct fault *meets(const char *call, const char *path, long offset, size_t *length) {
    char name[32];
    if (!path) return NULL;
    snprintf(name, sizeof name, "+%s+", call);
    for (struct fault *fault = faults; fault < faults + num_faults; fault++) {
        if (!strstr(fault->calls, name) || !strstr(path, fault->path)) continue;
        if (fault->not[0] && strstr(path, fault->not)) continue;
        if (fault->byte >= 0 && length) {
            if (offset + (long)*length <= fault->byte) continue;
            if (offset < fault->byte) { *length = fault->byte - offset; note('-', call, path); continue; }
        }
        long number = atomic_fetch_add(&fault->num_matching, 1) + 1;
        int is_met = number >= fault->at && (!fault->times || number < fault->at + fault->times)
                     && (number - fault->at) % fault->every == 0 && fault->what != NONE;
        note(is_met ? '+' : '-', call, path);
        if (!is_met) continue;
        while (fault->what == STUCK) pause();
        if (fault->what != SLOW) return fault;
        struct timespec pause = {fault->number / 1000, fault->number % 1000 * 1000000};
        nanosleep(&pause, NULL);
    }
    return NULL;
}

static const char *path_of(int fd, char *path) {
    char link[64];
    if (!num_faults) return NULL;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlink, link, path, 4095L);
    if (length < 0) return NULL;
    path[length] = 0;
    return path;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = (__typeof__(real))dlsym(RTLD_NEXT, #name)

/* ---- data ---- */

static long position(int fd) { return syscall(SYS_lseek, fd, 0L, SEEK_CUR); }

/* Before a write or a read of *length bytes: 1 and *result where it must not happen, else 0. */
static int cut(const struct fault *met, size_t *length, ssize_t *result) {
    if (!met) return 0;
    if (met->what == SHORT && *length > (size_t)met->number) *length = met->number;
    if (met->what == ZERO) { *result = 0; return 1; }
    if (met->what == FAIL) { errno = met->number; *result = -1; return 1; }
    return 0;
}

static const void *spoil(const void *data, size_t length, char **copy) {
    if (!length) return data;
    *copy = malloc(length);
    memcpy(*copy, data, length);
    (*copy)[length / 2] ^= 1;
    return *copy;
}

#define WRITE_AT(name)                                                                                     \
    ssize_t name(int fd, const void *data, size_t length, off64_t offset) {                                \
        REAL(name);                                                                                        \
        char path[4096], *copy = NULL;                                                                     \
        ssize_t result;                                                                                    \
        const struct fault *met = meets("pwrite", path_of(fd, path), offset, &length);                     \
        if (cut(met, &length, &result)) return result;                                                     \
        if (met && met->what == CORRUPT) data = spoil(data, length, &copy);                                \
        result = real(fd, data, length, offset);                                                           \
        free(copy);                                                                                        \
        return result;                                                                                     \
    }
WRITE_AT(pwrite)
WRITE_AT(pwrite64)

ssize_t write(int fd, const void *data, size_t length) {
    REAL(write);
    char path[4096], *copy = NULL;
    ssize_t result;
    const struct fault *met = meets("write", path_of(fd, path), position(fd), &length);
    if (cut(met, &length, &result)) return result;
    if (met && met->what == CORRUPT) data = spoil(data, length, &copy);
    result = real(fd, data, length);
    free(copy);
    return result;
}

#define READ(name, kind, offset, parameters, ...)                                                          \
    ssize_t name parameters {                                                                              \
        REAL(name);                                                                                        \
        char path[4096];                                                                                   \
        ssize_t result;                                                                                    \
        const struct fault *met = meets(kind, path_of(fd, path), offset, &length);                         \
        if (cut(met, &length, &result)) return result;                                                     \
        result = real(__VA_ARGS__);                                                                        \
        if (met && met->what == CORRUPT && result > 0) ((char *)data)[result / 2] ^= 1;                    \
        return result;                                                                                     \
    }
READ(read, "read", position(fd), (int fd, void *data, size_t length), fd, data, length)
READ(pread, "pread", at, (int fd, void *data, size_t length, off64_t at), fd, data, length, at)
READ(pread64, "pread", at, (int fd, void *data, size_t length, off64_t at), fd, data, length, at)

/* Python reads into one buffer a call; what is longer is cut to the first. */
#define READ_VECTOR(name, parameters, ...)                                                                 \
    ssize_t name parameters {                                                                              \
        REAL(name);                                                                                        \
        char path[4096];                                                                                   \
        ssize_t result;                                                                                    \
        struct iovec first = vector[0];                                                                    \
        const struct fault *met = meets("pread", path_of(fd, path), at, &first.iov_len);                   \
        if (cut(met, &first.iov_len, &result)) return result;                                              \
        if (met || first.iov_len < vector[0].iov_len) { vector = &first; count = 1; }                      \
        result = real(__VA_ARGS__);                                                                        \
        if (met && met->what == CORRUPT && result > 0) ((char *)first.iov_base)[result / 2] ^= 1;          \
        return result;                                                                                     \
    }
READ_VECTOR(preadv, (int fd, const struct iovec *vector, int count, off64_t at), fd, vector, count, at)
READ_VECTOR(preadv64, (int fd, const struct iovec *vector, int count, off64_t at), fd, vector, count, at)
READ_VECTOR(preadv2, (int fd, const struct iovec *vector, int count, off64_t at, int flags), fd, vector, count, at, flags)
READ_VECTOR(preadv64v2, (int fd, const struct iovec *vector, int count, off64_t at, int flags), fd, vector, count, at, flags)

/* What went over inside the kernel, one bit changed. The output is open for writing alone: the byte comes from the source. */
static void spoil_copied(int in, off64_t in_offset, int out, off64_t out_offset) {
    char byte;
    if (syscall(SYS_pread64, in, &byte, 1L, in_offset) != 1) return;
    byte ^= 1;
    if (syscall(SYS_pwrite64, out, &byte, 1L, out_offset) != 1) abort();
}

ssize_t copy_file_range(int in, off64_t *in_offset, int out, off64_t *out_offset, size_t length, unsigned flags) {
    REAL(copy_file_range);
    char path[4096];
    ssize_t result;
    off64_t from = in_offset ? *in_offset : position(in), to = out_offset ? *out_offset : position(out);
    const struct fault *met = meets("copy", path_of(out, path), to, &length);
    if (cut(met, &length, &result)) return result;
    result = real(in, in_offset, out, out_offset, length, flags);
    if (met && met->what == CORRUPT && result > 0) spoil_copied(in, from + result / 2, out, to + result / 2);
    return result;
}

#define SEND_FILE(name)                                                                                    \
    ssize_t name(int out, int in, off64_t *offset, size_t length) {                                        \
        REAL(name);                                                                                        \
        char path[4096];                                                                                   \
        ssize_t result;                                                                                    \
        off64_t from = offset ? *offset : position(in), to = position(out);                                \
        const struct fault *met = meets("sendfile", path_of(out, path), to, &length);                      \
        if (cut(met, &length, &result)) return result;                                                     \
        result = real(out, in, offset, length);                                                            \
        if (met && met->what == CORRUPT && result > 0) spoil_copied(in, from + result / 2, out, to + result / 2); \
        return result;                                                                                     \
    }
SEND_FILE(sendfile)
SEND_FILE(sendfile64)

/* ---- all else: it fails, or it happens ---- */

/* The number of the error with which this call fails, 0 where it happens. */
static int failure_of(const char *call, const char *path) {
    const struct fault *met = meets(call, path, 0, NULL);
    return met && met->what == FAIL ? met->number : 0;
}

#define FAIL_BY_FD(name, kind, failure, parameters, ...)                                                   \
    int name parameters {                                                                                  \
        REAL(name);                                                                                        \
        char path[4096];                                                                                   \
        int number = failure_of(kind, path_of(fd, path));                                                  \
        if (number) { failure; }                                                                           \
        return real(__VA_ARGS__);                                                                          \
    }
#define SET_ERRNO errno = number; return -1
FAIL_BY_FD(fsync, "fsync", SET_ERRNO, (int fd), fd)
FAIL_BY_FD(fdatasync, "fdatasync", SET_ERRNO, (int fd), fd)
FAIL_BY_FD(close, "close", real(fd); SET_ERRNO, (int fd), fd)
FAIL_BY_FD(ftruncate, "truncate", SET_ERRNO, (int fd, off64_t length), fd, length)
FAIL_BY_FD(ftruncate64, "truncate", SET_ERRNO, (int fd, off64_t length), fd, length)
FAIL_BY_FD(posix_fallocate, "fallocate", return number, (int fd, off64_t offset, off64_t length), fd, offset, length)
FAIL_BY_FD(posix_fallocate64, "fallocate", return number, (int fd, off64_t offset, off64_t length), fd, offset, length)

#define FAIL_BY_PATH(name, kind, path, parameters, ...)                                                    \
    int name parameters {                                                                                  \
        REAL(name);                                                                                        \
        int number = failure_of(kind, path);                                                               \
        if (number) { SET_ERRNO; }                                                                         \
        return real(__VA_ARGS__);                                                                          \
    }
FAIL_BY_PATH(unlink, "unlink", path, (const char *path), path)
FAIL_BY_PATH(unlinkat, "unlink", path, (int folder, const char *path, int flags), folder, path, flags)
FAIL_BY_PATH(mkdir, "mkdir", path, (const char *path, mode_t mode), path, mode)
FAIL_BY_PATH(mkdirat, "mkdir", path, (int folder, const char *path, mode_t mode), folder, path, mode)

/* Either path of a rename may be the one that is meant; it is counted once. */
static const char *either(const char *from, const char *to) {
    for (struct fault *fault = faults; fault < faults + num_faults; fault++)
        if (strstr(to, fault->path) && !(fault->not[0] && strstr(to, fault->not))) return to;
    return from;
}
FAIL_BY_PATH(rename, "rename", either(from, to), (const char *from, const char *to), from, to)
FAIL_BY_PATH(renameat, "rename", either(from, to), (int a, const char *from, int b, const char *to), a, from, b, to)
FAIL_BY_PATH(renameat2, "rename", either(from, to), (int a, const char *from, int b, const char *to, unsigned flags),
             a, from, b, to, flags)
FAIL_BY_PATH(link, "rename", either(from, to), (const char *from, const char *to), from, to)
FAIL_BY_PATH(linkat, "rename", either(from, to), (int a, const char *from, int b, const char *to, int flags),
             a, from, b, to, flags)

#define OPEN(name, parameters, ...)                                                                        \
    int name parameters {                                                                                  \
        REAL(name);                                                                                        \
        mode_t mode = 0;                                                                                   \
        if (flags & (O_CREAT | __O_TMPFILE)) {                                                             \
            va_list rest;                                                                                  \
            va_start(rest, flags);                                                                         \
            mode = va_arg(rest, mode_t);                                                                   \
            va_end(rest);                                                                                  \
        }                                                                                                  \
        int number = failure_of(flags & O_CREAT ? "create" : "open", path);                                \
        if (number) { SET_ERRNO; }                                                                         \
        return real(__VA_ARGS__);                                                                          \
    }
OPEN(open, (const char *path, int flags, ...), path, flags, mode)
OPEN(open64, (const char *path, int flags, ...), path, flags, mode)
OPEN(openat, (int folder, const char *path, int flags, ...), folder, path, flags, mode)
OPEN(openat64, (int folder, const char *path, int flags, ...), folder, path, flags, mode)
