"""nf_tables over netlink: messages, expressions and dumps, as far as gates and leftovers need them.

Built with pyroute2's nft message classes; what an expression does is described in nft(8) and libnftnl. A batch is one
transaction: all messages between begin and end take effect at one instant, over all families (kernel
net/netfilter/nf_tables_api.c, generation cursor), or none does.
"""

import errno
import struct
from collections.abc import Iterable
from typing import Any, NamedTuple

from pyroute2.netlink.nfnetlink import NFNL_SUBSYS_NFTABLES, nfgen_msg
from pyroute2.netlink.nfnetlink import nftsocket as wire

from .netlink import (
    NLM_F_ACK,
    NLM_F_APPEND,
    NLM_F_CREATE,
    NLM_F_DUMP,
    Message,
    NetlinkSocket,
    Refusal,
    attributes,
    encode,
)

FAMILY_NAMES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
INET = wire.NFPROTO_INET
IPV4 = wire.NFPROTO_IPV4
IPV6 = wire.NFPROTO_IPV6
ARP = wire.NFPROTO_ARP

DROP = 0
ACCEPT = 1

_BATCH_BEGIN = 0x10
_BATCH_END = 0x11
_NFGEN_BYTES = 4
_ATTR_TABLE_NAME = 1
_ATTR_CHAIN_TABLE, _ATTR_CHAIN_NAME = 1, 3
_ATTR_RULE_TABLE, _ATTR_RULE_CHAIN, _ATTR_RULE_HANDLE, _ATTR_RULE_EXPRESSIONS, _ATTR_RULE_USERDATA = 1, 2, 3, 4, 7
_USERDATA_COMMENT = 0
_LINK_LAYER, _NETWORK, _TRANSPORT = 0, 1, 2

QUEUE, TARGET, NO_QUEUE = "queue", "target", "none"
"""How a rule can send packets to an NFQUEUE: nft's own expression, the xtables target as an expression, or not."""
_TARGET_REVISION = 3
_PROBE_TABLE = "netfix-probe"

Expression = dict[str, Any]


class Table(NamedTuple):
    """A table as the kernel lists it."""

    family: int
    name: str


class Chain(NamedTuple):
    """A chain as the kernel lists it."""

    family: int
    table: str
    name: str


class Rule(NamedTuple):
    """A rule as the kernel lists it: its expressions in netlink's bytes, its comment, and its number in the table."""

    family: int
    table: str
    chain: str
    expressions: bytes
    comment: str
    handle: int = 0


# --- expressions -----------------------------------------------------------------------------------------------------


def _expression(name: str, **values: Any) -> Expression:
    data = [(f"NFTA_{name.upper()}_{key.upper()}", value) for key, value in values.items()]
    return {"attrs": [("NFTA_EXPR_NAME", name), ("NFTA_EXPR_DATA", {"attrs": data})]}


def _compare(value: bytes, operation: int = wire.Cmp.NFT_CMP_EQ) -> Expression:
    return _expression("cmp", sreg=1, op=int(operation), data={"attrs": [("NFTA_DATA_VALUE", value)]})


def meta_is(key: int, value: bytes) -> list[Expression]:
    """Packet metadata (a `NFT_META_*` key) equals `value`, else the rule does not match."""
    return [_expression("meta", key=int(key), dreg=1), _compare(value)]


def meta_is_not(key: int, value: bytes) -> list[Expression]:
    """Packet metadata (a `NFT_META_*` key) is something other than `value`."""
    return [_expression("meta", key=int(key), dreg=1), _compare(value, wire.Cmp.NFT_CMP_NEQ)]


def network_is(offset: int, value: bytes) -> list[Expression]:
    """The bytes at `offset` of the network header (of the ARP header, in family arp) equal `value`."""
    return [_expression("payload", dreg=1, base=_NETWORK, offset=offset, len=len(value)), _compare(value)]


def transport_is(offset: int, value: bytes) -> list[Expression]:
    """The bytes at `offset` of the transport header equal `value`."""
    return [_expression("payload", dreg=1, base=_TRANSPORT, offset=offset, len=len(value)), _compare(value)]


def transport_between(offset: int, low: bytes, high: bytes) -> list[Expression]:
    """The bytes at `offset` of the transport header lie between `low` and `high`, both included."""
    load = _expression("payload", dreg=1, base=_TRANSPORT, offset=offset, len=len(low))
    return [load, _compare(low, wire.Cmp.NFT_CMP_GTE), _compare(high, wire.Cmp.NFT_CMP_LTE)]


def verdict(code: int) -> list[Expression]:
    """End of the rule: `DROP` or `ACCEPT`."""
    data = {"attrs": [("NFTA_DATA_VERDICT", {"attrs": [("NFTA_VERDICT_CODE", code)]})]}
    return [_expression("immediate", dreg=0, data=data)]


