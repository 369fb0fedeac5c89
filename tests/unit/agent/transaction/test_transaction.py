"""The transaction on fakes: stopped, killed, cut off and failed at every place, it ends on one host with nothing lost.

`World` looks at I1 to I4 after every change, `verdict` at I5 and at the agreement of both journals in the end. Agents,
halves, journals and the recovery are the real ones; time is the fake clock's.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP

from coordinator.agent.fakes.channel import Trouble
from coordinator.agent.fakes.clock import run
from coordinator.agent.settling import POLL_S
from coordinator.journal import Journal, Phase
from coordinator.protocol import Deadlines, HalfResult
from netfix.sockets import SocketRecord
from tests.unit.agent.faults import (
    ROLES,
    Fault,
    Role,
    both,
    cancel,
    cancel_again,
    fail,
    fail_later,
    happy,
    kill,
    kill_later,
    noted,
    other,
    play,
    process,
    steps,
    trouble,
)
from tests.unit.agent.stage import Stage, phase_of, told_outcomes, verdict


def verdicts(folder: Path, faults: Iterator[tuple[str, Fault]]) -> Counter[str]:
    return Counter(found for _, _, found in play(folder, faults))


def test_without_a_fault_the_workload_is_moved_in_the_order_of_the_design(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    ends = run(stage.play())
    assert told_outcomes(ends) == {verdict(stage)} == {"moved"}
    assert stage.recovering == []
    order = [
        "alpha: gate silent",
        "beta: gate holding",
        "beta: frames sent",
        "alpha: gate freezing",
        "alpha: the copy is frozen",
        "beta: the copy is held",
        "beta: gate releasing",
        "beta: the copy is running",
        "beta: gate open",
        "beta: hold released",
        "alpha: the copy is absent",
        "alpha: address removed",
        "alpha: gate removed",
        "beta: gate removed",
    ]
    found = iter(stage.world.history)
    assert all(step in found for step in order)


def test_a_service_that_does_not_accept_is_not_even_diverted(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    listener = SocketRecord("ipv4", "tcp", "LISTEN", "192.0.2.200", 7000, "0.0.0.0", 0, 7, 3, 128)
    stage.world.source.pending.append(listener)
    source, _ = run(stage.play())
    assert verdict(stage) == "rolled_back"
    assert isinstance(source, HalfResult)
    assert source.error is not None
    assert source.error["code"] == "NOT_ACCEPTING"
    assert "alpha: gate silent" not in stage.world.history


UNREAD = SocketRecord("ipv4", "udp", "UNCONNECTED", "0.0.0.0", 53, "0.0.0.0", 0, 7, 10, 0)


def _with_a_loss(folder: Path, fault: Fault = lambda _: None) -> tuple[Stage, HalfResult]:
    """A move of a service that does not read, and what its source half says of it."""
    stage = Stage(folder)
    stage.world.source.pending.append(UNREAD)
    fault(stage)
    run(stage.play())
    assert stage.told is not None
    source, _ = stage.told
    assert isinstance(source, HalfResult)
    return stage, source


def test_what_is_lost_is_told(tmp_path: Path) -> None:
    stage, source = _with_a_loss(tmp_path)
    assert verdict(stage) == "moved"
    (warning,) = source.warnings
    assert warning.startswith("alpha: datagrams that the service had received and not read are lost")
    assert len(source.sockets) == 1


def test_sockets_are_not_looked_at_in_the_freeze(tmp_path: Path) -> None:
    """From the dump's end until the tasks run on the destination, which is when it is told what is lost."""
    seen = []

    class Pending(list[SocketRecord]):
        def __iter__(self) -> Iterator[SocketRecord]:
            seen.append(stage.world.destination.copy)
            return super().__iter__()

    stage = Stage(tmp_path)
    stage.world.source.pending = Pending([UNREAD])
    run(stage.play())
    assert seen[-1] == "running"
    assert set(seen[:-1]) == {"absent"}
    verbs = stage.source.life.verbs
    dumped, untouched = verbs.index("criu reaches post-dump"), verbs.index("files untouched")
    assert not {"queues read", "sockets read"} & set(verbs[dumped:untouched])
    assert verbs[untouched + 1 : verbs.index("criu ends")] == ["queues read", "sockets read"]


def test_nothing_is_lost_by_a_move_that_is_given_up(tmp_path: Path) -> None:
    stage, source = _with_a_loss(tmp_path, trouble("cut", True, happy().segment.sent[True].index("ImagesComplete") + 1))
    assert verdict(stage) == "rolled_back"
    assert not [warning for warning in source.warnings if "lost" in warning]


def test_of_what_is_moved_in_doubt_the_losses_are_told(tmp_path: Path) -> None:
    """The destination's word does not come: it runs there, and its sockets are compared with these."""
    stage, source = _with_a_loss(tmp_path, trouble("cut", False, happy().segment.sent[False].index("Resumed") + 1))
    assert verdict(stage) == "moved"
    assert source.outcome == "in_doubt"
    assert [warning for warning in source.warnings if "are lost" in warning]
    assert len(source.sockets) == 1


