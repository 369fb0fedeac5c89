"""The command line: exit status, one JSON object, one clear message. The hosts are fakes."""

import io
import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from netfix import cli, cli_conntrack, cli_hold, cli_sweep
from netfix.address import AddressRecord, FakeAddressBook, InterfaceRecord
from netfix.conntrack import FakeConnectionTable
from netfix.conntrack_entry import CONFIRMED, DST_NAT, SEEN_REPLY, TCP, Connection, Flow, TcpInfo
from netfix.errors import NotPermittedError
from netfix.frames import FakeFramePort
from netfix.gate import CLOSED, HOLDING, FakeGate, GateReport, GateState
from netfix.hold import FakeHold
from netfix.inventory import OtherSocket
from netfix.leftovers import Leftover
from netfix.sockets import FakeSocketInventory, SocketRecord
from netfix.sweep import Remnant

MAC = "02:00:00:00:00:01"
A, A6 = "192.0.2.10", "2001:db8::10"


class Host:
    """What the commands find instead of the machine they run on."""

    def __init__(self) -> None:
        eth0 = InterfaceRecord("eth0", 2, MAC, up=True, mtu=1500)
        self.book = FakeAddressBook([eth0], [AddressRecord(A, 24, "eth0")])
        self.port = FakeFramePort({A: {"02:00:00:00:00:09"}})
        self.inventory = FakeSocketInventory(
            [
                SocketRecord("ipv4", "tcp", "ESTABLISHED", A, 7000, "192.0.2.1", 40000, 11, 0, 0),
                SocketRecord("ipv6", "tcp", "LISTEN", "::", 22, "::", 0, 12, 0, 128),
            ]
        )
        self.gates: dict[str, GateState] = {}
        self.hold = FakeHold()
        self.table = FakeConnectionTable()
        self.swept: list[str] = []


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host()

    async def find_gates() -> list[GateReport]:
        return [GateReport(name.removeprefix("livemove-"), state, (A,)) for name, state in made.gates.items()]

    async def remove_gate(ident: str) -> None:
        made.gates.pop(f"livemove-{ident}", None)

    async def find_leftovers(_except_for: str | None) -> list[Leftover]:
        return [Leftover("criu-table", "inet", "CRIU-1", "", "a lock", "nft delete table inet CRIU-1")]

    async def nothing() -> list[OtherSocket]:
        return []

    async def remnants(*_: object, **__: object) -> list[Remnant]:
        address = AddressRecord(A, 24, "eth0")
        old = Remnant("gate", "old", f"gate old, closed, for {A}", "", (address,))
        return [old, Remnant("criu-table", "inet CRIU-1", "a lock", "criu runs on this host")]

    async def remove(remnant: Remnant, _book: object) -> None:
        made.swept.append(remnant.subject)

    def gate(ident: str, addresses: Sequence[str]) -> FakeGate:
        return FakeGate(ident, addresses, made.gates)

    monkeypatch.setattr(cli, "NetlinkAddressBook", lambda: made.book)
    monkeypatch.setattr(cli, "PacketFramePort", lambda _interface: made.port)
    monkeypatch.setattr(cli, "DiagSocketInventory", lambda: made.inventory)
    monkeypatch.setattr(cli, "NftGate", gate)
    monkeypatch.setattr(cli, "find_gates", find_gates)
    monkeypatch.setattr(cli, "remove_gate", remove_gate)
    monkeypatch.setattr(cli, "find_leftovers", find_leftovers)
    monkeypatch.setattr(cli, "other_sockets", nothing)
    monkeypatch.setattr(cli_conntrack, "NetlinkConnectionTable", lambda: made.table)
    monkeypatch.setattr(cli_hold, "NftGate", gate)
    monkeypatch.setattr(cli_hold, "NfqueueHold", lambda _limits: made.hold)
    monkeypatch.setattr(cli_sweep, "NetlinkAddressBook", lambda: made.book)
    monkeypatch.setattr(cli_sweep, "remnants", remnants)
    monkeypatch.setattr(cli_sweep, "remove", remove)
    return made


def _run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return int(ended.value.code or 0)