def to_queue(number: int, form: str) -> list[Expression]:
    """End of the rule: the packet goes to that queue, and is dropped where nobody has bound it (no bypass flag)."""
    if form == QUEUE:
        return [_expression("queue", num=number, total=1)]
    # struct xt_NFQ_info_v3 (include/uapi/linux/netfilter/xt_NFQUEUE.h): number, how many queues, flags
    data = [
        ("NFTA_TARGET_NAME", "NFQUEUE"),
        ("NFTA_TARGET_REV", _TARGET_REVISION),
        ("NFTA_TARGET_INFO", struct.pack("=HHH2x", number, 1, 0)),
    ]
    return [{"attrs": [("NFTA_EXPR_NAME", "target"), ("NFTA_EXPR_DATA", {"attrs": data})]}]


class _ExpressionMessage(wire.nft_contains_expr.nft_expr):  # type: ignore[misc]
    """As pyroute2 has it, but that a target's data goes out as the bytes it is: its `hex` cannot be encoded."""

    class nft_target(wire.nft_contains_expr.nft_expr.nft_target):  # type: ignore[misc]  # noqa: N801
        """Looked up by pyroute2 under this name."""

        nla_map = (
            ("NFTA_TARGET_UNSPEC", "none"),
            ("NFTA_TARGET_NAME", "asciiz"),
            ("NFTA_TARGET_REV", "be32"),
            ("NFTA_TARGET_INFO", "cdata"),
        )


class _RuleMessage(wire.nft_rule_msg):  # type: ignore[misc]
    """A rule with such expressions."""

    nft_expr = _ExpressionMessage


# --- messages --------------------------------------------------------------------------------------------------------


def _message(message: Any, family: int, kind: int, flags: int, attrs: list[tuple[str, Any]]) -> bytes:
    message["nfgen_family"] = family
    message["attrs"] = attrs
    return encode(message, NFNL_SUBSYS_NFTABLES << 8 | kind, flags)


def new_table(family: int, name: str, flags: int = 0) -> bytes:
    """Make the table, unless it is there."""
    attrs = [("NFTA_TABLE_NAME", name), ("NFTA_TABLE_FLAGS", 0)]
    return _message(wire.nft_table_msg(), family, wire.NFT_MSG_NEWTABLE, flags | NLM_F_CREATE, attrs)


def delete_table(family: int, name: str, flags: int = 0) -> bytes:
    """Remove the table with all that is in it; ENOENT if it is not there."""
    return _message(wire.nft_table_msg(), family, wire.NFT_MSG_DELTABLE, flags, [("NFTA_TABLE_NAME", name)])


def new_base_chain(family: int, table: str, name: str, hook: int, priority: int) -> bytes:
    """Make a filter chain at a hook with the policy accept, unless it is there."""
    where = {"attrs": [("NFTA_HOOK_HOOKNUM", hook), ("NFTA_HOOK_PRIORITY", priority)]}
    attrs = [
        ("NFTA_CHAIN_TABLE", table),
        ("NFTA_CHAIN_NAME", name),
        ("NFTA_CHAIN_HOOK", where),
        ("NFTA_CHAIN_POLICY", ACCEPT),
        ("NFTA_CHAIN_TYPE", "filter"),
    ]
    return _message(wire.nft_chain_msg(), family, wire.NFT_MSG_NEWCHAIN, NLM_F_CREATE, attrs)


def flush_rules(family: int, table: str, chain: str) -> bytes:
    """Remove all rules of a chain; the chain stays."""
    attrs = [("NFTA_RULE_TABLE", table), ("NFTA_RULE_CHAIN", chain)]
    return _message(wire.nft_rule_msg(), family, wire.NFT_MSG_DELRULE, 0, attrs)


def delete_rule(rule: Rule, flags: int = 0) -> bytes:
    """Remove one rule that the kernel has listed."""
    attrs = [("NFTA_RULE_TABLE", rule.table), ("NFTA_RULE_CHAIN", rule.chain), ("NFTA_RULE_HANDLE", rule.handle)]
    return _message(wire.nft_rule_msg(), rule.family, wire.NFT_MSG_DELRULE, flags, attrs)


def delete_chain(chain: Chain, flags: int = 0) -> bytes:
    """Remove a chain that has no rules, and that no rule refers to."""
    attrs = [("NFTA_CHAIN_TABLE", chain.table), ("NFTA_CHAIN_NAME", chain.name)]
    return _message(wire.nft_chain_msg(), chain.family, wire.NFT_MSG_DELCHAIN, flags, attrs)


def new_rule(family: int, table: str, chain: str, expressions: list[Expression], comment: str) -> bytes:
    """Append a rule; the comment (up to 120 bytes) shows in `nft list ruleset`."""
    attrs = [
        ("NFTA_RULE_TABLE", table),
        ("NFTA_RULE_CHAIN", chain),
        ("NFTA_RULE_EXPRESSIONS", expressions),
        ("NFTA_RULE_USERDATA", {"value": comment}),
    ]
    flags = NLM_F_CREATE | NLM_F_APPEND
    return _message(_RuleMessage(), family, wire.NFT_MSG_NEWRULE, flags, attrs)