@pytest.mark.parametrize("look", ["queues read", "sockets read"])
def test_a_look_at_sockets_that_fails_after_the_commit_is_a_warning(tmp_path: Path, look: str) -> None:
    whole, _ = _with_a_loss(tmp_path / "whole")
    verbs = whole.source.life.verbs
    last = len(verbs) - verbs[::-1].index(look)
    stage, source = _with_a_loss(tmp_path / "failing", fail("source", last))
    assert verdict(stage) == "moved"
    assert [warning for warning in source.warnings if "no sock_diag" in warning]


def _with_a_handshake(folder: Path) -> Stage:
    """One whose last packet comes when packets are diverted already, again and again."""
    stage = Stage(folder, Deadlines(copy_s=100.0, close_s=POLL_S))
    client, service = ("192.0.2.99", 40003), ("192.0.2.200", 7000)
    stage.world.source.pending.append(SocketRecord("ipv4", "tcp", "SYN_RECV", *service, *client, 0, 0, 0))
    last = IP(src=client[0], dst=service[0]) / TCP(sport=client[1], dport=service[1], flags="A", seq=1, ack=1)
    stage.world.packet_head = bytes(last)
    return stage


def test_a_handshake_is_finished_by_what_came_to_the_destination(tmp_path: Path) -> None:
    stage = _with_a_handshake(tmp_path)
    source, _ = run(stage.play())
    assert verdict(stage) == "moved"
    assert isinstance(source, HalfResult)
    assert source.warnings == ()
    order = ["beta: gate holding", "alpha: packets taken in", "alpha: gate freezing", "beta: hold released"]
    found = iter(stage.world.history)
    assert all(step in found for step in order)


@pytest.mark.parametrize("role", ROLES)
def test_stopped_while_packets_are_handed_back(tmp_path: Path, role: Role) -> None:
    """At every await of the agent, which may be in the middle of asking or answering."""
    whole = _with_a_handshake(tmp_path / "whole")
    run(whole.play())
    for number in range(1, process(whole, role).life.steps + 1):
        stage = _with_a_handshake(tmp_path / str(number))
        kill(role, number)(stage)
        with noted(f"kill {role} at {number}", stage):
            ends = run(stage.play())
            assert told_outcomes(ends) <= {verdict(stage)}


@pytest.mark.parametrize("role", ROLES)
def test_cancelled_at_every_await(tmp_path: Path, role: Role) -> None:
    ended = Counter[str]()
    faults = ((f"cancel {role} at {n}", cancel(role, n)) for n in steps(role))
    for name, stage, found in play(tmp_path, faults):
        ended[found] += 1
        if role == "source" and stage.told is not None and phase_of(stage.world.destination) is not None:
            # A source always knows by itself, and the destination believes it.
            assert "in_doubt" not in told_outcomes(stage.told), name
    assert set(ended) == {"moved", "rolled_back"}


@pytest.mark.parametrize("role", ROLES)
def test_cancelled_twice(tmp_path: Path, role: Role) -> None:
    once = verdicts(tmp_path / "once", ((f"cancel {role} at {n}", cancel(role, n)) for n in steps(role)))
    for after in (1, 3, 8):
        again = ((f"cancel {role} at {n}, +{after}", cancel(role, n, cancel_again(after))) for n in steps(role))
        assert verdicts(tmp_path / f"twice {after}", again) == once


@pytest.mark.parametrize("role", ROLES)
def test_killed_at_every_await(tmp_path: Path, role: Role) -> None:
    faults = ((f"kill {role} at {n}", kill(role, n)) for n in steps(role))
    assert set(verdicts(tmp_path, faults)) == {"moved", "rolled_back"}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("after", [1, 4, 9])
def test_killed_while_rolling_back(tmp_path: Path, role: Role, after: int) -> None:
    faults = ((f"cancel {role} at {n}, then kill", cancel(role, n, kill_later(after))) for n in steps(role))
    assert set(verdicts(tmp_path, faults)) == {"moved", "rolled_back"}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("after", [1, 6])
def test_both_agents_killed(tmp_path: Path, role: Role, after: int) -> None:
    def fault(step: int) -> Fault:
        def setup(stage: Stage) -> None:
            first, second = process(stage, role), process(stage, other(role))

            def stop() -> None:
                first.life.kill()
                kill_later(after)(second)

            first.life.stop_at, first.life.stop = step, stop

        return setup

    faults = ((f"kill {role} at {n}, the other {after} later", fault(n)) for n in steps(role))
    assert set(verdicts(tmp_path, faults)) == {"moved", "rolled_back"}


@pytest.mark.parametrize("role", ROLES)
def test_every_verb_fails_once(tmp_path: Path, role: Role) -> None:
    verbs = process(happy(), role).life.verbs
    faults = ((f"{role}: {verb} fails", fail(role, n)) for n, verb in enumerate(verbs, 1))
    assert set(verdicts(tmp_path, faults)) == {"moved", "rolled_back"}


