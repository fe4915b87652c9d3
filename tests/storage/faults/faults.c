/* Counts the calls that change or sync what is on the disk, and makes one of them fail, or the process end there.
 * Loaded before libc (LD_PRELOAD). One call passes it by: the rename inside of safetensors, which asks the kernel
 * itself; it stands between two that are counted. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static long at = -1, count = 0;
static int what = 0; /* 0: nothing fails; below: the process ends; else the errno of that call */
static char names[1 << 16];
void faults_arm(long at_, int what_) { at = at_; what = what_; count = 0; names[0] = 0; }
long faults_count(void) { return count; }
const char *faults_names(void) { return names; }
static int hit(const char *name) {
    if (at < 0) return 0;
    count++;
    if (strlen(names) + strlen(name) + 2 < sizeof names) { strcat(names, name); strcat(names, " "); }
    if (count != at) return 0;
    if (what < 0) _exit(9);
    errno = what;
    return what != 0;
}
#define REAL(type, name) static type (*real)() = 0; if (!real) real = (type (*)())dlsym(RTLD_NEXT, name)
#define MODE(flags) mode_t mode = 0; if ((flags) & O_CREAT) { va_list l; va_start(l, flags); mode = va_arg(l, mode_t); va_end(l); }
int open(const char *p, int flags, ...) { MODE(flags) REAL(int, "open"); if ((flags & (O_WRONLY | O_RDWR)) && hit("open")) return -1; return real(p, flags, mode); }
int open64(const char *p, int flags, ...) { MODE(flags) REAL(int, "open64"); if ((flags & (O_WRONLY | O_RDWR)) && hit("open")) return -1; return real(p, flags, mode); }
int openat(int d, const char *p, int flags, ...) { MODE(flags) REAL(int, "openat"); if ((flags & (O_WRONLY | O_RDWR)) && hit("open")) return -1; return real(d, p, flags, mode); }
int openat64(int d, const char *p, int flags, ...) { MODE(flags) REAL(int, "openat64"); if ((flags & (O_WRONLY | O_RDWR)) && hit("open")) return -1; return real(d, p, flags, mode); }
ssize_t write(int fd, const void *b, size_t n) { REAL(ssize_t, "write"); if (fd > 2 && hit("write")) { if (what == ENOSPC && n > 1) { real(fd, b, n / 2); errno = what; } return -1; } return real(fd, b, n); }
ssize_t pwrite64(int fd, const void *b, size_t n, off_t o) { REAL(ssize_t, "pwrite64"); if (hit("write")) return -1; return real(fd, b, n, o); }
struct iovec;
ssize_t writev(int fd, const struct iovec *v, int n) { REAL(ssize_t, "writev"); if (fd > 2 && hit("write")) return -1; return real(fd, v, n); }
int fsync(int fd) { REAL(int, "fsync"); if (hit("fsync")) return -1; return real(fd); }
int fdatasync(int fd) { REAL(int, "fdatasync"); if (hit("fsync")) return -1; return real(fd); }
int ftruncate(int fd, off_t n) { REAL(int, "ftruncate"); if (hit("truncate")) return -1; return real(fd, n); }
int ftruncate64(int fd, off_t n) { REAL(int, "ftruncate64"); if (hit("truncate")) return -1; return real(fd, n); }
int truncate64(const char *p, off_t n) { REAL(int, "truncate64"); if (hit("truncate")) return -1; return real(p, n); }
int posix_fallocate(int fd, off_t a, off_t n) { REAL(int, "posix_fallocate"); if (hit("fallocate")) return what; return real(fd, a, n); }
int posix_fallocate64(int fd, off_t a, off_t n) { REAL(int, "posix_fallocate64"); if (hit("fallocate")) return what; return real(fd, a, n); }
int rename(const char *a, const char *b) { REAL(int, "rename"); if (hit("rename")) return -1; return real(a, b); }
int renameat(int c, const char *a, int d, const char *b) { REAL(int, "renameat"); if (hit("rename")) return -1; return real(c, a, d, b); }
int mkdir(const char *p, mode_t m) { REAL(int, "mkdir"); if (hit("mkdir")) return -1; return real(p, m); }
int unlink(const char *p) { REAL(int, "unlink"); if (hit("unlink")) return -1; return real(p); }
int unlinkat(int d, const char *p, int f) { REAL(int, "unlinkat"); if (hit(f & AT_REMOVEDIR ? "rmdir" : "unlink")) return -1; return real(d, p, f); }
int rmdir(const char *p) { REAL(int, "rmdir"); if (hit("rmdir")) return -1; return real(p); }
int chmod(const char *p, mode_t m) { REAL(int, "chmod"); if (hit("chmod")) return -1; return real(p, m); }
int fchmodat(int d, const char *p, mode_t m, int f) { REAL(int, "fchmodat"); if (hit("chmod")) return -1; return real(d, p, m, f); }
ssize_t sendfile64(int o, int i, off_t *f, size_t n) { REAL(ssize_t, "sendfile64"); if (hit("sendfile")) return -1; return real(o, i, f, n); }
ssize_t copy_file_range(int i, off_t *a, int o, off_t *b, size_t n, unsigned f) { REAL(ssize_t, "copy_file_range"); if (hit("sendfile")) return -1; return real(i, a, o, b, n, f); }
