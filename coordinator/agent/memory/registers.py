"""What a system call looks like in the registers of each machine (pure): build one, read its result, repair its end.

Layouts: ``struct user_regs_struct`` of arch/x86/include/asm/user_64.h and ``struct user_pt_regs`` of
arch/arm64/include/uapi/asm/ptrace.h, as PTRACE_GETREGSET(NT_PRSTATUS) gives them. Numbers: the syscall tables of the
two machines (arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

EINTR = 4
#: Kernel-internal: start the call again unless a signal handler ran, then EINTR (include/linux/errno.h).
ERESTARTNOHAND = 514
#: Kernel-internal: go on with what is left of the sleep.
ERESTART_RESTARTBLOCK = 516

_MASK = (1 << 64) - 1


class Machine(Protocol):
    """A processor architecture's system calls."""

    @property
    def register_bytes(self) -> int:
        """Length of the NT_PRSTATUS register set."""
        ...

    @property
    def instruction(self) -> bytes:
        """The instruction that makes a system call."""
        ...

    @property
    def alignment(self) -> int:
        """Where an instruction may begin: multiples of this."""
        ...

    @property
    def userfaultfd(self) -> int:
        """Number of userfaultfd(2)."""
        ...

    @property
    def close(self) -> int:
        """Number of close(2)."""
        ...

    @property
    def mmap(self) -> int:
        """Number of mmap(2)."""
        ...

    @property
    def munmap(self) -> int:
        """Number of munmap(2)."""
        ...

    def call(self, registers: bytes, address: int, number: int, arguments: Sequence[int]) -> bytes:
        """Registers with which the instruction at ``address`` makes the call; the others as given."""
        ...

    def result(self, registers: bytes) -> int:
        """What the call returned; negative: an errno."""
        ...

    def instruction_pointer(self, registers: bytes) -> int:
        """Address of the next instruction."""
        ...

    def in_call(self, registers: bytes) -> bool:
        """Whether the thread was stopped inside a system call, as far as the registers tell."""
        ...

    def resumable(self, registers: bytes) -> bytes:
        """The registers to put back at the end: as found, but a call that our stop ended with EINTR begins again."""
        ...

    def end_sleep(self, registers: bytes) -> bytes | None:
        """Registers with which a sleep (nanosleep, clock_nanosleep) that our stop has interrupted returns EINTR, rather
        than go on; ``None`` if the thread was stopped elsewhere."""
        ...


def signed(value: int) -> int:
    """A 64-bit register as a signed number."""
    return value - (1 << 64) if value >> 63 else value


