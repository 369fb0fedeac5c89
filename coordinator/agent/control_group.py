"""The control group of an OCI container (cgroup version 2), and limits in it that its config.json does not have.

The destination makes the group anew from config.json. A limit that was changed while the container ran (``runc
update``, or by hand) is in the source's group alone, and a move would quietly take it back.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from coordinator.facts import Obstacle

CGROUPS = Path("/sys/fs/cgroup")
_CPU_PERIOD_US = 100_000  # the kernel's default (kernel/sched/core.c)


def control_group(bundle: Path, container: str, cgroups: Path = CGROUPS) -> Path | None:
    """The group of a container. ``None`` where it cannot be told: without a plain ``cgroupsPath`` (the systemd driver's
    has colons), or without cgroup version 2."""
    try:
        path = _linux(bundle).get("cgroupsPath", f"/{container}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    base = _version_2(cgroups)
    if base is None or not isinstance(path, str) or ":" in path or ".." in path:
        return None
    return base / path.lstrip("/")


def group_of_process(pid: int | str, cgroups: Path = CGROUPS) -> Path | None:
    """The group (version 2) that a process is in. ``None`` if it is the root of what is seen here, or gone."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    base = _version_2(cgroups)
    for line in lines:
        if line.startswith("0::/") and base is not None and (base / line[len("0::/") :] / "cgroup.events").exists():
            return base / line[len("0::/") :]
    return None


def changed_limits(program: str, bundle: Path, container: str, cgroups: Path = CGROUPS) -> tuple[Obstacle, ...]:
    """The limits of a running container of ``program`` (runc or crun) that are other ones than its config.json has."""
    group = control_group(bundle, container, cgroups)
    if group is None or not group.is_dir():
        return ()
    try:
        wanted = expected(_linux(bundle).get("resources") or {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ()  # what is wrong with config.json is told where its digest is made
    found = {file: _read(group / file) for file in wanted}
    changed = [
        f"{file} is {found[file]}, not {value}" for file, value in wanted.items() if found[file] not in ("", value)
    ]
    if not changed:
        return ()
    message = f"limits of the container {container} are not those of its config.json: {', '.join(changed)}"
    hint = f"Write them into config.json on both hosts, or set them again after the move: {program} update."
    return (Obstacle(code="LIMITS_CHANGED", message=message, hint=hint, fatal=False),)


def expected(resources: dict[str, Any]) -> dict[str, str]:
    """What the files of a group say where ``resources`` (OCI runtime specification, config-linux) is in force. Bytes
    are those of whole pages (kernel's admin-guide/cgroup-v2)."""
    memory, pids, cpu = (resources.get(name) or {} for name in ("memory", "pids", "cpu"))
    pages = resources.get("hugepageLimits") or ()
    size = os.sysconf("SC_PAGE_SIZE")
    limit = memory.get("limit") or 0
    return {
        "memory.max": _or_max(limit // size * size),
        "pids.max": _or_max(pids.get("limit") or 0),
        "cpu.max": f"{_or_max(cpu.get('quota') or 0)} {cpu.get('period') or _CPU_PERIOD_US}",
        **{f"hugetlb.{each['pageSize']}.max": str(each["limit"]) for each in pages},
    }


def _version_2(cgroups: Path) -> Path | None:
    return next((each for each in (cgroups / "unified", cgroups) if (each / "cgroup.controllers").exists()), None)


def _linux(bundle: Path) -> dict[str, Any]:
    linux: dict[str, Any] = json.loads((bundle / "config.json").read_bytes())["linux"]
    return linux


def _or_max(limit: int) -> str:
    return str(limit) if limit > 0 else "max"


def _read(file: Path) -> str:
    """Empty without the controller."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
