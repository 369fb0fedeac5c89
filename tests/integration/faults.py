"""Trouble, made at a chosen point: CRIU that stands still until it is told to go on, agents and sessions that end.

Nothing here sleeps and hopes: a wrapper of CRIU or runc on one host, first in its PATH, says when it was reached and
waits, within bounds, for a file before it becomes the real program.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from labs.machines import Host
from tests.integration.command import Livemove

WRAPPERS = "/usr/local/bin"
FOLDER = "/run/hold"
BOUND_S = 30.0

_HOLD = """\
#!/bin/sh
if {condition}; then
    touch {folder}/reached
    for _ in $(seq 1400); do
        [ -e {folder}/go ] && break
        sleep 0.02
    done
fi
exec {program} "$@"
"""
_FAIL = """\
#!/bin/sh
case "$*" in *{word}*) echo "Error (lab): no {word} today" >&2; exit 1 ;; esac
exec {program} "$@"
"""

#: Runs the real program, and keeps its log.
_KEEP_LOG = """\
#!/bin/sh
{program} "$@"
status=$?
if {condition}; then
    cat "${{CRIU_CONFIG_FILE%/hook/*}}"/*.log >>{kept}
fi
exit $status
"""

#: Becomes the real program, under a filter that has a listener already: a process can have but one. Another process
#: keeps that, for as long as the program lives.
_LISTENED_TO = """\
#!/usr/bin/python3
import ctypes, os, select, struct, sys
if {condition}:
    libc = ctypes.CDLL(None, use_errno=True)
    allow = ctypes.create_string_buffer(struct.pack("=HBBI", 6, 0, 0, 0x7FFF0000))
    program = ctypes.create_string_buffer(struct.pack("=HxxxxxxQ", 1, ctypes.addressof(allow)))
    number = {{"x86_64": 317, "aarch64": 277}}[os.uname().machine]
    listener = libc.syscall(number, 1, 1 << 3, program)
    if listener < 0:
        sys.exit("seccomp: " + os.strerror(ctypes.get_errno()))
    program = os.pidfd_open(os.getpid())
    if not (child := os.fork()):
        if not os.fork():
            select.select([program], [], [])
        os._exit(0)
    os.waitpid(child, 0)
os.execv("{program}", ["{program}", *sys.argv[1:]])
"""

#: The agent is the python3 that sshd has started; its command line names its entry point.
_AGENTS = """\
for file in /proc/[0-9]*/cmdline; do
    if tr '\\0\\n' '  ' <"$file" 2>/dev/null | grep -q '^python3 .*coordinator[.]agent[.]server'; then
        pid=${file%/cmdline}; echo "${pid#/proc/}"
    fi
done
"""

#: sshd of a session is the agent's first ancestor of that name.
_DROP_SESSION = """\
pid=$0
while [ "$pid" -gt 1 ]; do
    pid=$(sed 's/.*) //' /proc/$pid/stat | cut -d' ' -f2)
    case "$(cat /proc/$pid/comm)" in sshd*) kill -9 "$pid"; exit ;; esac
done
exit 1
"""

#: Stops the filler when the tasks have begun to run.
_STOP_FILLING = """\
import glob, os, signal, sys, time
JOURNALS = "/var/lib/livemove/*/destination.jsonl"
before = set(glob.glob(JOURNALS))
print("waiting", flush=True)
end = time.monotonic() + 60
while not any('"phase":"RESUMED"' in open(path).read() for path in set(glob.glob(JOURNALS)) - before):
    if time.monotonic() > end:
        sys.exit("no move in 60 s")
    time.sleep(0.0005)
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        words = open(f"/proc/{pid}/cmdline").read().split("\\0")
    except OSError:
        continue
    if words[2:4] == ["-S", "-c"] and "memory.filler" in words[4]:
        os.kill(int(pid), signal.SIGSTOP)
        sys.exit(print(pid))
sys.exit("there is no filler")
"""

#: Traces a process, as a debugger does, until it is killed.
_TRACE = """\
import ctypes, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.ptrace(0x4206, int(sys.argv[1]), None, None) < 0:
    sys.exit("cannot trace: errno %d" % ctypes.get_errno())
