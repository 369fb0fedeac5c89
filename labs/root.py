"""The Debian roots that hosts stand on: built once, cached under the hash of their recipe, never written to."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from labs.commands import LabError, run
from labs.state import roots_in_use

CACHE = Path("/var/cache/livemove-lab")
KEYRINGS = tuple(Path("/usr/share/keyrings", f"debian-archive-keyring.{kind}") for kind in ("pgp", "gpg"))
# Testing, because CRIU must be 4.2 or newer on kernels from 6.16 on.
SUITE = "testing"
PACKAGES = (
    "criu",
    "iproute2",
    "iputils-ping",
    "nftables",
    "openssh-client",
    "openssh-server",
    "procps",
    "python3",
    "rsync",
    "runc",
    "tini",
    "util-linux",
)
RUNTIMES = ("crun", "libcriu2", "podman")
EXTRAS: dict[str, tuple[str, ...]] = {
    "base": (),
    "nexuiz": ("nexuiz-server",),
    "nexuiz-client": ("nexuiz", "xvfb"),
    "runtimes": RUNTIMES,
    "services": (
        *RUNTIMES,
        "memcached",
        "mosquitto",
        "nginx",
        "ngircd",
        "nodejs",
        "openjdk-25-jre-headless",
        "postgresql",
        "redis-server",
        "teeworlds-server",
    ),
}
"""Sets of packages beside those of every lab. Each has a root of its own, built when the first lab asks for it:
``labs/lab up --packages NAME``, ``Lab.up(name, packages="NAME")``; in tests the fixture ``packaged_lab``."""

OBSOLETE_S = 7 * 86400
"""A root of another recipe (another checkout's) is kept so long."""

UNWANTED = ("doc", "doc-base", "info", "locale", "man", "i18n", "lintian", "bug")
OPTIONS = (
    "--variant=minbase",
    "--quiet",
    # The snapshot of testing a mirror serves may be older than the archive promises to keep it valid.
    '--aptopt=Acquire::Check-Valid-Until "false"',
    '--aptopt=Acquire::Languages "none"',
    "--dpkgopt=force-unsafe-io",
    *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in UNWANTED),
    # OpenJDK's packages cannot be installed without a directory for their manual pages.
    '--essential-hook=mkdir -p "$1"/usr/share/man/man1',
    # Every host gets keys of its own when it goes up.
    '--customize-hook=rm -f "$1"/etc/ssh/ssh_host_*',
)


def options(packages: str) -> tuple[str, ...]:
    """mmdebstrap's options for a set of packages; a LabError for one that is not there."""
    if packages not in EXTRAS:
        raise LabError(f"no set of packages {packages!r}; there are: {', '.join(EXTRAS)}")
    return (*OPTIONS, f"--include={','.join((*PACKAGES, *EXTRAS[packages]))}")


def cached_root(packages: str) -> Path:
    """Where the root of a set of packages is, or will be."""
    recipe = "\n".join((SUITE, platform.machine(), *options(packages)))
    return CACHE / f"root-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def is_cached(packages: str) -> bool:
    return cached_root(packages).is_dir()


def ensure(packages: str) -> Path:
    """The root with that set of packages, built now if need be (`base`: some 20 s)."""
    root = cached_root(packages)
    with _cache_locked():
        if not root.is_dir():
            _build(root, packages)
            _remove_old()
    return root


@contextmanager
def _cache_locked() -> Iterator[None]:
    CACHE.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(CACHE, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _build(root: Path, packages: str) -> None:
    """Build beside its place and rename: a root in its place is a whole one."""
    building = root.with_name("building")
    shutil.rmtree(building, ignore_errors=True)
    try:
        run(["mmdebstrap", *options(packages), *_trust(), SUITE, str(building), mirror()], timeout=900)
        building.rename(root)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _trust() -> list[str]:
    """The archive's keys by file: mmdebstrap would need gpg to find out which ones testing is signed with."""
    return [f"--keyring={keyring}" for keyring in KEYRINGS if keyring.exists()][:1]


def _remove_old() -> None:
    keep = roots_in_use() | {str(cached_root(packages)) for packages in EXTRAS}
    for path in CACHE.glob("root-*"):
        # The time of its renaming, which nothing changes later: when it was built.
        if str(path) not in keep and time.time() - path.stat().st_ctime > OBSOLETE_S:
            with suppress(OSError):  # space only: the next build tries again
                shutil.rmtree(path)


def mirror() -> str:
    """The mirror this machine takes its own packages from."""
    targets = run(["apt-get", "indextargets", "--format", "$(RELEASE) $(REPO_URI)", "Created-By: Packages"])
    release = platform.freedesktop_os_release().get("VERSION_CODENAME", SUITE)
    for line in targets.stdout.splitlines():
        suite, _, address = line.partition(" ")
        if suite in {release, SUITE, "stable", "sid"}:
            return address
    raise LabError(
        f"no Debian mirror for {release} in this machine's apt sources (/etc/apt/sources.list,"
        " /etc/apt/sources.list.d): the hosts' root is built from it; add one"
    )
