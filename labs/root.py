"""The Debian root that all hosts stand on: built once, cached under the hash of its recipe, never written to."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
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
UNWANTED = ("doc", "doc-base", "info", "locale", "man", "i18n", "lintian", "bug")
OPTIONS = (
    "--variant=minbase",
    "--quiet",
    # The snapshot of testing a mirror serves may be older than the archive promises to keep it valid.
    '--aptopt=Acquire::Check-Valid-Until "false"',
    '--aptopt=Acquire::Languages "none"',
    "--dpkgopt=force-unsafe-io",
    *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in UNWANTED),
    f"--include={','.join(PACKAGES)}",
    # Every host gets keys of its own when it goes up.
    '--customize-hook=rm -f "$1"/etc/ssh/ssh_host_*',
)


def recipe_hash() -> str:
    recipe = "\n".join((SUITE, platform.machine(), *OPTIONS))
    return hashlib.sha256(recipe.encode()).hexdigest()[:12]


def cached_root() -> Path:
    return CACHE / f"root-{recipe_hash()}"


def is_cached() -> bool:
    return cached_root().is_dir()


def ensure() -> Path:
    """The root, built now if need be (some 20 s)."""
    root = cached_root()
    with _cache_locked():
        if not root.is_dir():
            _build(root)
            _remove_old(keep=root)
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


def _build(root: Path) -> None:
    """Build beside its place and rename: a root in its place is a whole one."""
    building = root.with_name("building")
    shutil.rmtree(building, ignore_errors=True)
    try:
        run(["mmdebstrap", *OPTIONS, *_trust(), SUITE, str(building), mirror()], timeout=900)
        building.rename(root)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _trust() -> list[str]:
    """The archive's keys by file: mmdebstrap would need gpg to find out which ones testing is signed with."""
    return [f"--keyring={keyring}" for keyring in KEYRINGS if keyring.exists()][:1]


def _remove_old(keep: Path) -> None:
    in_use = roots_in_use()
    for path in CACHE.glob("root-*"):
        if path != keep and str(path) not in in_use:
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