print("tracing", flush=True)
signal.pause()
"""


#: Conditions in a shell that stands for CRIU. On the destination the first image is a link while images are missing.
_OF_A_MOVE = '[ "${CRIU_CONFIG_FILE#/run/livemove/}" != "$CRIU_CONFIG_FILE" ]'
_IMAGES_COMPLETE = (
    "first=${CRIU_CONFIG_FILE%/*/hook/*}/images/inventory.img; "
    'while [ -L "$first" ] && [ -e "$first" ]; do sleep 0.01; done'
)


class Hold:
    """A program on a host that stands still before it does anything."""

    def __init__(self, host: Host, folder: str) -> None:
        self.host = host
        self.folder = folder

    def reached(self, move: Livemove) -> None:
        """Return when the program stands there, in the course of this move."""
        until(lambda: self._is_reached() or move.process.poll() is not None, f"{self.folder} on {self.host.name}")
        assert self._is_reached(), move.finish().stderr

    def _is_reached(self) -> bool:
        return self.host.seen_from_here(f"{self.folder}/reached").exists()

    def go(self) -> None:
        """Let it go on. May be repeated."""
        self.host.run(["touch", f"{self.folder}/go"])


@contextmanager
def held(host: Host, program: str, condition: str) -> Iterator[Hold]:
    """Hold every call of a program on this host for which a shell condition is true, until `go`."""
    folder = f"{FOLDER}-{program}"
    host.run(["mkdir", folder])
    hold = Hold(host, folder)
    script = _HOLD.format(condition=condition, folder=folder, program=_real(host, program))
    try:
        with _wrapped(host, program, script):
            try:
                yield hold
            finally:
                hold.go()
    finally:
        host.run(["rm", "-r", folder])


def held_criu(host: Host) -> AbstractContextManager[Hold]:
    """Hold CRIU. On the destination that is in the middle of the freeze: the source has dumped and sent everything. On
    the source it is the last moment before the freeze. A self-test goes on: it has no configuration file of ours."""
    return held(host, "criu", f"{_OF_A_MOVE} && {{ {_IMAGES_COMPLETE}; }}")


def held_runc(host: Host, verb: str) -> AbstractContextManager[Hold]:
    """Hold `runc VERB` from now on."""
    return held(host, "runc", f'[ "$1" = {verb} ]')


@contextmanager
def failing_criu(host: Host, word: str) -> Iterator[None]:
    """A CRIU on this host that fails whenever this word is on its command line."""
    with _wrapped(host, "criu", _FAIL.format(word=word, program=_real(host, "criu"))):
        yield


@contextmanager
def kept_criu_log(host: Host) -> Iterator[str]:
    """The path of a file on this host that gets what CRIU logs in a move."""
    kept = f"{FOLDER}-criu.log"
    try:
        with _wrapped(host, "criu", _KEEP_LOG.format(condition=_OF_A_MOVE, kept=kept, program=_real(host, "criu"))):
            yield kept
    finally:
        host.run(["rm", "-f", kept])


@contextmanager
def criu_that_refuses_a_filter(host: Host) -> Iterator[None]:
    """A CRIU on this host that cannot be put under the scan filter (EBUSY), but in self-tests. Under any filter it can
    dump only tasks that have none: a process tree."""
    ours = 'os.environ.get("CRIU_CONFIG_FILE", "").startswith("/run/livemove/")'
    with _wrapped(host, "criu", _LISTENED_TO.format(condition=ours, program=_real(host, "criu"))):
        yield


@contextmanager
def _wrapped(host: Host, program: str, script: str) -> Iterator[None]:
    host.write_file(f"{WRAPPERS}/{program}", script, 0o755)
    try:
        yield
    finally:
        host.run(["rm", f"{WRAPPERS}/{program}"])


def _real(host: Host, program: str) -> str:
    return host.run(["sh", "-c", f"command -v {program}"]).stdout.strip()


@contextmanager
def mounted_over(host: Host, source: str, target: str) -> Iterator[None]:
    """Another file in place of one of the host's own."""
    host.run(["mount", "--bind", source, target])
    try:
        yield
    finally:
        host.run(["umount", target])


