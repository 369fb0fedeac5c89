"""The errors of netfix: each carries a stable code, an exit status and a hint.

Errors of others (`OSError`, error codes in netlink answers) are mapped where they come in, by `from_errno`; what
leaves netfix is always a `NetfixError`.
"""

import errno
import os
from typing import ClassVar

USAGE = 2
"""Exit status: the command was given something it cannot understand."""
REFUSED = 3
"""Exit status: understood, and refused (by netfix or by the kernel); nothing was changed."""


class NetfixError(Exception):
    """Something netfix could not or would not do: `str(error)` says what, `hint` says what to do about it."""

    code: ClassVar[str] = "netfix.failed"
    exit_status: ClassVar[int] = REFUSED
    default_hint: ClassVar[str] = ""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.default_hint


class UsageError(NetfixError):
    """A value handed in is not what it must be."""

    code = "netfix.usage"
    exit_status = USAGE


class InvalidAddressError(UsageError):
    """Text that is no IP address (with its prefix length, where one is wanted)."""

    code = "netfix.address-invalid"
    default_hint = "write an IPv4 or IPv6 address, e.g. 192.0.2.10/24 or 2001:db8::10/64"


class NoSuchInterfaceError(NetfixError):
    """The host has no network interface of that name."""

    code = "netfix.no-such-interface"
    default_hint = "list the host's interfaces with `ip link`"


class AddressConflictError(NetfixError):
    """The host has the address already, on another interface or with another prefix length."""

    code = "netfix.address-conflict"
    default_hint = "remove it there first, or name the interface that has it"


class DependentAddressError(NetfixError):
    """Removing the address would make the kernel remove other addresses with it."""

    code = "netfix.address-has-dependents"


class NotPermittedError(NetfixError):
    """The kernel wants a capability that the caller lacks."""

    code = "netfix.not-permitted"
    default_hint = "run as root, or with CAP_NET_ADMIN and CAP_NET_RAW"


class KernelRefusedError(NetfixError):
    """The kernel said no to a request."""

    code = "netfix.kernel-refused"


class KernelLacksError(KernelRefusedError):
    """The kernel was built without something that is needed."""

    code = "netfix.kernel-lacks"
    default_hint = "the kernel needs nf_tables with the families inet and arp, packet sockets and inet_diag"


class GateAlteredError(NetfixError):
    """The rules of a gate are not those that netfix has put there."""

    code = "netfix.gate-altered"
    default_hint = "set the gate again, or take it away with `netfix gate open ID`"


_BY_ERRNO: dict[int, type[NetfixError]] = {
    errno.EPERM: NotPermittedError,
    errno.EACCES: NotPermittedError,
    errno.ENODEV: NoSuchInterfaceError,
    errno.ENXIO: NoSuchInterfaceError,
    errno.EOPNOTSUPP: KernelLacksError,
    errno.EPROTONOSUPPORT: KernelLacksError,
    errno.EAFNOSUPPORT: KernelLacksError,
}


def from_errno(number: int, doing: str, detail: str = "") -> NetfixError:
    """The error for what the kernel answered: `doing` is the step that failed, `detail` the kernel's own words."""
    said = detail or os.strerror(number)
    name = errno.errorcode.get(number, str(number))
    return _BY_ERRNO.get(number, KernelRefusedError)(f"{doing}: {said} ({name})")
