"""Network namespaces with a path, as `ip netns` makes them: made, entered, removed (ip-netns(8), namespaces(7))."""

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import NetfixError, from_errno

_OURS = "/proc/thread-self/ns/net"
_CLONE_NEWNET = 0x40000000
_MS_BIND, _MNT_DETACH = 0x1000, 2
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1

_libc = ctypes.CDLL(None, use_errno=True)


class NoSuchNamespaceError(NetfixError):
    """There is no network namespace at that path."""

    code = "netfix.no-such-namespace"
    default_hint = "list the host's namespaces with `ip netns`"


class NamespaceExistsError(NetfixError):
    """Something is at that path already."""

    code = "netfix.namespace-exists"
    default_hint = "if nothing uses it: ip netns delete NAME"


class Home:
    """The network namespace of the thread that makes it, to come back to: for what is looked up or opened later.

    It keeps the namespace, as a socket in it does, until it is closed."""

    def __init__(self) -> None:
        self._home = Path(_OURS).open("rb")  # noqa: SIM115 - `close` closes it

    def fileno(self) -> int:
        """The file that stands for it (ioctl_ns(2))."""
        return self._home.fileno()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """As `entered`; a thread that is there already needs no capability for it."""
        with _in(self._home, "coming back to a namespace"):
            yield

    def close(self) -> None:
        """Let go of it; idempotent."""
        self._home.close()


@contextlib.contextmanager
def entered(path: Path) -> Iterator[None]:
    """This thread is in the namespace until the end of the block, in which nothing may be awaited that waits: a socket
    belongs for ever to the namespace it was made in. Raises NoSuchNamespaceError, NotPermittedError."""
    try:
        there = path.open("rb")
    except FileNotFoundError as error:
        raise NoSuchNamespaceError(f"there is no network namespace {path}") from error
    with there, _in(there, f"entering {path}"):
        yield


@contextlib.contextmanager
def _in(there: BinaryIO, doing: str) -> Iterator[None]:
    with Path(_OURS).open("rb") as home:
        if os.path.sameopenfile(home.fileno(), there.fileno()):
            yield
            return
        _call(doing, _libc.setns(there.fileno(), _CLONE_NEWNET))
        try:
            yield
        finally:
            _call("coming back from a namespace", _libc.setns(home.fileno(), _CLONE_NEWNET))


def create(path: Path) -> None:
    """Make a namespace whose loopback is up. Undo: `remove`. Raises NamespaceExistsError, NotPermittedError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.touch(mode=0o444, exist_ok=False)
    except FileExistsError as error:
        raise NamespaceExistsError(f"{path} is there already") from error
    home = os.open(_OURS, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _call("making a namespace", _libc.unshare(_CLONE_NEWNET))
        try:
            arguments = (_OURS.encode(), os.fsencode(path), None, ctypes.c_ulong(_MS_BIND), None)
            _call(f"mounting {path}", _libc.mount(*arguments))
            _loopback_up()
        finally:
            _call("coming back from a namespace", _libc.setns(home, _CLONE_NEWNET))
    except BaseException:
        remove(path)
        raise
    finally:
        os.close(home)


def remove(path: Path) -> None:
    """Take the path away; the kernel ends the namespace with the last process and socket in it. Idempotent."""
    if _libc.umount2(os.fsencode(path), _MNT_DETACH) != 0 and ctypes.get_errno() not in (errno.EINVAL, errno.ENOENT):
        raise from_errno(ctypes.get_errno(), f"unmounting {path}")
    path.unlink(missing_ok=True)


def same(path: Path, other: Path) -> bool:
    """Whether two paths name one namespace."""
    try:
        return path.stat().st_ino == other.stat().st_ino
    except FileNotFoundError:
        return False


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh22x", b"lo", 0)
        (flags,) = struct.unpack_from("h", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request), 16)
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", flags | _IFF_UP))


def _call(doing: str, status: int) -> None:
    if status != 0:
        raise from_errno(ctypes.get_errno(), doing)
