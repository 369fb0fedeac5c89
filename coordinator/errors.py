"""The error tree: every failure a user can meet has a stable code, an exit status and a hint.

An error is a message (what and where), a code (which never changes once released), an exit status that says where
the service is now (``ExitCode``), and a hint (what to do). Errors cross the wire with their type: ``to_wire`` and
``from_wire`` keep the class, so that the coordinator can tell a refused restore from a dead link.

``docs/errors.md`` is generated from this file; a test compares the two.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, ClassVar


class ExitCode(IntEnum):
    """Exit statuses of ``livemove``: each says where the service is now."""

    MOVED = 0
    USAGE = 2
    REFUSED = 3
    ROLLED_BACK = 4
    CLEANUP_INCOMPLETE = 5
    IN_DOUBT = 6
    INTERRUPTED = 130


EXIT_MEANINGS: dict[ExitCode, str] = {
    ExitCode.MOVED: "Done. After `migrate` the service runs on the destination.",
    ExitCode.USAGE: "Usage or configuration: nothing was contacted, nothing was changed.",
    ExitCode.REFUSED: "Refused by a check: the service is untouched.",
    ExitCode.ROLLED_BACK: "Rolled back: the service runs on the source, with its connections.",
    ExitCode.CLEANUP_INCOMPLETE: "Moved, cleanup incomplete: the service runs on the destination.",
    ExitCode.IN_DOUBT: "In doubt: an operator must decide. Run `livemove recover ID`.",
    ExitCode.INTERRUPTED: "Interrupted and rolled back: the service runs on the source.",
}


class LivemoveError(Exception):
    """Base of all errors that are told to a user. ``message`` says what and where, ``hint`` what to do."""

    code: ClassVar[str] = "ERROR"
    exit_code: ClassVar[ExitCode] = ExitCode.REFUSED
    default_hint: ClassVar[str] = "This is a defect in livemove: please report it with the output above."
    registry: ClassVar[dict[str, type[LivemoveError]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.code in LivemoveError.registry:
            raise TypeError(f"error code {cls.code} is used twice")
        LivemoveError.registry[cls.code] = cls

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = self.default_hint if hint is None else hint

    def to_wire(self) -> dict[str, str]:
        """Return the error as plain data, for a message or for ``--json``."""
        return {"code": self.code, "message": self.message, "hint": self.hint}

    @staticmethod
    def from_wire(data: dict[str, Any]) -> LivemoveError:
        """Rebuild an error with the type it had on the other side; an unknown code becomes ``AgentFailed``."""
        kind = LivemoveError.registry.get(str(data.get("code")), AgentFailed)
        return kind(str(data.get("message", "unknown error")), str(data.get("hint") or kind.default_hint))


class ConfigError(LivemoveError):
    """The configuration file is missing, unreadable, or has a wrong or unknown key."""

    code = "CONFIG"
    exit_code = ExitCode.USAGE
    default_hint = "Correct the named key; docs/quickstart.md shows a complete configuration."


class UnknownWorkload(LivemoveError):
    """The named workload is not in the configuration."""

    code = "UNKNOWN_WORKLOAD"
    exit_code = ExitCode.USAGE
    default_hint = "Name a workload of the configuration, or add a [workloads.NAME] section."


class UnknownHost(LivemoveError):
    """The named host is not in the configuration."""

    code = "UNKNOWN_HOST"
    exit_code = ExitCode.USAGE
    default_hint = "Name a host of the configuration, or add a [hosts.NAME] section."


class UnknownMigration(LivemoveError):
    """No host and no local journal knows a migration of that id."""

    code = "UNKNOWN_MIGRATION"
    exit_code = ExitCode.USAGE
    default_hint = "`livemove status` lists the migrations that are unfinished."


class HostUnreachable(LivemoveError):
    """No SSH connection to the host could be made."""

    code = "HOST_UNREACHABLE"
    default_hint = "Check the host's address and port, that sshd runs, and that this machine can reach it."


class HostKeyMismatch(LivemoveError):
    """The host showed a key that is not the one in known_hosts, or known_hosts has none for it."""

    code = "HOST_KEY_MISMATCH"
    default_hint = (
        "If the host was reinstalled, put its new key into known_hosts after verifying it; "
        "otherwise somebody else is answering."
    )


class LoginRefused(LivemoveError):
    """The host refused the login."""

    code = "LOGIN_REFUSED"
    default_hint = "livemove logs in as root with the configured key: check `key` and the host's authorized_keys."


class HostUnfit(LivemoveError):
    """The host lacks something an agent needs to start at all (python3 ≥ 3.11, a writable cache)."""

    code = "HOST_UNFIT"
    default_hint = "Run `livemove doctor HOST` and mend what it names."


class SessionLost(LivemoveError):
    """The SSH session to an agent, or the agent itself, went away in the middle."""

    code = "SESSION_LOST"
    exit_code = ExitCode.IN_DOUBT
    default_hint = "The move goes on or back without the session; `livemove recover ID` tells and finishes it."


class ProtocolError(LivemoveError):
    """The other side speaks another version, or sent something that is no message."""

    code = "PROTOCOL"
    default_hint = "Coordinator and agents must be of one version; two versions of livemove may be mixed up."


class DeadlineExceeded(LivemoveError):
    """A step did not finish within its deadline."""

    code = "DEADLINE"
    default_hint = "Look at the host's load and at the link; a larger [policy] deadline can be configured."


class AgentFailed(LivemoveError):
    """The agent met an error it has no name for."""

    code = "AGENT_FAILED"


class AgentLost(LivemoveError):
    """An agent ended in the middle of a move (killed, out of memory, a reboot); its part was undone by its journal."""

    code = "AGENT_LOST"
    exit_code = ExitCode.ROLLED_BACK
    default_hint = (
        "Look in the host's log for what ended the agent (out of memory, a reboot), then start the move again."
    )


class CheckFailed(LivemoveError):
    """At least one check found a reason why the move would fail or lose something."""

    code = "CHECK_FAILED"
    default_hint = "Mend what the findings name; `livemove check WORKLOAD --to HOST` repeats the check."


class WorkloadNotRunning(LivemoveError):
    """No host, or not the expected host, runs the workload."""

    code = "WORKLOAD_NOT_RUNNING"
    default_hint = "`livemove status` shows where each workload runs; start it, or correct its section."


class WorkloadBusy(LivemoveError):
    """The same workload is being moved already, or an earlier move of it is unfinished."""

    code = "WORKLOAD_BUSY"
    default_hint = "Wait for the other move, or finish it with `livemove recover ID`."


class CommandFailed(LivemoveError):
    """An external command on a host failed; the message has the command, its status and its first explaining line."""

    code = "COMMAND_FAILED"
    default_hint = "The command can be pasted into a root shell on that host."


class DumpFailed(LivemoveError):
    """CRIU could not dump the workload; it runs on."""

    code = "DUMP_FAILED"
    default_hint = "The message has CRIU's first error; `livemove check` and `livemove doctor` name most causes."


class RestoreFailed(LivemoveError):
    """CRIU could not restore the workload on the destination."""

    code = "RESTORE_FAILED"
    default_hint = "The message has CRIU's first error, often a file that differs between the hosts."


class NotAccepting(LivemoveError):
    """Connections wait for the service to accept them, and it does not: a move would cut them."""

    code = "NOT_ACCEPTING"
    exit_code = ExitCode.ROLLED_BACK
    default_hint = "See whether the service is stopped or too busy to accept; policy.accept_s gives it more time."


class FrozenTooLong(LivemoveError):
    """The service was frozen for longer than the policy allows, so the move was given up."""

    code = "FROZEN_TOO_LONG"
    default_hint = "Raise policy.freeze_s, or move the service when it uses less memory."


class ChannelFailed(LivemoveError):
    """The channel between the two agents could not be made, or broke."""

    code = "CHANNEL_FAILED"
    default_hint = "The source must reach the destination's SSH address on a free TCP port: look for a firewall."


class PeerAborted(LivemoveError):
    """The other half gave up; the message has its reason."""

    code = "PEER_ABORTED"
    default_hint = "The reason given by the other half says what to mend."


class NetworkChangeFailed(LivemoveError):
    """An address, a gate or an announcement could not be changed on a host."""

    code = "NETWORK_CHANGE_FAILED"
    default_hint = "Run `livemove doctor HOST`: nf_tables and CAP_NET_ADMIN are needed."


class NotEnoughSpace(LivemoveError):
    """The images do not fit into the memory of a host."""

    code = "NOT_ENOUGH_SPACE"
    default_hint = "Free memory on the named host: images are kept in memory (tmpfs) during the freeze."


class Interrupted(LivemoveError):
    """The operator interrupted the move before its commit point."""

    code = "INTERRUPTED"
    exit_code = ExitCode.INTERRUPTED
    default_hint = "The service runs on the source; start the move again when you like."


class InDoubt(LivemoveError):
    """The outcome cannot be told from here: the half that knows cannot be asked."""

    code = "IN_DOUBT"
    exit_code = ExitCode.IN_DOUBT
    default_hint = "Make both hosts reachable and run `livemove recover ID`; nothing is resumed by guessing."


class IllegalTransition(LivemoveError):
    """A half tried a step that its phase does not allow."""

    code = "ILLEGAL_TRANSITION"


class JournalDamaged(LivemoveError):
    """A journal holds a line that is no record, elsewhere than at its torn end."""

    code = "JOURNAL_DAMAGED"
    exit_code = ExitCode.IN_DOUBT
    default_hint = "Look at the file; decide by hand which host runs the service, then remove it."


class MemoryLost(LivemoveError):
    """After the commit, pages of the service's memory could not be had: it was killed rather than run without them."""

    code = "MEMORY_LOST"
    exit_code = ExitCode.IN_DOUBT
    default_hint = "The service is down: start it afresh. The message says which part failed."


class TrackingFailed(LivemoveError):
    """It cannot be told which memory pages of a process change while it runs."""

    code = "TRACKING_FAILED"
    default_hint = "The message says what stands in the way; `--mode stop-copy` moves without looking at pages before."


class FilesNotCopied(LivemoveError):
    """The workload's files could not be made equal on the destination."""

    code = "FILES_NOT_COPIED"
    exit_code = ExitCode.ROLLED_BACK
    default_hint = "The message has rsync's first complaint: room, rights, or a file system that lacks something."


class FilesChanged(LivemoveError):
    """While the service was frozen somebody else wrote to its files, so that no copy of them can be trusted."""

    code = "FILES_CHANGED"
    exit_code = ExitCode.ROLLED_BACK
    default_hint = "Find out who writes there (backup, log rotation, another service), and stop that for the move."


class NotConverging(LivemoveError):
    """The service writes faster than its memory can be copied, and the policy says to give up then."""

    code = "NOT_CONVERGING"
    exit_code = ExitCode.ROLLED_BACK
    default_hint = "Allow a longer freeze (--max-freeze), or choose --give-up freeze or post-copy."
