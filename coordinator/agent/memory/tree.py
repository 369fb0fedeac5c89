"""Tracks every process of a workload: those there are, those that appear, and those that go.

A process that appears (fork, clone) is tracked from the next round on; in the round it is met, all it holds is dirty. A
pid that comes to name another process is told by the start time. A process between vfork and exec shares its parent's
memory: it is not looked at until it has its own.

A process that goes takes along what its page table told of its writes to shared memory, and one that comes and goes
between two answers is never seen. So whenever one may have gone, all shared memory is dirty for the others. That
shows in a member that is gone, in a zombie, and in the faults of reaped children (proc(5), cminflt and cmajflt: no
child runs without a fault). Of a process that ignores SIGCHLD nothing shows (wait(2)): it is taken for granted. Not
covered: children of a process that has set SA_NOCLDWAIT, which nothing in /proc tells. Of System V segments the kernel
itself keeps account (``segments``). Who has a descriptor of a memfd is looked up (``memfds``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from coordinator.agent.memory.base import NO_FILES, Closed, HeldFiles, ProcessChanges, Tracker
from coordinator.agent.memory.memfds import Memfds
from coordinator.agent.memory.ptrace import TargetGone, status_field
from coordinator.agent.memory.segments import Segments
from coordinator.agent.memory.shared_objects import DataOfObjects
from coordinator.agent.memory.snapshot import scan_all
from coordinator.agent.other_processes import kcmp
from coordinator.agent.process import start_time, stat_fields
from coordinator.agent.tasks import process_tree
from coordinator.errors import TrackingFailed

#: Makes the tracker of one process; raises ``TargetGone`` or ``TrackingFailed``.
MakeTracker = Callable[[int], Tracker]

_KCMP_VM = 1
_SIGCHLD = 17


class _Member:
    """A process that is known, with its tracker once it has one."""

    def __init__(self, pid: int, started: int, inner_pid: int) -> None:
        self.pid = pid
        self.started = started
        self.inner_pid = inner_pid
        self.reaped = 0
        self.tracker: Tracker | None = None
        self.answered = False
        self.untracked: str | None = None

    def close(self) -> None:
        if self.tracker is not None:
            self.tracker.close()
            self.tracker = None


class TreeTracker:
    """All processes of the tree below ``root_pid``. Used by one thread at a time; every call blocks."""

    def __init__(
        self,
        root_pid: int,
        make_tracker: MakeTracker,
        segments: Segments | None = None,
        memfds: Memfds | None = None,
    ) -> None:
        """Begin to track the processes there are; each is stopped for some hundred microseconds. ``segments`` are those
        of their IPC namespace, and end with this; without, every System V segment is dirty as a whole in every answer.
        Without ``memfds`` no memfd counts as closed, or is compared.

        Raises ``TrackingFailed`` if one of them cannot be tracked, having left all of them as found, and ``TargetGone``
        if the root is gone."""
        self._root = root_pid
        self._make = make_tracker
        self._segments = segments or Segments(None)
        self._memfds = memfds or Memfds(held=lambda _: None, compare=False)
        self._members: dict[int, _Member] = {}
        self._gone: list[int] = []
        self._zombies: set[int] = set()
        self._departed = False
        started = start_time(root_pid)
        if started is None:
            raise TargetGone(f"process {root_pid} is gone")
        self._root_started = started
        try:
            self._meet()
            for member in list(self._members.values()):
                self._attach_if_there(member)
        except BaseException:
            self.close()
            raise

    def collect(self, *, last: bool = False, files: HeldFiles = NO_FILES) -> dict[int, ProcessChanges]:
        """What changed in each process since the last call, by pid; a new process with all it holds.

        ``last``: the workload is frozen, so that nothing can be attached; a new process is only looked at. Of ``files``
        only what page tables tell is told. Processes that are gone are named by ``take_gone``.
        Raises ``TargetGone`` if the root is gone."""
        if start_time(self._root) != self._root_started:
            raise TargetGone(f"process {self._root}, the root of the workload, is gone")
        self._meet()
        memfds = self._memfds.untouched(self._members)
        untouched = Closed(self._segments.untouched(self._members), memfds, self._memfds.compared, files)
        others_wrote, self._departed = self._some_departed(), False
        answers: dict[int, ProcessChanges] = {}
        frozen: DataOfObjects | None = {} if last else None
        for member in list(self._members.values()):
            try:
                if member.tracker is None and not last:
                    self._try_attach(member)
                answers[member.pid] = self._ask(member, last, others_wrote, untouched, frozen)
            except TargetGone:
                self._forget(member)
        self._segments.take(answers.values())
        self._memfds.take(answers.values())
        # After the last look nobody asks again: what it names is sent, or in the images, whoever comes then.
        closed = Closed(self._segments.closed, self._memfds.closed, self._memfds.compared, files)
        known = untouched if last else closed
        return {pid: replace(answer, closed=known, others_wrote=others_wrote) for pid, answer in answers.items()}

    def take_gone(self) -> tuple[int, ...]:
        """Inner pids of the processes that have gone since the last call: forget their pages.

        A pid of a process that came and went between two calls is not among them; one that was used again is, and is to
        be forgotten before the answer about its new process is applied (which says ``fresh``)."""
        gone, self._gone = tuple(self._gone), []
        return gone

    def close(self) -> None:
        """Remove every trace from all processes. Idempotent."""
        for member in self._members.values():
            member.close()
        self._members.clear()
        self._segments.close()

    @property
    def at_freeze(self) -> Callable[[], None] | None:
        """To be called when all tasks are frozen and CRIU has not attached any segment; ``None``: need not be."""
        return self._segments.at_freeze if self._segments.closed else None

    def _meet(self) -> None:
        """Bring the members up to date with /proc."""
        alive: set[int] = set()
        zombies: set[int] = set()
        for pid in process_tree(self._root):
            started = start_time(pid)
            if started is None:
                zombies.add(pid)
                continue
            member = self._members.get(pid)
            if member is not None and member.started != started:
                self._forget(member)
                member = None
            if member is None:
                if self._shares_memory(pid):
                    continue
                member = self._members[pid] = _Member(pid, started, inner_pid(pid))
            alive.add(pid)
        for pid in self._members.keys() - alive:
            self._forget(self._members[pid])
        self._departed |= bool(zombies - self._zombies)
        self._zombies = zombies

    def _some_departed(self) -> bool:
        """Whether a process may have gone since this was asked last."""
        for member in self._members.values():
            reaped = reaped_faults(member.pid)
            self._departed |= reaped is None or reaped != member.reaped
            member.reaped = reaped or 0
        return self._departed

    def _shares_memory(self, pid: int) -> bool:
        """Whether a process that is new has the memory of one we know, which speaks for it."""
        return any(kcmp(pid, known, _KCMP_VM) == 0 for known in self._members)

    def _attach(self, member: _Member) -> None:
        member.tracker = self._make(member.pid)
        if start_time(member.pid) != member.started:  # the pid was used again while we attached
            member.close()
            raise TargetGone(f"process {member.pid} is gone")
        member.untracked = None

    def _attach_if_there(self, member: _Member) -> None:
        """Attach; a process that ended meanwhile is not missed, but for the root."""
        try:
            self._attach(member)
        except TargetGone:
            if member.pid == self._root:
                raise
            self._forget(member)

    def _try_attach(self, member: _Member) -> None:
        """Attach, or remember why not; the process is then dirty as a whole in every round."""
        try:
            self._attach(member)
            member.answered = False
        except TrackingFailed as error:
            if start_time(member.pid) != member.started:
                raise TargetGone(f"process {member.pid} is gone") from error
            member.untracked = error.message

    def _ask(
        self, member: _Member, last: bool, others_wrote: bool, untouched: Closed, frozen: DataOfObjects | None
    ) -> ProcessChanges:
        fresh = member.tracker is None or not member.answered
        if member.tracker is None:
            changes = scan_all(member.pid)
        else:
            changes = member.tracker.collect(last=last, others_wrote=others_wrote, closed=untouched, frozen=frozen)
        if start_time(member.pid) != member.started:
            raise TargetGone(f"process {member.pid} is gone")
        member.answered = member.tracker is not None
        return ProcessChanges(member.pid, member.inner_pid, member.started, fresh, changes, member.untracked)

    def _forget(self, member: _Member) -> None:
        member.close()
        self._members.pop(member.pid, None)
        self._gone.append(member.inner_pid)
        self._departed = True


def inner_pid(pid: int) -> int:
    """The pid in the innermost pid namespace of the process: the last number of NSpid in /proc/PID/status (proc(5))."""
    numbers = status_field(pid, "NSpid").split()
    return int(numbers[-1]) if numbers else pid


def reaped_faults(pid: int) -> int | None:
    """A number that grows with every child of a process that has ended and was waited for; ``None``: it need not."""
    if int(status_field(pid, "SigIgn") or "0", 16) >> (_SIGCHLD - 1) & 1:
        return None
    fields = stat_fields(pid)
    return int(fields[8]) + int(fields[10]) if fields else None