def test_every_verb_of_a_roll_back_fails_once(tmp_path: Path) -> None:
    """But one, which no order of steps can mend: a gate that the kernel will not close, on a host that is in doubt."""

    def faults() -> Iterator[tuple[str, Fault]]:
        for role in ROLES:
            for step, after in itertools.product(steps(role), range(1, 8)):
                if (step + after) % 2:
                    continue  # the awaits before and after a verb are the same to it
                yield f"cancel {role} at {step}, verb +{after} fails", cancel(role, step, fail_later(after))

    ended = Counter[str]()
    for number, (name, fault) in enumerate(faults()):
        stage = Stage(tmp_path / str(number))
        fault(stage)
        run(stage.play())
        if stage.told is not None and "in_doubt" in told_outcomes(stage.told):
            stage.world.broken = [what for what in stage.world.broken if not what.startswith("I2: two hosts answer")]
        with noted(name, stage):
            ended[verdict(stage)] += 1
    assert set(ended) == {"moved", "rolled_back"}


@pytest.mark.parametrize("kind", ["cut", "drop"])
@pytest.mark.parametrize("up", [True, False], ids=["from the source", "from the destination"])
def test_every_message_is_lost(tmp_path: Path, kind: Trouble, up: bool) -> None:
    messages = happy().segment.sent[up]
    faults = ((f"{kind} {message}", trouble(kind, up, n)) for n, message in enumerate(messages, 1))
    expected = {"Go": "moved", "Resumed": "moved"}
    for name, _, found in play(tmp_path, faults):
        assert found == expected.get(name.split()[1], "rolled_back"), name


@pytest.mark.parametrize("role", ROLES)
def test_the_recovering_agents_are_killed_too(tmp_path: Path, role: Role) -> None:
    """Recovery is repeated until it has come through; each time its agent is killed one await later."""
    for step in steps(role)[::2]:
        stage = Stage(tmp_path / str(step))
        kill(role, step)(stage)

        async def story(stage: Stage = stage) -> None:
            told = await stage.move()
            for patience in itertools.count(1):
                stage.patience = patience
                told = await stage.settle(told)
                if len(told_outcomes(told) & {"moved", "rolled_back"}) == 1 and not stage.killed:
                    return

        run(story())
        assert verdict(stage) in ("moved", "rolled_back")


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
def test_every_record_of_the_journal_finds_the_disk_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: Role, lasting: bool
) -> None:
    """Once, or from then on until the half has ended; a recovery finds space again."""
    append = Journal._append
    ended = Counter[str]()
    for number in range(1, 40):
        stage = Stage(tmp_path / str(number))
        count = itertools.count(1)

        def full(stage: Stage = stage, count: Iterator[int] = count, number: int = number) -> bool:
            at = 0 if stage.recovering else next(count)
            return at == number or (lasting and at > number)

        def appending(
            journal: Journal, kind: str, *, full: Callable[[], bool] = full, durable: bool, **data: object
        ) -> None:
            if journal.state.role == role and full():
                raise OSError(28, "No space left on device")
            append(journal, kind, durable=durable, **data)

        monkeypatch.setattr(Journal, "_append", appending)
        with noted(f"{role}: no space at record {number}", stage):
            assert "in_doubt" not in told_outcomes(run(stage.play()))
            if lasting:  # a CRIU whose pid could not be recorded is not waited for: the runtime kills what it restored
                stage.world.broken = [what for what in stage.world.broken if "discards tasks" not in what]
            ended[verdict(stage)] += 1
    assert set(ended) == {"moved", "rolled_back"}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    roles=st.tuples(st.sampled_from(ROLES), st.sampled_from(ROLES)),
    at=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    kinds=st.tuples(st.sampled_from(["cancel", "kill"]), st.sampled_from(["kill", "cut", "drop", "none"])),
    up=st.booleans(),
)
def test_any_two_faults(roles: tuple[Role, Role], at: tuple[int, int], kinds: tuple[str, str], up: bool) -> None:
    first = cancel(roles[0], at[0]) if kinds[0] == "cancel" else kill(roles[0], at[0])
    second = {
        "kill": kill(other(roles[0]), at[1]),
        "cut": trouble("cut", up, at[1] % 8 + 1),
        "drop": trouble("drop", up, at[1] % 8 + 1),
        "none": lambda _: None,
    }[kinds[1]]
    with TemporaryDirectory() as folder:
        name = f"{kinds} {roles} {at} {up}"
        assert set(verdicts(Path(folder), iter([(name, both(first, second))]))) <= {"moved", "rolled_back"}


def test_a_move_that_a_check_refuses_leaves_no_trace(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.world.destination.registered = True
    run(stage.move())
    assert stage.world.broken == []
    assert stage.world.source.remains == []
    assert phase_of(stage.world.destination) is Phase.ROLLED_BACK
