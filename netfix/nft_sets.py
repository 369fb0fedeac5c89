"""What a judgement of the firewall needs of nftables beside the rules: chains with their policies, sets with elements.

Numbers: kernel include/uapi/linux/netfilter/nf_tables.h.
"""

from typing import NamedTuple

from pyroute2.netlink.nfnetlink import nftsocket as wire

from . import nft
from .netlink import NetlinkSocket, attributes

_ATTR_NAME, _ATTR_TABLE_FLAGS, _TABLE_DORMANT = 1, 2, 1
_ATTR_CHAIN_NAME, _ATTR_CHAIN_HOOK, _ATTR_CHAIN_POLICY, _ATTR_CHAIN_TYPE, _ATTR_HOOK_NUMBER = 3, 4, 5, 7, 1
_PREROUTING, _INPUT = 0, 1
_ATTR_SET_NAME, _ATTR_SET_FLAGS, _ATTR_SET_KEY_BYTES = 2, 3, 5
_SET_INTERVAL, _SET_CONCATENATION = 0x4, 0x80
_ATTR_ELEMENTS, _ATTR_ELEMENT_KEY, _ATTR_ELEMENT_DATA, _ATTR_ELEMENT_FLAGS, _INTERVAL_END = 3, 1, 2, 3, 1
_ATTR_DATA_VALUE, _ATTR_DATA_VERDICT = 1, 2


class BaseChain(NamedTuple):
    """A chain of type filter that packets for this host pass; `accepts`: its policy, for what no rule decides."""

    family: int
    table: str
    name: str
    accepts: bool


class SetElement(NamedTuple):
    """An element of a set or map: its key, whether an interval ends there, and, nested, the verdict it maps to."""

    key: bytes
    ends: bool
    verdict: bytes


class FirewallSet(NamedTuple):
    """A set or map with its elements, sorted by key. `intervals`: an element stands for all keys up to the next."""

    key_bytes: int
    intervals: bool
    elements: tuple[SetElement, ...]

    def holds(self, key: bytes) -> SetElement | None:
        """The element for that key."""
        if not self.intervals:
            return next((each for each in self.elements if each.key[: self.key_bytes] == key), None)
        below = [each for each in self.elements if each.key[: self.key_bytes] <= key]
        return below[-1] if below and not below[-1].ends else None


def base_chains(netlink: NetlinkSocket) -> list[BaseChain]:
    """The chains of type filter at the hooks prerouting and input, without those of tables that are dormant."""
    dormant = {
        (family, _text(values, _ATTR_NAME))
        for family, values in nft.dump(netlink, wire.nft_table_msg(), 0, wire.NFT_MSG_GETTABLE)
        if _be(values.get(_ATTR_TABLE_FLAGS, b"")) & _TABLE_DORMANT
    }
    found = []
    for family, values in nft.dump(netlink, wire.nft_chain_msg(), 0, wire.NFT_MSG_GETCHAIN):
        hook = dict(attributes(values.get(_ATTR_CHAIN_HOOK, b"")))
        table = _text(values, _ATTR_NAME)
        at = hook and _be(hook.get(_ATTR_HOOK_NUMBER, b"")) in (_PREROUTING, _INPUT)
        filters = _text(values, _ATTR_CHAIN_TYPE) == "filter" and family in (nft.INET, nft.IPV4, nft.IPV6)
        if at and filters and (family, table) not in dormant:
            accepts = _be(values.get(_ATTR_CHAIN_POLICY, b"\1")) == nft.ACCEPT
            found.append(BaseChain(family, table, _text(values, _ATTR_CHAIN_NAME), accepts))
    return found


def table_sets(netlink: NetlinkSocket, family: int, table: str) -> dict[str, FirewallSet]:
    """The sets and maps of one table, by name; without those whose keys are intervals of several fields."""
    found = {}
    attrs = [("NFTA_SET_TABLE", table)]
    for _, values in nft.dump(netlink, wire.nft_set_msg(), family, wire.NFT_MSG_GETSET, attrs):
        name, flags = _text(values, _ATTR_SET_NAME), _be(values.get(_ATTR_SET_FLAGS, b""))
        key_bytes = _be(values.get(_ATTR_SET_KEY_BYTES, b""))
        if flags & _SET_INTERVAL and flags & _SET_CONCATENATION:
            continue
        found[name] = FirewallSet(key_bytes, bool(flags & _SET_INTERVAL), _elements(netlink, family, table, name))
    return found


def _elements(netlink: NetlinkSocket, family: int, table: str, name: str) -> tuple[SetElement, ...]:
    attrs = [("NFTA_SET_ELEM_LIST_TABLE", table), ("NFTA_SET_ELEM_LIST_SET", name)]
    elements = []
    for _, listed in nft.dump(netlink, wire.nft_set_elem_list_msg(), family, wire.NFT_MSG_GETSETELEM, attrs):
        for _, nested in attributes(listed.get(_ATTR_ELEMENTS, b"")):
            values = dict(attributes(nested))
            key = dict(attributes(values.get(_ATTR_ELEMENT_KEY, b""))).get(_ATTR_DATA_VALUE, b"")
            data = dict(attributes(values.get(_ATTR_ELEMENT_DATA, b"")))
            ends = bool(_be(values.get(_ATTR_ELEMENT_FLAGS, b"")) & _INTERVAL_END)
            elements.append(SetElement(key, ends, data.get(_ATTR_DATA_VERDICT, b"")))
    # Where one interval ends and the next begins there are two of one key: the beginning counts.
    return tuple(sorted(elements, key=lambda each: (each.key, not each.ends)))


def _be(value: bytes) -> int:
    return int.from_bytes(value, "big")


def _text(values: dict[int, bytes], kind: int) -> str:
    return values.get(kind, b"").rstrip(b"\0").decode(errors="replace")
