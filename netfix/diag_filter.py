"""A filter that sock_diag applies to a dump, so that a look at one service's sockets does not pay for all others. Pure.

Kernel include/uapi/linux/inet_diag.h, `INET_DIAG_REQ_BYTECODE`; run by net/ipv4/inet_diag.c, `inet_diag_bc_run`. A
program is a row of operations, each with how far to go on if it holds and if it does not. It accepts a socket by
arriving exactly at the program's end, and refuses it by going four bytes beyond.
"""

import struct
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address

_BYTECODE = 1
_JUMP, _LOCAL_IS = 1, 7
_OPERATION = struct.Struct("=BBH")
_HOST = struct.Struct("=BBxxi")
_FAMILIES = {4: 2, 6: 10}
_ANY_PORT = -1


def local_address_is(addresses: Iterable[IPv4Address | IPv6Address]) -> bytes:
    """The attribute of a request for sockets whose local end is one of the addresses, of which there is at least one.

    An IPv4 address takes in IPv6 sockets that have it mapped.
    """
    program = b""
    for address in addresses:  # built from its end
        host = _HOST.pack(_FAMILIES[address.version], address.max_prefixlen, _ANY_PORT) + address.packed
        size = _OPERATION.size + len(host)
        # If it is the one, on to the jump to the end; if not, to what is behind that. The last has no jump: beyond.
        accept = _OPERATION.pack(_JUMP, _OPERATION.size, _OPERATION.size + len(program)) if program else b""
        program = _OPERATION.pack(_LOCAL_IS, size, size + _OPERATION.size) + host + accept + program
    return struct.pack("=HH", 4 + len(program), _BYTECODE) + program
