/* Fail or kill a process at the n-th of its calls that touch a folder: LD_PRELOAD this, compiled as a shared library.
 *
 * FAULT_FOLDER  the folder, absolute; calls for other files aren't counted
 * FAULT_PARENT  only children of the process with this id act, and not what they start in turn
 * FAULT_LOG     a file outside of the folder that gets a line "number call path" for each call, with tabs; a rename's also
 *               has the old path, and a flush's the file's size
 * FAULT_BACKUP  a folder on the same disk that gets a link, by the call's number, to each file that a call unlinks or a
 *               rename replaces
 * FAULT_AT      the number of the call to act at, from 1; unset: none
 * FAULT_ERROR   the errno that the call returns; unset: the process is killed before the call
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static atomic_int calls;

/* Return whether this call must fail, with errno set; `detail` goes into the log. */
static int fails_with(const char *call, const char *path, const char *detail) {
    const char *folder = getenv("FAULT_FOLDER");
    if (!folder || !path || strncmp(path, folder, strlen(folder))) return 0;
    const char *parent = getenv("FAULT_PARENT");
    if (parent && atoi(parent) != getppid()) return 0;
    int number = atomic_fetch_add(&calls, 1) + 1;
    const char *log = getenv("FAULT_LOG"), *at = getenv("FAULT_AT"), *error = getenv("FAULT_ERROR");
    if (log) {
        char line[2 * PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%d\t%s\t%s\t%s\n", number, call, path + strlen(folder), detail);
        int file = syscall(SYS_open, log, O_WRONLY | O_CREAT | O_APPEND, 0644);
        syscall(SYS_write, file, line, length);
        syscall(SYS_close, file);
    }
    const char *backup = getenv("FAULT_BACKUP");
    if (backup && (!strncmp(call, "unlink", 6) || !strcmp(call, "rename"))) {
        char kept[PATH_MAX];
        snprintf(kept, sizeof kept, "%s/%d", backup, number);
        syscall(SYS_link, path, kept);
    }
    if (!at || number != atoi(at)) return 0;
    if (!error) kill(getpid(), SIGKILL);
    errno = atoi(error);
    return 1;
}

static int fails(const char *call, const char *path) { return fails_with(call, path, ""); }

static const char *absolute(const char *path, char *buffer) {
    if (!path || path[0] == '/') return path;
    if (!getcwd(buffer, PATH_MAX)) return path;
    strncat(buffer, "/", PATH_MAX - strlen(buffer) - 1);
    strncat(buffer, path, PATH_MAX - strlen(buffer) - 1);
    return buffer;
}

static const char *of_descriptor(int descriptor, char *buffer) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = syscall(SYS_readlink, link, buffer, PATH_MAX - 1);
    buffer[length < 0 ? 0 : length] = 0;
    return buffer;
}

static const char *below(int descriptor, const char *path, char *buffer) {
    if (!path || path[0] == '/' || descriptor == AT_FDCWD) return absolute(path, buffer);
    of_descriptor(descriptor, buffer);
    strncat(buffer, "/", PATH_MAX - strlen(buffer) - 1);
    strncat(buffer, path, PATH_MAX - strlen(buffer) - 1);
    return buffer;
}

static int flush_fails(const char *call, int file) {
    char path[PATH_MAX], size[32] = "";
    struct stat found;
    if (!fstat(file, &found)) snprintf(size, sizeof size, "%lld", (long long)found.st_size);
    return fails_with(call, of_descriptor(file, path), size);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define ON_PATH(result, failure, name, parameters, path, arguments)                            \
    result name parameters {                                                                   \
        char buffer[PATH_MAX];                                                                 \
        return fails(#name, absolute(path, buffer)) ? failure : REAL(name) arguments;          \
    }
#define ON_FILE(result, name, parameters, file, arguments)                                     \
    result name parameters {                                                                   \
        char buffer[PATH_MAX];                                                                 \
        return fails(#name, of_descriptor(file, buffer)) ? -1 : REAL(name) arguments;          \
    }
#define OPEN(name)                                                                             \
    int name(const char *path, int flags, ...) {                                               \
        va_list rest;                                                                          \
        va_start(rest, flags);                                                                 \
        mode_t mode = va_arg(rest, mode_t);                                                    \
        va_end(rest);                                                                          \
        char buffer[PATH_MAX];                                                                 \
        return fails(#name, absolute(path, buffer)) ? -1 : REAL(name)(path, flags, mode);      \
    }
#define OPENAT(name)                                                                           \
    int name(int folder, const char *path, int flags, ...) {                                   \
        va_list rest;                                                                          \
        va_start(rest, flags);                                                                 \
        mode_t mode = va_arg(rest, mode_t);                                                    \
        va_end(rest);                                                                          \
        char buffer[PATH_MAX];                                                                 \
        return fails(#name, below(folder, path, buffer)) ? -1 : REAL(name)(folder, path, flags, mode); \
    }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
ON_FILE(ssize_t, write, (int file, const void *data, size_t size), file, (file, data, size))
ON_FILE(ssize_t, pwrite64, (int file, const void *data, size_t size, off64_t at), file, (file, data, size, at))
ON_FILE(int, ftruncate64, (int file, off64_t size), file, (file, size))
ON_PATH(int, -1, truncate64, (const char *path, off64_t size), path, (path, size))
ON_PATH(int, -1, mkdir, (const char *path, mode_t mode), path, (path, mode))
ON_PATH(int, -1, rmdir, (const char *path), path, (path))
ON_PATH(int, -1, unlink, (const char *path), path, (path))
ON_PATH(DIR *, NULL, opendir, (const char *path), path, (path))

int fsync(int file) { return flush_fails("fsync", file) ? -1 : REAL(fsync)(file); }
int fdatasync(int file) { return flush_fails("fdatasync", file) ? -1 : REAL(fdatasync)(file); }

int rename(const char *from, const char *to) {
    char old[PATH_MAX], new[PATH_MAX];
    const char *folder = getenv("FAULT_FOLDER"), *path = absolute(from, old);
    int below_folder = folder && !strncmp(path, folder, strlen(folder));
    return fails_with("rename", absolute(to, new), below_folder ? path + strlen(folder) : "") ? -1 : REAL(rename)(from, to);
}

int unlinkat(int folder, const char *path, int flags) {
    char buffer[PATH_MAX];
    return fails("unlinkat", below(folder, path, buffer)) ? -1 : REAL(unlinkat)(folder, path, flags);
}
