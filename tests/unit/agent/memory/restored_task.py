"""A task with missing memory, as CRIU's restore leaves one: run by test_filling, talked to over its standard streams.

Arguments: the socket of the filler, then for each mapping ADDRESS:PAGES. It maps them, registers them with userfaultfd,
says so to the filler as CRIU does, and then does what it is told, a line each, answering with a line.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import socket
import struct
import sys

P = mmap.PAGESIZE
PID = 7
_UFFDIO_API, _UFFDIO_REGISTER, _SYSCALL = 0xC018AA3F, 0xC020AA00, 323
_EVENTS = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6  # fork, remap, remove, unmap
_FIXED_PRIVATE_ANONYMOUS = 0x10 | 0x02 | 0x20

libc = ctypes.CDLL(None, use_errno=True)
for function in (libc.mmap, libc.mremap):
    function.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def main() -> None:
    name, *mappings = sys.argv[1:]
    descriptor = libc.syscall(_SYSCALL, os.O_CLOEXEC | os.O_NONBLOCK)
    assert descriptor >= 0, os.strerror(ctypes.get_errno())
    fcntl.ioctl(descriptor, _UFFDIO_API, struct.pack("=QQQ", 0xAA, _EVENTS, 0))
    restore = socket.socket(socket.AF_UNIX)
    restore.connect(name)
    restore.send(struct.pack("=i", PID))
    socket.send_fds(restore, [b"\0"], [descriptor])
    for mapping in mappings:
        start, pages = (int(number) for number in mapping.split(":"))
        assert libc.mmap(start, pages * P, 3, _FIXED_PRIVATE_ANONYMOUS, -1, 0) == start
        fcntl.ioctl(descriptor, _UFFDIO_REGISTER, struct.pack("=QQQQ", start, pages * P, 1, 0))
    os.close(descriptor)
    say("restored")
    for line in sys.stdin:
        word, *numbers = line.split()
        say(do(restore, word, [int(number) for number in numbers]))


def say(text: str) -> None:
    print(text, flush=True)


def do(restore: socket.socket, word: str, numbers: list[int]) -> str:
    if word == "finish":
        restore.send(struct.pack("=I", 0x52535446))
        restore.close()
        return "finished"
    if word == "read":  # address, pages: the first byte of each
        return " ".join(str(ctypes.string_at(numbers[0] + page * P, 1)[0]) for page in range(numbers[1]))
    if word == "drop":
        return str(libc.madvise(numbers[0], numbers[1] * P, mmap.MADV_DONTNEED))
    if word == "unmap":
        return str(libc.munmap(numbers[0], numbers[1] * P))
    if word == "move":  # from, to, pages, and how often: there, and back, and there…
        here, there, pages, times = numbers
        for _ in range(times):
            assert libc.mremap(here, pages * P, pages * P, 1 | 2, there) == there
            here, there = there, here
        return str(here)
    assert word == "fork"  # a child reads
    reading, writing = os.pipe()
    if not (child := os.fork()):
        os.write(writing, do(restore, "read", numbers).encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as answer:
        return answer.read()


if __name__ == "__main__":
    main()
