/* Answers prlimit(2) about another process from /proc/PID/limits, which any root may read.
 *
 * CRIU asks for the limits of each process that it dumps, and the kernel answers about those of another uid only to who
 * has CAP_SYS_RESOURCE. The lab preloads this into CRIU where its machine has no such capability; see labs/limits.py.
 * Only reading is answered so. Made without any header, so that a compiler alone is enough to build it:
 *     cc -shared -fPIC -O2 -nostdlib -o limits.so limits.c
 */

typedef unsigned long size_type;
struct limit {
    unsigned long current, maximum;
};

extern int *__errno_location(void);
extern int open(const char *path, int flags, ...);
extern long read(int descriptor, void *buffer, size_type size);
extern int close(int descriptor);

#define NONE (~0UL)

#if defined(__x86_64__)
#define PRLIMIT64 302
static long ask_kernel(long number, long a, long b, long c, long d, long e, long f) {
    register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
    long done;
    __asm__ volatile("syscall"
                     : "=a"(done)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return done;
}
#elif defined(__aarch64__)
#define PRLIMIT64 261
static long ask_kernel(long number, long a, long b, long c, long d, long e, long f) {
    register long x8 __asm__("x8") = number, x0 __asm__("x0") = a, x1 __asm__("x1") = b, x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d, x4 __asm__("x4") = e, x5 __asm__("x5") = f;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
    return x0;
}
#else
#error "write ask_kernel for this machine"
#endif

/* The rows of the file, which the kernel prints in the order of the numbers (fs/proc/base.c, lnames). */
#define NAME_WIDTH 26

static char *number(char *at, unsigned long *value) {
    while (*at == ' ')
        at++;
    if (*at == 'u') { /* unlimited */
        *value = NONE;
        while (*at && *at != ' ')
            at++;
        return at;
    }
    for (*value = 0; *at >= '0' && *at <= '9'; at++)
        *value = *value * 10 + (unsigned long)(*at - '0');
    return at;
}

static int limits_from_file(int pid, int resource, struct limit *old) {
    char path[40], digits[12], text[4096], *at = path, *word = "/proc/";
    int count = 0, file;
    long size = 0, more;

    while (*word)
        *at++ = *word++;
    for (; pid; pid /= 10)
        digits[count++] = (char)('0' + pid % 10);
    while (count)
        *at++ = digits[--count];
    for (word = "/limits"; (*at++ = *word++);)
        ;
    file = open(path, 0);
    if (file < 0)
        return -1;
    while (size < (long)sizeof text - 1 && (more = read(file, text + size, sizeof text - 1 - (size_type)size)) > 0)
        size += more;
    close(file);
    text[size] = 0;
    at = text;
    for (count = 0; count <= resource; count++) { /* the heading is line 0 */
        while (*at && *at != '\n')
            at++;
        if (!*at++)
            return -1;
    }
    number(number(at + NAME_WIDTH, &old->current), &old->maximum);
    return 0;
}

/* What CRIU calls: syscall(2) itself, with the number of prlimit64. */
long syscall(long number, long a, long b, long c, long d, long e, long f) {
    long done = ask_kernel(number, a, b, c, d, e, f);

    if (number == PRLIMIT64 && done < 0 && a && !c && d)
        done = limits_from_file((int)a, (int)b, (struct limit *)d) ? done : 0;
    if (done < 0 && done > -4096) {
        *__errno_location() = (int)-done;
        return -1;
    }
    return done;
}

int prlimit64(int pid, int resource, const struct limit *new, struct limit *old) {
    return (int)syscall(PRLIMIT64, pid, resource, (long)new, (long)old, 0, 0);
}
