"""A system call made inside a running process leaves it exactly as found: over real processes on this kernel."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from pathlib import Path

import pytest

from coordinator.agent.memory.ptrace import TargetGone, status_field
from coordinator.agent.memory.registers import this_machine
from coordinator.agent.memory.syscall_injection import StoppedThread, with_process_stopped, with_stopped_thread
from coordinator.agent.memory.userfault import take_userfaultfd
from coordinator.agent.process import Command, start
from coordinator.errors import TrackingFailed
from tests.contract.memory_target import Target, in_call, memory_of, names, state, until

X86 = os.uname().machine == "x86_64"
pytestmark = [
    pytest.mark.skipif(this_machine() is None, reason="no register layout for this machine"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs CAP_SYS_PTRACE"),
]
GETPID = 39 if X86 else 172


def inject(pid: int) -> None:
    os.close(take_userfaultfd(pid))


def traces(pid: int) -> tuple[list[str], list[str], str, str]:
    """What an injection could leave: descriptors, mappings, signal masks and the tracer."""
    maps = [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "[heap]" not in line]
    masks = status_field(pid, "SigBlk") + status_field(pid, "SigPnd") + status_field(pid, "ShdPnd")
    return names(f"/proc/{pid}/fd"), maps, masks, status_field(pid, "TracerPid")


def test_two_hundred_times_leave_no_trace(target: Target) -> None:
    start = target.run("(a := area(64))")
    target.run("[put(a + n * PAGE, n) for n in range(64)] and None")
    until(lambda: in_call(target.pid, 0))
    before, memory = traces(target.pid), memory_of(target.pid, start, 64 * 4096)
    for _ in range(200):
        inject(target.pid)
    until(lambda: in_call(target.pid, 0))
    assert traces(target.pid) == before
    assert memory_of(target.pid, start, 64 * 4096) == memory
    assert target.run("sum(range(1000))") == 499500


def test_the_call_is_made_by_the_target(target: Target) -> None:
    assert (
        with_stopped_thread(target.pid, lambda thread: (thread.call(GETPID), thread.call(GETPID))) == (target.pid,) * 2
    )


async def test_a_child_of_ours_that_we_stop_has_not_ended(tmp_path: Path) -> None:
    """The event loop waits for it, and must not take its stops (see ``process.py``)."""
    running = await start(Command(("sleep", "1000"), {}), tmp_path / "output")
    ended = asyncio.ensure_future(running.wait())
    for _ in range(50):
        assert await asyncio.to_thread(with_stopped_thread, running.pid, call_getpid) == running.pid
    assert not ended.done()
    running.kill()
    assert await ended == -signal.SIGKILL


def call_getpid(thread: StoppedThread) -> int:
    return thread.call(GETPID)


CALLS = {
    "nanosleep": (35, "libc.syscall(35, ctypes.create_string_buffer(struct.pack('2q', 1, 0)), None)", 0),
    "clock_nanosleep": (
        230,
        "libc.clock_nanosleep(1, 0, ctypes.create_string_buffer(struct.pack('2q', 1, 0)), None)",
        0,
    ),
    "poll": (7, "libc.poll(None, 0, 1000)", 0),
    "ppoll": (271, "libc.ppoll(None, 0, ctypes.create_string_buffer(struct.pack('2q', 1, 0)), None)", 0),
    "select": (
        270,
        "libc.syscall(270, 0, None, None, None, ctypes.create_string_buffer(struct.pack('2q', 1, 0)), None)",
        0,
    ),
    "epoll_wait": (232, "libc.epoll_wait(libc.epoll_create1(0), ctypes.create_string_buffer(12), 1, 1000)", 0),
    "epoll_pwait": (281, "libc.epoll_pwait(libc.epoll_create1(0), ctypes.create_string_buffer(12), 1, 1000, None)", 0),
    "futex": (
        202,
        "(libc.syscall(202, ctypes.create_string_buffer(4), 0, 0, ctypes.create_string_buffer(struct.pack("
        "'2q', 1, 0))), ctypes.get_errno())",
        (-1, 110),
    ),
    "sigtimedwait": (
        128,
        "(libc.syscall(128, ctypes.create_string_buffer(struct.pack('Q', 1 << 9)), None, ctypes."
        "create_string_buffer(struct.pack('2q', 1, 0)), 8), ctypes.get_errno())",
        (-1, 11),
    ),
    "recv with a timeout": (
        45,
        "(s := __import__('socket').socketpair(), s[0].setsockopt(1, 20, struct.pack('2q', 1, 0)),"
        "libc.recv(s[0].fileno(), ctypes.create_string_buffer(1), 1, 0), ctypes.get_errno())[2:]",
        (-1, 11),
    ),
    "semtimedop": (
        220,
        "(libc.semtimedop(libc.semget(0, 1, 0o1600), ctypes.create_string_buffer(struct.pack('Hhh', 0, -1, 0)),"
        "1, ctypes.create_string_buffer(struct.pack('2q', 1, 0))), ctypes.get_errno())",
        (-1, 11),
    ),
}


@pytest.mark.skipif(not X86, reason="numbers of x86-64")
def test_an_interrupted_call_goes_on_as_if_nothing_had_happened() -> None:
    """Each takes a second, from its own beginning to its end."""
    with contextlib.ExitStack() as ends:
        targets = {name: ends.enter_context(Target()) for name in CALLS}
        for name, target in targets.items():
            interrupt(target, *CALLS[name][:2])
        answers = {name: target.answer() for name, target in targets.items()}
    assert answers == {name: expected for name, (_, _, expected) in CALLS.items()}


def interrupt(target: Target, number: int, code: str) -> None:
    """Tell it to make a call, and inject others up to three times before that returns."""
    target.run("ctypes.set_errno(0)")
    target.send(code)
    until(lambda: in_call(target.pid, number))  # before, it reads what it is told
    inject(target.pid)
    for _ in range(2):
        until(lambda: state(target.pid) == "S")
        if in_call(target.pid, number):
            inject(target.pid)


def test_reads_and_waits_without_end_go_on(target: Target) -> None:
    inside, outside = os.pipe()
    target.run(f"(p := os.open('/proc/{os.getpid()}/fd/{inside}', 0))")
    for code, number, answer in (
        ("os.read(p, 10)", 0, b"x"),
        (
            "(e := select.epoll(), e.register(p, 1),"
            "libc.epoll_wait(e.fileno(), ctypes.create_string_buffer(12), 1, -1))[2]",
            232,
            1,
        ),
        ("libc.poll(ctypes.create_string_buffer(struct.pack('ihh', p, 1, 0)), 1, -1)", 7, 1),
    ):
        target.send(code)
        until(lambda number=number: in_call(target.pid, number))  # type: ignore[misc]
        for _ in range(5):
            inject(target.pid)
        until(lambda number=number: in_call(target.pid, number))  # type: ignore[misc]
        os.write(outside, b"x")
        assert target.answer() == answer
        target.run("number and os.read(p, 1) and None".replace("number", str(number)))
    os.close(inside)
    os.close(outside)


def test_no_signal_is_lost_or_doubled(target: Target) -> None:
    """Queued signals (SIGRTMIN) are sent all the time and counted by a handler in C, next to a timer of 1 kHz."""
    target.run("r, w = os.pipe2(os.O_NONBLOCK); libc.fcntl(w, 1031, 1 << 20)")
    target.run("signal.set_wakeup_fd(w, warn_on_full_buffer=False)")
    target.run("[signal.signal(n, lambda *_: None) for n in (signal.SIGRTMIN, signal.SIGALRM)] and None")
    target.run("signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001) and None")
    sent = 0
    stop = threading.Event()

    def send() -> None:
        nonlocal sent
        while not stop.is_set():
            os.kill(target.pid, signal.SIGRTMIN)
            sent += 1
            stop.wait(0.0002)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        for _ in range(200):
            inject(target.pid)
    finally:
        stop.set()
        sender.join()
    target.run("signal.setitimer(signal.ITIMER_REAL, 0) and None")
    target.run("caught = b''")
    target.run("exec('while True:\\n  try: caught += os.read(r, 65536)\\n  except BlockingIOError: break')")
    assert target.run("caught.count(signal.SIGRTMIN)") == sent
    assert target.run("caught.count(signal.SIGALRM)") > 0


def test_arithmetic_goes_on_in_all_registers(target: Target) -> None:
    """A thread that never sleeps is stopped between any two instructions."""
    target.run("import hashlib; data = bytes(range(256)) * 40000; expected = hashlib.sha256(data).hexdigest()")
    target.send(
        "all(hashlib.sha256(data).hexdigest() == expected for _ in range(60))"
        " and all(x * 1.5 == x + x / 2 for x in range(200000))"
    )
    for _ in range(200):
        inject(target.pid)
    assert target.answer() is True


def test_many_threads(target: Target) -> None:
    target.run("b = [area(64) for _ in range(8)]")
    target.run("halt = False; count = [0] * 8")
    target.run("exec('def work(n):\\n  while not halt: libc.memset(b[n], n, 64 * PAGE); count[n] += 1')")
    target.run("ts = [threading.Thread(target=work, args=(n,)) for n in range(8)]; [t.start() for t in ts] and None")
    for _ in range(50):
        inject(target.pid)
    before = target.run("list(count)")
    until(lambda: all(now > then for now, then in zip(target.run("list(count)"), before, strict=True)))
    target.run("halt = True; [t.join() for t in ts] and None")
    for tid in names(f"/proc/{target.pid}/task"):
        assert status_field(int(tid), "TracerPid") == "0"


SECCOMP = (
    "filter = struct.pack('HBBI' * 4, 0x20, 0, 0, 0, 0x15, 0, 1, 323, 0x06, 0, 0, 0x80000000, 0x06, 0, 0, 0x7fff0000);"
    "buffer = ctypes.create_string_buffer(filter); program = struct.pack('HxxxxxxQ', 4, ctypes.addressof(buffer));"
    "done = (libc.prctl(38, 1, 0, 0, 0), libc.prctl(22, 2, ctypes.create_string_buffer(program), 0, 0))"
)


@pytest.mark.skipif(not X86, reason="numbers of x86-64")
def test_a_filter_that_kills_is_suspended_and_stays(target: Target) -> None:
    target.run(SECCOMP)
    assert target.run("done") == (0, 0)
    inject(target.pid)
    assert target.run("40 + 2") == 42
    assert status_field(target.pid, "Seccomp") == "2"
    target.send("libc.syscall(323, 1)")
    assert target.process.wait() == -signal.SIGSYS


def test_a_process_that_hides_its_memory(target: Target) -> None:
    assert target.run("libc.prctl(4, 0, 0, 0, 0)") == 0  # PR_SET_DUMPABLE
    inject(target.pid)
    assert target.run("libc.prctl(3, 0, 0, 0, 0)") == 0


def test_a_stopped_process_stays_stopped(target: Target) -> None:
    os.kill(target.pid, signal.SIGSTOP)
    until(lambda: state(target.pid) == "T")
    inject(target.pid)
    until(lambda: state(target.pid) == "T")
    os.kill(target.pid, signal.SIGCONT)
    assert target.run("40 + 2") == 42


def test_a_traced_process_is_refused_and_named(target: Target) -> None:
    with Target() as debugger:
        assert debugger.run(f"libc.ptrace(0x4206, {target.pid}, None, None)") == 0
        with pytest.raises(TrackingFailed, match=f"traced by process {debugger.pid}"):
            take_userfaultfd(target.pid)
    until(lambda: status_field(target.pid, "TracerPid") == "0")
    inject(target.pid)
    assert target.run("40 + 2") == 42


def test_a_full_descriptor_table_is_an_error_and_nothing_else(target: Target) -> None:
    target.run(
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/proc/self/fd')) - 1, 4096))"
    )
    until(lambda: in_call(target.pid, 0))
    before = traces(target.pid)
    with pytest.raises(TrackingFailed, match="Too many open files"):
        take_userfaultfd(target.pid)
    until(lambda: in_call(target.pid, 0))
    assert traces(target.pid) == before


def test_death_in_the_middle(target: Target) -> None:
    def die(thread: StoppedThread) -> int:
        thread.call(GETPID)
        os.kill(target.pid, signal.SIGKILL)
        return thread.call(GETPID)

    with pytest.raises(TargetGone):
        with_stopped_thread(target.pid, die)
    until(lambda: not Path(f"/proc/{target.pid}").exists())  # reaped by us: here the tracer is the parent, too


def test_death_at_any_time() -> None:
    for _ in range(10):
        with Target() as target:
            killer = threading.Thread(target=lambda pid=target.pid: os.kill(pid, signal.SIGKILL))
            killer.start()
            with pytest.raises(TargetGone):
                for _ in range(100_000):
                    inject(target.pid)
            killer.join()
            until(lambda pid=target.pid: target.process.poll() is not None or not Path(f"/proc/{pid}").exists())  # type: ignore[misc]


def test_a_process_that_is_gone() -> None:
    with Target() as target:
        pass
    with pytest.raises(TargetGone):
        take_userfaultfd(target.pid)


def test_an_error_of_ours_in_the_middle_leaves_it_as_found(target: Target) -> None:
    def fail(thread: StoppedThread) -> None:
        thread.call(GETPID)
        raise ValueError("ours")

    until(lambda: in_call(target.pid, 0))
    before = traces(target.pid)
    with pytest.raises(ValueError, match="ours"):
        with_stopped_thread(target.pid, fail)
    until(lambda: in_call(target.pid, 0))
    assert traces(target.pid) == before
    assert target.run("40 + 2") == 42


def test_all_threads_can_be_stopped(target: Target) -> None:
    target.run("halt = False; count = [0] * 4")
    target.run("exec('def work(n):\\n  while not halt: count[n] += 1; time.sleep(0)')")
    target.run("ts = [threading.Thread(target=work, args=(n,)) for n in range(4)]; [t.start() for t in ts] and None")
    for _ in range(20):
        states = with_process_stopped(
            target.pid, lambda: {state(int(tid)) for tid in names(f"/proc/{target.pid}/task")}
        )
        assert states == {"t"}
    target.run("halt = True; [t.join() for t in ts] and None")
