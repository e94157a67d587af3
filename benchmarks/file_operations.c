/* Preloaded into a process (LD_PRELOAD): records its file operations below one directory, kills it
 * at one of them, or lets the disk be full during some. Built and used by crash_states.py.
 *
 * An operation is whatever changes a file system's state, or makes a change durable: creating,
 * writing, truncating, renaming, unlinking, making a directory, fsync.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MAX_FD = 1024 };
static char root[PATH_MAX];          /* empty: nothing is watched */
static int trace = -1;               /* descriptor that operations are recorded in */
static long operations, kill_at, full_from, full_until;
static char *path_of[MAX_FD];        /* of descriptors below the root */
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

void watch_files(const char *directory, int trace_descriptor, long kill, long from, long until)
{
    snprintf(root, sizeof root, "%s", directory);
    trace = trace_descriptor;
    operations = 0;
    kill_at = kill;
    full_from = from;
    full_until = until;
}

static int is_watched(const char *path, char *absolute)
{
    char directory[PATH_MAX];
    if (!root[0] || !path)
        return 0;
    if (path[0] == '/')
        snprintf(absolute, PATH_MAX, "%s", path);
    else if (getcwd(directory, sizeof directory))
        snprintf(absolute, PATH_MAX, "%.2000s/%.2000s", directory, path);
    else
        return 0;
    size_t length = strlen(root);
    return strncmp(absolute, root, length) == 0 && (absolute[length] == '/' || !absolute[length]);
}

static void record(const void *bytes, size_t count)
{
    if (trace >= 0 && REAL(write)(trace, bytes, count) != (ssize_t)count)
        abort();
}

static void record_line(const char *format, ...)
{
    char line[3 * PATH_MAX];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    record(line, length);
}

/* Count an operation, with the mutex held. Returns whether it needs space that is not there. */
static int is_refused(int needs_space)
{
    operations++;
    if (operations == kill_at)
        raise(SIGKILL);
    return needs_space && operations >= full_from && operations < full_until;
}

static int opened(int (*open_it)(const char *, int, ...), const char *path, int flags, mode_t mode)
{
    char absolute[PATH_MAX];
    struct stat status;
    if (!is_watched(path, absolute))
        return open_it(path, flags, mode);
    pthread_mutex_lock(&mutex);
    int exists = lstat(absolute, &status) == 0;
    int creates = (flags & O_CREAT) && !exists, truncates = (flags & O_TRUNC) && exists;
    int descriptor = -1;
    if ((creates || truncates) && is_refused(creates))
        errno = ENOSPC;
    else
        descriptor = open_it(path, flags, mode);
    int error = errno;
    if (descriptor >= 0 && descriptor < MAX_FD) {
        free(path_of[descriptor]);
        path_of[descriptor] = strdup(absolute);
        if (creates || truncates)
            record_line("%s\t%s\n", creates ? "create" : "truncate\t0", absolute);
    }
    pthread_mutex_unlock(&mutex);
    errno = error;
    return descriptor;
}

#define OPEN(name)                                                                                 \
    int name(const char *path, int flags, ...)                                                     \
    {                                                                                              \
        va_list arguments;                                                                         \
        va_start(arguments, flags);                                                                \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(arguments, mode_t) : 0;               \
        va_end(arguments);                                                                         \
        return opened(REAL(name), path, flags, mode);                                              \
    }
OPEN(open)
OPEN(open64)

int close(int descriptor)
{
    if (descriptor >= 0 && descriptor < MAX_FD && path_of[descriptor]) {
        pthread_mutex_lock(&mutex);
        free(path_of[descriptor]);
        path_of[descriptor] = NULL;
        pthread_mutex_unlock(&mutex);
    }
    return REAL(close)(descriptor);
}

static const char *watched(int descriptor)
{
    return root[0] && descriptor >= 0 && descriptor < MAX_FD ? path_of[descriptor] : NULL;
}