def batch(messages: Iterable[bytes]) -> bytes:
    """One transaction of ready messages, the last of which must ask for an acknowledgement (`NLM_F_ACK`).

    The marks of begin and end ask for none: older kernels do not acknowledge them.
    """

    def mark(kind: int) -> bytes:
        message = nfgen_msg()
        message["res_id"] = NFNL_SUBSYS_NFTABLES
        return encode(message, kind, 0)

    return b"".join([mark(_BATCH_BEGIN), *messages, mark(_BATCH_END)])


ACKNOWLEDGE = NLM_F_ACK


def queue_form(netlink: NetlinkSocket) -> str:
    """`QUEUE`, `TARGET` or `NO_QUEUE`: what this kernel takes, tried out. Raises Refusal without the capability.

    The table it is tried in is made and removed in one transaction, so that nobody sees it; its chain is at no hook,
    because the removal of a hook empties every packet queue there is (see `hold`).
    """
    for form in (QUEUE, TARGET):
        chain = [("NFTA_CHAIN_TABLE", _PROBE_TABLE), ("NFTA_CHAIN_NAME", "probe")]
        messages = [
            new_table(INET, _PROBE_TABLE),
            _message(wire.nft_chain_msg(), INET, wire.NFT_MSG_NEWCHAIN, NLM_F_CREATE, chain),
            new_rule(INET, _PROBE_TABLE, "probe", to_queue(0, form), "probe"),
            delete_table(INET, _PROBE_TABLE, ACKNOWLEDGE),
        ]
        try:
            netlink.transact(batch(messages))
        except Refusal as refusal:
            if refusal.number in (errno.EPERM, errno.EACCES):
                raise
            continue
        return form
    return NO_QUEUE


# --- dumps -----------------------------------------------------------------------------------------------------------


def dump(
    netlink: NetlinkSocket, message: Any, family: int, kind: int, attrs: Iterable[tuple[str, Any]] = ()
) -> list[tuple[int, dict[int, bytes]]]:
    """What the kernel lists for a `NFT_MSG_GET*` message: the family and the attributes of each."""
    request = _message(message, family, kind, NLM_F_DUMP, list(attrs))
    return [(_family(answer), _values(answer)) for answer in netlink.request(request)]


def tables(netlink: NetlinkSocket) -> list[Table]:
    """All tables of all families."""
    request = _message(wire.nft_table_msg(), 0, wire.NFT_MSG_GETTABLE, NLM_F_DUMP, [])
    return [Table(_family(answer), _text(_values(answer), _ATTR_TABLE_NAME)) for answer in netlink.request(request)]


def chains(netlink: NetlinkSocket) -> list[Chain]:
    """All chains of all families."""
    request = _message(wire.nft_chain_msg(), 0, wire.NFT_MSG_GETCHAIN, NLM_F_DUMP, [])
    return [
        Chain(_family(answer), _text(values, _ATTR_CHAIN_TABLE), _text(values, _ATTR_CHAIN_NAME))
        for answer in netlink.request(request)
        for values in [_values(answer)]
    ]


def rules(netlink: NetlinkSocket, family: int = 0, table: str = "") -> list[Rule]:
    """All rules, of all families or of one, of all tables or of one, in their order."""
    attrs = [("NFTA_RULE_TABLE", table)] if table else []
    request = _message(wire.nft_rule_msg(), family, wire.NFT_MSG_GETRULE, NLM_F_DUMP, attrs)
    return [
        Rule(
            _family(answer),
            _text(values, _ATTR_RULE_TABLE),
            _text(values, _ATTR_RULE_CHAIN),
            values.get(_ATTR_RULE_EXPRESSIONS, b""),
            _comment(values.get(_ATTR_RULE_USERDATA, b"")),
            int.from_bytes(values.get(_ATTR_RULE_HANDLE, b""), "big"),
        )
        for answer in netlink.request(request)
        for values in [_values(answer)]
    ]


def _family(answer: Message) -> int:
    return answer.payload[0]


def _values(answer: Message) -> dict[int, bytes]:
    return dict(attributes(answer.payload, _NFGEN_BYTES))


def _text(values: dict[int, bytes], kind: int) -> str:
    return values.get(kind, b"").rstrip(b"\0").decode(errors="replace")


def _comment(userdata: bytes) -> str:
    """The comment among the type-length-value triples of a rule's userdata, as nft writes them."""
    offset = 0
    while offset + 2 <= len(userdata):
        kind, length = struct.unpack_from("BB", userdata, offset)
        value = userdata[offset + 2 : offset + 2 + length]
        if kind == _USERDATA_COMMENT:
            return value.rstrip(b"\0").decode(errors="replace")
        offset += 2 + length
    return ""
