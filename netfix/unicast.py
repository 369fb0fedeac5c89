"""Which addresses a service can have. It stands alone because a coordinator needs it, and nothing of netlink."""

import ipaddress

from .errors import InvalidAddressError


def parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """A unicast address that a service can have, in any spelling. Raises InvalidAddressError.

    Link-local IPv6 addresses are refused: they mean something on one interface only.
    """
    try:
        parsed = ipaddress.ip_address(text)
    except ValueError as error:
        raise InvalidAddressError(f"{text!r} is not an IP address") from error
    if isinstance(parsed, ipaddress.IPv6Address) and (parsed.scope_id or parsed.ipv4_mapped):
        raise InvalidAddressError(f"{text!r}: a scope or a mapped IPv4 address cannot be moved")
    if parsed.is_multicast or parsed.is_unspecified or parsed.is_loopback:
        raise InvalidAddressError(f"{text!r} is not a unicast address of a host")
    if parsed.version == 6 and parsed.is_link_local:
        raise InvalidAddressError(f"{text!r} is link-local", hint="move a global or unique local address")
    return parsed