def _json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert _run(*arguments, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert isinstance(answer, dict)
    return answer


def test_sockets(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    answer = _json(capsys, "sockets", "--address", A)
    assert answer["sockets"] == [
        {
            "family": "ipv4",
            "protocol": "tcp",
            "state": "ESTABLISHED",
            "local": A,
            "local_port": 7000,
            "remote": "192.0.2.1",
            "remote_port": 40000,
            "inode": 11,
            "receive_queue_bytes": 0,
            "send_queue_bytes": 0,
            "mapped": False,
            "v6only": False,
            "device": "",
            "ulp": "",
            "unsent_bytes": 0,
        }
    ]
    assert answer["findings"] == []
    assert _run("sockets") == 0
    shown = capsys.readouterr().out
    assert "192.0.2.10:7000" in shown
    assert "[::]:22" in shown
    assert host.inventory.closed


def test_sockets_with_what_would_become_of_them(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.inventory.records[0] = replace(host.inventory.records[0], ulp="mptcp")
    found = _json(capsys, "sockets", "--address", A)["findings"]
    assert isinstance(found, list)
    assert [(one["code"], one["fatal"], one["inode"]) for one in found] == [("socket.mptcp", True, 11)]
    assert _run("sockets", "--address", A, "--wildcard") == 0
    assert "fatal: tcp 192.0.2.10:7000 to 192.0.2.1:40000 is Multipath TCP" in capsys.readouterr().out


def test_conntrack(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    original, reply = Flow("192.0.2.1", 40000, A, 80), Flow(A, 8080, "192.0.2.1", 40000)
    entry = Connection(TCP, original, reply, CONFIRMED | SEEN_REPLY | DST_NAT, 300, 7, 0, TcpInfo(3))
    host.table.entries[entry.key] = entry
    assert _json(capsys, "conntrack", A) == {
        "tracking": True,
        "connections": [
            {
                "protocol": "tcp",
                "state": "ESTABLISHED",
                "original": original._asdict(),
                "reply": reply._asdict(),
                "flags": ["answered", "destination-nat"],
                "timeout_s": 300,
                "mark": 7,
                "zone": 0,
            }
        ],
    }
    assert _run("conntrack", A) == 0
    assert "192.0.2.1:40000 → 192.0.2.10:80" in capsys.readouterr().out
    assert host.table.closed
    host.table.tracking = False
    assert _run("conntrack", A6) == 0
    assert "this host tracks no connections" in capsys.readouterr().out
    assert _run("conntrack") == 2


def test_hold(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    answer = _json(capsys, "hold", A, "--seconds", "0.01")
    assert (answer["addresses"], answer["mode"], answer["released"]) == ([A], "queue", 0)
    assert host.hold.history == ["open", "release", "open_gate"]
    assert host.hold.closed
    assert host.gates == {}, "no rules are left"


def test_hold_on_a_kernel_that_cannot(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.hold = FakeHold(kernel_lacks=True)
    assert _run("hold", A) == 3
    assert "cannot hold" in capsys.readouterr().err
    assert host.gates == {}


def test_sweep(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("sweep", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "would be removed: gate old" in shown
    assert "with 192.0.2.10 on eth0: another host answers" in shown
    assert "because criu runs" in shown
    assert host.swept == []
    assert _run("sweep") == 2, "nobody to ask"
    assert "--yes" in capsys.readouterr().err
    removed = _json(capsys, "sweep", "--yes")["remnants"]
    assert [one["removed"] for one in removed] == [True, False]  # type: ignore[attr-defined]
    assert host.swept == ["old"]


@pytest.mark.parametrize(("word", "status", "swept"), [("y\n", 0, ["old"]), ("n\n", 0, [])])
def test_sweep_asks_on_a_terminal(
    host: Host, monkeypatch: pytest.MonkeyPatch, word: str, status: int, swept: list[str]
) -> None:
    terminal = io.StringIO(word)
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    assert _run("sweep") == status
    assert host.swept == swept


def test_who(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    answer = _json(capsys, "who", A, "--interface", "eth0")
    assert answer == {"address": A, "interface": "eth0", "macs": ["02:00:00:00:00:09"]}
    assert _run("who", A6, "--interface", "eth0") == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "nobody answered" in captured.err
    assert host.port.closed


def test_announce_wants_the_address_to_be_here(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    answer = _json(capsys, "announce", A, "--interface", "eth0", "--burst", "2", "--repeats", "0")
    assert answer == {"address": A, "interface": "eth0", "mac": MAC, "frames": 4}
    assert len(host.port.sent) == 4
    assert _run("announce", A6, "--interface", "eth0") == 3
    assert "--anyway" in capsys.readouterr().err
    assert len(host.port.sent) == 4
    assert _run("announce", A6, "--interface", "eth0", "--repeats", "0", "--anyway") == 0


def test_gates(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    assert _json(capsys, "gate", "close", "m1", A, A6) == {"id": "m1", "state": "closed", "addresses": [A, A6]}
    assert host.gates == {"livemove-m1": CLOSED}
    host.gates["livemove-m2"] = HOLDING
    shown = _json(capsys, "gate", "show")["gates"]
    assert isinstance(shown, list)
    assert [(gate["id"], gate["state"]) for gate in shown] == [("m1", "closed"), ("m2", "holding")]
    assert _run("gate", "open", "m1") == 0
    assert list(host.gates) == ["livemove-m2"]


@pytest.mark.usefixtures("host")
def test_leftovers(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("leftovers") == 0
    assert "remove: nft delete table inet CRIU-1" in capsys.readouterr().out


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["who", "nowhere", "--interface", "eth0"], 2, "'nowhere' is not an IP address"),
        (["who", A, "--interface", "eth7"], 3, "no interface 'eth7'"),
        (["who", A], 2, "Missing option '--interface'"),
        (["gate", "close", "a b", A], 2, "migration id 'a b'"),
        (["gate", "close", "m1"], 2, "Missing argument"),
        (["sockets", "--address", "1.2"], 2, "'1.2' is not an IP address"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_trouble_is_one_clear_message(
    capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, says: str
) -> None:
    assert _run(*arguments) == status
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.out == ""


def test_trouble_as_json(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.inventory.fail_next = NotPermittedError("no")
    assert _run("sockets", "--json") == 3
    captured = capsys.readouterr()
    error = {"code": "netfix.not-permitted", "message": "no", "hint": NotPermittedError.default_hint}
    assert json.loads(captured.out) == {"error": error}
    assert "hint: run as root" in captured.err


def test_an_interrupt_is_130(host: Host) -> None:
    def interrupted(work: object) -> object:
        work.close()  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        cli.main(["leftovers"], runner=interrupted)
    assert ended.value.code == 130


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["sockets"],
        ["who"],
        ["announce"],
        ["gate"],
        ["leftovers"],
        ["hold"],
        ["sweep"],
        ["conntrack"],
        ["move"],
    ],
)
def test_help_has_examples(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    assert _run(*command, "--help") == 0
    assert "Examples:" in capsys.readouterr().out
