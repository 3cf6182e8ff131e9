/* What a network file system does otherwise, as nfs(5) and flock(2) describe it, put
   between a program and a local one: a lock is a range of bytes, so that a shared one
   needs a file opened for reading and an exclusive one a file opened for writing; and
   a file that is removed while it is open stays, under another name, until it is closed.
   Each lock adds a byte to the file that SHARED_FILE_SYSTEM_LOG names. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

static int (*real_close)(int);
static int (*real_unlinkat)(int, const char *, int);

__attribute__((constructor)) static void find(void) {
    real_close = (int (*)(int))dlsym(RTLD_NEXT, "close");
    real_unlinkat = (int (*)(int, const char *, int))dlsym(RTLD_NEXT, "unlinkat");
}

int flock(int file, int how) {
    const char *log = getenv("SHARED_FILE_SYSTEM_LOG");
    if (log) {
        int out = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
        if (out >= 0) {
            (void)!write(out, "x", 1);
            real_close(out);
        }
    }
    struct flock range = {.l_whence = SEEK_SET};
    switch (how & ~LOCK_NB) {
    case LOCK_SH: range.l_type = F_RDLCK; break;
    case LOCK_EX: range.l_type = F_WRLCK; break;
    default: range.l_type = F_UNLCK;
    }
    int outcome = fcntl(file, how & LOCK_NB ? F_OFD_SETLK : F_OFD_SETLKW, &range);
    if (outcome < 0 && errno == EACCES)
        errno = EWOULDBLOCK;
    return outcome;
}

/* The name that a file that is open has after its removal. */
static int hidden_name(const struct stat *facts, char *name, size_t size) {
    return snprintf(name, size, ".nfs%lu", (unsigned long)facts->st_ino) < (int)size;
}

static int is_open_here(const struct stat *facts) {
    DIR *all = opendir("/proc/self/fd");
    int open_here = 0;
    for (struct dirent *entry; all && !open_here && (entry = readdir(all));) {
        struct stat other;
        int file = atoi(entry->d_name);
        open_here = entry->d_name[0] != '.' && file != dirfd(all) && fstat(file, &other) == 0 &&
                    other.st_ino == facts->st_ino && other.st_dev == facts->st_dev;
    }
    if (all)
        closedir(all);
    return open_here;
}

int unlinkat(int folder, const char *path, int flags) {
    struct stat facts;
    char hidden[PATH_MAX], name[64];
    const char *slash = strrchr(path, '/');
    int length = slash ? (int)(slash - path) + 1 : 0;
    if (flags == 0 && fstatat(folder, path, &facts, AT_SYMLINK_NOFOLLOW) == 0 && S_ISREG(facts.st_mode) &&
        hidden_name(&facts, name, sizeof name) && is_open_here(&facts)) {
        if (strstr(path, ".nfs")) {
            errno = EBUSY;
            return -1;
        }
        snprintf(hidden, sizeof hidden, "%.*s%s", length, path, name);
        return renameat(folder, path, folder, hidden);
    }
    return real_unlinkat(folder, path, flags);
}

int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }

int close(int file) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    int outcome = real_close(file);
    if (length > 0) {
        path[length] = 0;
        if (strstr(path, "/.nfs"))
            real_unlinkat(AT_FDCWD, path, 0);
    }
    return outcome;
}
