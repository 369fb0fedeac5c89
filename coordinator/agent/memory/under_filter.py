"""Becomes a command under a seccomp filter, and hands the filter's listener to whoever started it.

A filter is set by a process for itself, between fork and exec, and nothing of that can be done in a process with
threads (see ``subprocess``, preexec_fn): so this is a program of its own. It knows nothing of the filter but its bytes.
Run as ``python3 -I -S under_filter.py SOCKET PROGRAM COMMAND…``: the number of a Unix stream socket, struct sock_filter
instructions in hexadecimal, and the command. Over the socket goes one message: with the listener's descriptor, or,
where the kernel takes no filter, with the reason alone; the command runs in either case.

Privileges are left as they are: PR_SET_NO_NEW_PRIVS would bind the command too, and root needs it not (seccomp(2)).
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys

#: include/uapi/linux/seccomp.h. With the second flag a signal does not interrupt a call that is being answered.
_SET_MODE_FILTER, _NEW_LISTENER, _WAIT_KILLABLE_RECV = 1, 1 << 3, 1 << 5

#: Number of seccomp(2): arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h.
_SECCOMP = {"x86_64": 317, "aarch64": 277}

_INSTRUCTION_BYTES = 8


class _Program(ctypes.Structure):
    """struct sock_fprog (include/uapi/linux/filter.h)."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def install(program: bytes) -> int:
    """Put this process and all its children to come under the filter; return the listener. Raises ``OSError``."""
    libc = ctypes.CDLL(None, use_errno=True)
    argument = _Program(len(program) // _INSTRUCTION_BYTES, program)
    flags = _NEW_LISTENER | _WAIT_KILLABLE_RECV
    number = _SECCOMP.get(os.uname().machine, -1)
    listener = int(libc.syscall(number, _SET_MODE_FILTER, flags, ctypes.byref(argument)))
    if listener < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return listener


def main(descriptor: int, program: bytes, argv: list[str]) -> int:
    """See the module; returns only if the command cannot be started."""
    with socket.socket(fileno=descriptor) as parent:
        try:
            listener = install(program)
        except OSError as error:
            parent.sendall((error.strerror or str(error)).encode())
        else:
            socket.send_fds(parent, [b"filtered"], [listener])
            os.close(listener)
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python, at its start
        signal.signal(ignored, signal.SIG_DFL)
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        print(f"Error: {argv[0]}: {error.strerror}", flush=True)  # noqa: T201 - its output
        return 127


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), bytes.fromhex(sys.argv[2]), sys.argv[3:]))
