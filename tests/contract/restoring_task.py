"""Restores one shared object as CRIU's restore of a task does, for tests.

Run as ``python3 restoring_task.py NAME BYTES ADDRESS [IMAGE]``: when a line comes, makes a memfd, maps it to fill it,
opens the image, and goes on with a copy of the descriptor that it has opened anew, which it maps at the address
(criu/memfd.c, memfd_open_inode_nocache, memfd_open). Then prints how many descriptors it has, and obeys lines: ``read
OFFSET``, ``write OFFSET VALUE``. Without an image none is opened."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys

PROTECTION, FIXED = mmap.PROT_READ | mmap.PROT_WRITE, 0x10
SPARE = 3

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def main(name: str, length: str, at: str, image: str = "") -> None:
    """See the module."""
    size, address = int(length), int(at)
    spare = [os.open("/dev/null", os.O_RDONLY) for _ in range(SPARE)]
    sys.stdin.readline()
    descriptor = os.memfd_create(name, 0)
    os.ftruncate(descriptor, size)
    filling = libc.mmap(None, size, PROTECTION, mmap.MAP_SHARED, descriptor, 0)
    if image:
        with open(image, "rb") as file:  # noqa: PTH123
            file.read()
    libc.munmap(filling, size)
    anew = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
    os.close(descriptor)
    assert libc.mmap(address, size, PROTECTION, mmap.MAP_SHARED | FIXED, anew, 0) == address
    os.close(anew)
    assert [os.readlink(f"/proc/self/fd/{each}") for each in spare] == ["/dev/null"] * SPARE  # noqa: PTH115
    print(len(os.listdir("/proc/self/fd")) - 1, flush=True)  # noqa: PTH208
    memory = (ctypes.c_ubyte * size).from_address(address)
    for line in sys.stdin:
        word, offset, *value = line.split()
        if word == "write":
            memory[int(offset)] = int(value[0])
        print(memory[int(offset)], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
