"""A way around CAP_SYS_RESOURCE where this machine has none, so that the lab's services have users of their own.

CRIU asks for the resource limits of every process that it dumps, and without that capability the kernel refuses those
of another uid. So on the lab's hosts `criu` becomes a script that starts the real one with `limits.c` preloaded, which
reads them from /proc instead. A host that has the capability, as any real one, needs none of this.
"""

from __future__ import annotations

import base64
import shutil
import tempfile
from pathlib import Path

from labs.commands import LabError, run
from labs.lab import Lab
from labs.topology import HOSTS

CAP_SYS_RESOURCE = 24
SOURCE = Path(__file__).with_name("limits.c")
LIBRARY = "/usr/local/lib/livemove-lab-limits.so"
SCRIPT = """\
#!/bin/sh
# Put here by the lab, whose machine has no CAP_SYS_RESOURCE: see labs/limits.py.
LD_PRELOAD={library} exec {criu} "$@"
"""


def is_missing() -> bool:
    """Whether root on this machine lacks CAP_SYS_RESOURCE."""
    lines = Path("/proc/self/status").read_text().splitlines()
    effective = next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff:"))
    return not effective >> CAP_SYS_RESOURCE & 1


def work_around(lab: Lab) -> str:
    """Put library and script on every host if need be; returns a sentence about it, or nothing. May be repeated."""
    if not is_missing():
        return ""
    library = base64.b64encode(_compiled()).decode()
    for station in HOSTS:
        host = lab.host(station.name)
        host.run(["sh", "-ec", f"mkdir -p /usr/local/lib; base64 -d >{LIBRARY}"], input=library)
        # In /usr/local, which comes first in every PATH; the real one stays where it is.
        host.write_file("/usr/local/sbin/criu", SCRIPT.format(library=LIBRARY, criu="/usr/sbin/criu"), 0o755)
    return "This machine has no CAP_SYS_RESOURCE: on the lab's hosts CRIU reads limits from /proc (labs/limits.py)"


def _compiled() -> bytes:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise LabError("this machine has neither CAP_SYS_RESOURCE nor a C compiler; run: apt-get install gcc")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "limits.so")
        run([compiler, "-shared", "-fPIC", "-O2", "-nostdlib", "-o", str(made), str(SOURCE)])
        return made.read_bytes()
