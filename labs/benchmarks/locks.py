"""What CRIU's own network locks need on the lab's hosts, which livemove does not: iptables, or a line of configuration.

CRIU's default lock runs `iptables` for every connection. The hosts' root has none; here it is taken out of Debian's
package, once, and put on both hosts of the running lab.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from labs import root
from labs.benchmarks.session import HOSTS
from labs.commands import LabError, run
from labs.lab import Lab

CONFIGURATION = "/etc/criu/runc.conf"
CACHE = root.CACHE / "iptables"
PROGRAM = "usr/sbin/xtables-nft-multi"
NAMES = ("iptables", "ip6tables")


def choose(lab: Lab, lock: str) -> None:
    """Have CRIU, called by runc, use its lock `iptables` (the default) or `nftables` on every host of the bench."""
    if lock not in ("iptables", "nftables"):
        raise LabError(f"no lock of CRIU's: {lock!r}")
    for name in HOSTS:
        host = lab.host(name)
        if lock == "nftables":
            host.write_file(CONFIGURATION, "network-lock nftables\n")
        else:
            host.run(["rm", "-f", CONFIGURATION])


def install_iptables(lab: Lab) -> None:
    """Put iptables on the hosts of the bench. It goes with the lab."""
    tree = _cached()
    for name in HOSTS:
        destination = Path(f"/proc/{lab.host(name).init_pid}/root")
        for file in tree.rglob("*"):
            if file.is_file() and not file.is_symlink():
                place = destination / file.relative_to(tree)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, place)
        for link in NAMES:
            program = destination / "usr/sbin" / link
            program.unlink(missing_ok=True)
            program.symlink_to(Path(PROGRAM).name)


def _cached() -> Path:
    """The files of Debian's package that the hosts lack, fetched if they are not here yet."""
    if not (CACHE / PROGRAM).exists():
        building = CACHE.with_name("iptables-building")
        shutil.rmtree(building, ignore_errors=True)
        try:
            _fetch(building)
            shutil.rmtree(CACHE, ignore_errors=True)
            (building / "wanted").rename(CACHE)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return CACHE


def _fetch(building: Path) -> None:
    options = [option for option in root.OPTIONS if option.startswith(("--quiet", "--aptopt"))]
    keyrings = [f"--keyring={keyring}" for keyring in root.KEYRINGS if keyring.exists()][:1]
    whole = building / "whole"
    building.mkdir(parents=True)
    what = ["--variant=extract", "--include=iptables"]
    run(["mmdebstrap", *options, *keyrings, *what, root.SUITE, str(whole), root.mirror()], timeout=600)
    for name in (PROGRAM, *(str(path.relative_to(whole)) for path in whole.glob("usr/lib/*/xtables/*.so"))):
        place = building / "wanted" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(whole / name, place)