@contextmanager
def moved_away(host: Host, path: str) -> Iterator[None]:
    """A file that is not where it should be."""
    host.run(["mv", path, f"{path}.away"])
    try:
        yield
    finally:
        host.run(["mv", f"{path}.away", path])


@contextmanager
def refusing_ssh(host: Host) -> Iterator[None]:
    """The host as it looks without sshd: connections to its port are refused. (Its init is the parent of sshd.)"""
    rules = (
        "add table inet lab-ssh; add chain inet lab-ssh in { type filter hook input priority 0; };"
        "add rule inet lab-ssh in tcp dport 22 reject with tcp reset"
    )
    host.run(["nft", rules])
    try:
        yield
    finally:
        host.run(["nft", "delete table inet lab-ssh"])


def agents(host: Host) -> list[int]:
    """The agents that run on a host, as it counts its processes."""
    return [int(line) for line in host.run(["sh", "-c", _AGENTS]).stdout.split()]


def kill_agent(host: Host) -> None:
    """Kill the host's one agent; return when it is gone."""
    (pid,) = agents(host)
    host.run(["kill", f"-{signal.SIGKILL.value}", str(pid)])
    until(lambda: not agents(host), f"the end of the agent on {host.name}")


def signal_agent(host: Host, name: str) -> None:
    """Send the host's one agent a signal."""
    (pid,) = agents(host)
    host.run(["kill", f"-{name}", str(pid)])


@contextmanager
def filling_stopped(host: Host) -> Iterator[Callable[[Livemove], int]]:
    """Of the next move to this host: stop the filler while it fills in memory in the background. Yields a
    function that waits for that moment and returns the filler's pid."""
    watcher = host.popen(["python3", "-I", "-c", _STOP_FILLING], stdout=subprocess.PIPE, text=True)
    assert watcher.stdout is not None
    assert watcher.stdout.readline() == "waiting\n"
    found: list[int] = []

    def stopped(move: Livemove) -> int:
        assert watcher.stdout is not None
        line = watcher.stdout.readline()
        assert line, move.finish().stderr
        found.append(int(line))
        return found[0]

    try:
        yield stopped
    finally:
        watcher.kill()
        watcher.communicate()
        for pid in found:
            host.run(["kill", "-CONT", str(pid)], check=False)


@contextmanager
def traced(host: Host, pid: int) -> Iterator[None]:
    """A process that somebody else traces: nobody else can."""
    tracer = host.popen(["python3", "-I", "-c", _TRACE, str(pid)], stdout=subprocess.PIPE, text=True)
    try:
        assert tracer.stdout is not None
        assert tracer.stdout.readline() == "tracing\n"
        yield
    finally:
        tracer.kill()
        tracer.communicate()


@contextmanager
def largest_file(host: Host, size_bytes: int) -> Iterator[None]:
    """No session on the host may make a file, in memory or elsewhere, larger than this: a page store meets what it does
    when the memory is used up (an error of pwrite), and the memory is not used up."""
    listener = host.run(["pgrep", "-o", "-x", "sshd"]).stdout.strip()
    host.run(["prlimit", "--pid", listener, f"--fsize={size_bytes}:"])
    try:
        yield
    finally:
        host.run(["prlimit", "--pid", listener, "--fsize=unlimited:"])


def last_phase(host: Host, role: str) -> str:
    """The last phase in the newest journal of that role on a host."""
    journals = host.seen_from_here("/var/lib/livemove").glob(f"*/{role}.jsonl")
    newest = max(journals, key=lambda path: path.stat().st_mtime_ns)
    records = [json.loads(line) for line in newest.read_text().splitlines()]
    return str([record["phase"] for record in records if record["kind"] == "phase"][-1])


def drop_session(host: Host) -> None:
    """Kill the sshd process that serves the session of the host's one agent; the agent itself is left alone."""
    (agent,) = agents(host)
    host.run(["sh", "-c", _DROP_SESSION, str(agent)])


def until(condition: Callable[[], bool], what: str | Callable[[], object], bound_s: float = BOUND_S) -> None:
    """Wait for a condition, which is asked again and again within bounds."""
    end = time.monotonic() + bound_s
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not so after {bound_s:g} s: {what() if callable(what) else what}")
        time.sleep(0.02)
