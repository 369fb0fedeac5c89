"""What is pushed to a host: the agent, the modules it shares with the coordinator, netfix, and pyroute2.

The bundle is a reproducible tar archive, so its SHA-256 names it: a host that has a folder of that name in its cache
has exactly this code. Nothing of livemove has to be installed on a host. What is sent is compressed.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import tarfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

#: Where a host keeps agents, one folder for each hash.
CACHE_DIR = "/var/cache/livemove/agents"

_SHARED = ("__init__", "errors", "events", "facts", "journal", "protocol", "wire")
#: They need scapy, click and rich, which a host does not have.
_NOT_ON_HOSTS = ("announce.py", "cli.py")

#: Runs on the host as ``python3 -I -c``: says "have" or "need", takes the archive if needed, becomes the agent.
BOOTSTRAP = r"""
import gzip, hashlib, io, os, shutil, sys, tarfile, tempfile, zlib
digest, cache = sys.argv[1:3]
if sys.version_info < (3, 11):
    print("unfit python3 is %d.%d, 3.11 is needed" % sys.version_info[:2], flush=True)
    sys.exit(1)
home = os.path.join(cache, digest)
if os.path.isdir(home):
    print("have", flush=True)
else:
    print("need", flush=True)
    archive = sys.stdin.buffer.read(int(sys.stdin.buffer.readline()))
    try:
        archive = gzip.decompress(archive)
    except (OSError, EOFError, zlib.error):
        archive = b""
    if hashlib.sha256(archive).hexdigest() != digest:
        print("unfit the archive arrived damaged", flush=True)
        sys.exit(1)
    try:
        os.makedirs(cache, mode=0o700, exist_ok=True)
        fresh = tempfile.mkdtemp(dir=cache, prefix="new-")
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(fresh, filter="data") if hasattr(tarfile, "data_filter") else tar.extractall(fresh)
        try:
            os.rename(fresh, home)
        except OSError:
            shutil.rmtree(fresh)  # another session was quicker
        known = sorted((e for e in os.scandir(cache) if len(e.name) == 64), key=lambda e: e.stat().st_mtime)
        for entry in known[:-3]:
            shutil.rmtree(entry.path, ignore_errors=True)
    except OSError as error:
        print("unfit cannot write to %s: %s" % (cache, error), flush=True)
        sys.exit(1)
sys.path.insert(0, home)
from coordinator.agent.server import main
main()
"""


@dataclass(frozen=True, slots=True)
class Bundle:
    """The archive and its name."""

    tar: bytes
    digest: str

    def compressed(self) -> bytes:
        """The archive as it is sent: about 0.6 MB, which takes a tenth of a second to make."""
        return gzip.compress(self.tar, compresslevel=6, mtime=0)


@cache
def agent_bundle() -> Bundle:
    """Build the bundle from the code that runs here. About 3 MB; built once in a process."""
    files = dict(sorted(_files().items()))
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o644
            tar.addfile(entry, io.BytesIO(content))
    return Bundle(plain.getvalue(), hashlib.sha256(plain.getvalue()).hexdigest())


def _files() -> dict[str, bytes]:
    coordinator, netfix, pyroute2 = (_package(name) for name in ("coordinator", "netfix", "pyroute2"))
    files = {f"coordinator/{name}.py": (coordinator / f"{name}.py").read_bytes() for name in _SHARED}
    for path in (coordinator / "agent").rglob("*.py"):
        if "fakes" in path.parts:
            continue  # for tests alone
        files[f"coordinator/{path.relative_to(coordinator)}"] = path.read_bytes()
    for path in netfix.rglob("*.py"):
        if path.name not in _NOT_ON_HOSTS:
            files[f"netfix/{path.relative_to(netfix)}"] = path.read_bytes()
    for path in pyroute2.rglob("*.py"):
        files[f"pyroute2/{path.relative_to(pyroute2)}"] = path.read_bytes()
    # Its own imports all of pyroute2, which takes a host 0.1 s every time; netfix names the few modules that it needs.
    files["pyroute2/__init__.py"] = b""
    return files


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(name)
    return Path(spec.origin).parent