@dataclass(frozen=True, slots=True)
class X86Machine:
    """x86-64."""

    register_bytes: int = 27 * 8
    instruction: bytes = b"\x0f\x05"
    alignment: int = 1
    userfaultfd: int = 323
    close: int = 3
    mmap: int = 9
    munmap: int = 11

    # Indices into user_regs_struct, in 64-bit words.
    _R10, _R9, _R8, _RAX, _RDX, _RSI, _RDI, _ORIG_RAX, _RIP = 7, 8, 9, 10, 12, 13, 14, 15, 16

    def call(self, registers: bytes, address: int, number: int, arguments: Sequence[int]) -> bytes:
        """See ``Machine``. orig_rax is -1: the kernel must not take this for an interrupted call (arch/x86/kernel/
        signal.c, arch_do_signal_or_restart)."""
        words = list(struct.unpack("<27Q", registers))
        slots = (self._RDI, self._RSI, self._RDX, self._R10, self._R8, self._R9)
        for slot, argument in zip(slots, arguments, strict=False):
            words[slot] = argument & _MASK
        words[self._RAX], words[self._RIP], words[self._ORIG_RAX] = number, address, _MASK
        return struct.pack("<27Q", *words)

    def result(self, registers: bytes) -> int:
        """See ``Machine``."""
        return signed(struct.unpack("<27Q", registers)[self._RAX])

    def instruction_pointer(self, registers: bytes) -> int:
        """See ``Machine``."""
        return int(struct.unpack("<27Q", registers)[self._RIP])

    def in_call(self, registers: bytes) -> bool:
        """See ``Machine``."""
        return signed(struct.unpack("<27Q", registers)[self._ORIG_RAX]) >= 0

    #: Calls that the kernel ends with EINTR for any stop, also where no handler runs (signal(7), "Interruption of
    #: system calls and library functions by stop signals"). They had done nothing yet, so they can begin again: reads,
    #: sends and connections of sockets with a timeout, semop, sigtimedwait, io_getevents, the epoll_waits.
    #: (A timeout then begins again, too: it ends late at most by what had passed.)
    _ENDED_BY_STOPS = frozenset((0, 19, 42, 43, 44, 45, 46, 47, 65, 128, 208, 220, 232, 281, 288, 299, 333, 441))

    def resumable(self, registers: bytes) -> bytes:
        """See ``Machine``. As -ERESTARTNOHAND the kernel itself decides: a handler that is due still sees EINTR."""
        words = list(struct.unpack("<27Q", registers))
        if signed(words[self._RAX]) == -EINTR and signed(words[self._ORIG_RAX]) in self._ENDED_BY_STOPS:
            words[self._RAX] = -ERESTARTNOHAND & _MASK
        return struct.pack("<27Q", *words)

    _SLEEPS = frozenset((35, 230))

    def end_sleep(self, registers: bytes) -> bytes | None:
        """See ``Machine``."""
        words = list(struct.unpack("<27Q", registers))
        if words[self._ORIG_RAX] not in self._SLEEPS or signed(words[self._RAX]) != -ERESTART_RESTARTBLOCK:
            return None
        words[self._RAX], words[self._ORIG_RAX] = -EINTR & _MASK, _MASK
        return struct.pack("<27Q", *words)


@dataclass(frozen=True, slots=True)
class Arm64Machine:
    """arm64, written from the kernel's sources and not run yet.

    Here the kernel prepares the restart of an interrupted call *before* it stops (arch/arm64/kernel/signal.c,
    do_signal): pc is back on the instruction and x0 is the first argument again, so that putting the registers back
    repeats the call. Not exact: a nanosleep, poll or futex with a timeout sleeps its whole time again, because the
    restart block is used only in that same stop, and a call of the EINTR kind (epoll_wait) sees EINTR, because orig_x0
    cannot be read. So a thread in another call is preferred."""

    register_bytes: int = 34 * 8
    instruction: bytes = b"\x01\x00\x00\xd4"  # svc #0
    alignment: int = 4
    userfaultfd: int = 282
    close: int = 57
    mmap: int = 222
    munmap: int = 215

    _X8, _PC = 8, 32

    def call(self, registers: bytes, address: int, number: int, arguments: Sequence[int]) -> bytes:
        """See ``Machine``."""
        words = list(struct.unpack("<34Q", registers))
        for slot, argument in enumerate(arguments[:6]):
            words[slot] = argument & _MASK
        words[self._X8], words[self._PC] = number, address
        return struct.pack("<34Q", *words)

    def result(self, registers: bytes) -> int:
        """See ``Machine``."""
        return signed(struct.unpack("<34Q", registers)[0])

    def instruction_pointer(self, registers: bytes) -> int:
        """See ``Machine``."""
        return int(struct.unpack("<34Q", registers)[self._PC])

    def in_call(self, registers: bytes) -> bool:
        """Cannot be told from the registers: the kernel has forgotten the call by then."""
        return False

    def resumable(self, registers: bytes) -> bytes:
        """As found."""
        return registers

    _SLEEPS = frozenset((101, 115))

    def end_sleep(self, registers: bytes) -> bytes | None:
        """See ``Machine``. The kernel has put pc back on the instruction, for the call to be repeated."""
        words = list(struct.unpack("<34Q", registers))
        if words[self._X8] not in self._SLEEPS:
            return None
        words[0], words[self._PC] = -EINTR & _MASK, words[self._PC] + len(self.instruction)
        return struct.pack("<34Q", *words)


def this_machine(name: str | None = None) -> Machine | None:
    """The machine of this host (``uname -m``), or ``None`` if system calls cannot be injected on it."""
    match name or os.uname().machine:
        case "x86_64":
            return X86Machine()
        case "aarch64":
            return Arm64Machine()
        case _:
            return None