/* Write at `offset`. A kill or a full disk comes in the middle of every second write. */
static ssize_t written(int descriptor, const void *bytes, size_t count, off_t offset)
{
    pthread_mutex_lock(&mutex);
    size_t part = operations % 2 ? count : count / 2;
    ssize_t done = -1;
    if (operations + 1 == kill_at && part < count)
        REAL(pwrite)(descriptor, bytes, part, offset);
    if (!is_refused(1))
        done = REAL(pwrite)(descriptor, bytes, count, offset);
    else if (part < count && part > 0)
        done = REAL(pwrite)(descriptor, bytes, part, offset);
    else
        errno = ENOSPC;
    int error = errno;
    if (done > 0) {
        record_line("write\t%s\t%ld\t%ld\n", path_of[descriptor], (long)offset, (long)done);
        record(bytes, done);
    }
    pthread_mutex_unlock(&mutex);
    errno = error;
    return done;
}

ssize_t write(int descriptor, const void *bytes, size_t count)
{
    if (!watched(descriptor))
        return REAL(write)(descriptor, bytes, count);
    int appends = fcntl(descriptor, F_GETFL) & O_APPEND;
    ssize_t done = written(descriptor, bytes, count, lseek(descriptor, 0, appends ? SEEK_END : SEEK_CUR));
    if (done > 0 && !appends)
        lseek(descriptor, done, SEEK_CUR);
    return done;
}

#define PWRITE(name)                                                                               \
    ssize_t name(int descriptor, const void *bytes, size_t count, off_t offset)                    \
    {                                                                                              \
        return watched(descriptor) ? written(descriptor, bytes, count, offset)                     \
                                   : REAL(name)(descriptor, bytes, count, offset);                 \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

#define ON_DESCRIPTOR(name, call, ...)                                                       \
    {                                                                                              \
        if (!watched(descriptor))                                                                  \
            return REAL(name) call;                                                                \
        pthread_mutex_lock(&mutex);                                                                \
        is_refused(0);                                                                             \
        int result = REAL(name) call;                                                              \
        int error = errno;                                                                         \
        if (result == 0)                                                                           \
            record_line(__VA_ARGS__, path_of[descriptor]);                                         \
        pthread_mutex_unlock(&mutex);                                                              \
        errno = error;                                                                             \
        return result;                                                                             \
    }
int fsync(int descriptor) ON_DESCRIPTOR(fsync, (descriptor), "sync\t%s\n")
int fdatasync(int descriptor) ON_DESCRIPTOR(fdatasync, (descriptor), "sync\t%s\n")
int ftruncate(int descriptor, off_t size)
    ON_DESCRIPTOR(ftruncate, (descriptor, size), "truncate\t%ld\t%s\n", (long)size)
int ftruncate64(int descriptor, off_t size)
    ON_DESCRIPTOR(ftruncate64, (descriptor, size), "truncate\t%ld\t%s\n", (long)size)

int rename(const char *from, const char *to)
{
    char old[PATH_MAX], new[PATH_MAX];
    if (!is_watched(from, old) || !is_watched(to, new))
        return REAL(rename)(from, to);
    pthread_mutex_lock(&mutex);
    is_refused(0);
    int result = REAL(rename)(from, to), error = errno;
    if (result == 0)
        record_line("rename\t%s\t%s\n", old, new);
    pthread_mutex_unlock(&mutex);
    errno = error;
    return result;
}

int unlink(const char *path)
{
    char absolute[PATH_MAX];
    if (!is_watched(path, absolute))
        return REAL(unlink)(path);
    pthread_mutex_lock(&mutex);
    is_refused(0);
    int result = REAL(unlink)(path), error = errno;
    if (result == 0)
        record_line("unlink\t%s\n", absolute);
    pthread_mutex_unlock(&mutex);
    errno = error;
    return result;
}

int mkdir(const char *path, mode_t mode)
{
    char absolute[PATH_MAX];
    if (!is_watched(path, absolute))
        return REAL(mkdir)(path, mode);
    pthread_mutex_lock(&mutex);
    int result = -1, error = ENOSPC;
    if (!is_refused(1)) {
        result = REAL(mkdir)(path, mode);
        error = errno;
    }
    if (result == 0)
        record_line("mkdir\t%s\n", absolute);
    pthread_mutex_unlock(&mutex);
    errno = error;
    return result;
}
