"""What a real service of the lab is: its program, its files, and what it needed to be moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from labs import oci


@dataclass(frozen=True)
class Service:
    """A service from Debian packages, in a container. The clients are the module `labs.clients.NAME`.

    In commands, settings and files `@ADDRESS@` is the service's address, `@PORT@` its port and `@DATA@` its directory,
    which is on storage that all hosts have.
    """

    name: str
    address: str
    port: int
    command: tuple[str, ...]
    needed: str
    """What it needed beside a container with no io_uring, in a few words; more is in docs/services/NAME.md."""

    files: Mapping[str, str] = field(default_factory=dict)
    """Put into the directory, by name."""

    setup: tuple[str, ...] = ()
    """Shell commands, run in the directory as the service's user before the first start."""

    user: str = "root"
    capabilities: tuple[str, ...] = tuple(oci.CAPABILITIES)
    environment: Mapping[str, str] = field(default_factory=dict)
    as_process: Mapping[str, str] = field(default_factory=dict)
    """The environment's further variables where it is a plain process, whose /tmp is the host's."""

    refused: Mapping[str, str] = field(default_factory=dict)
    """By runtime under which it cannot be moved: the code with which livemove refuses to."""
