"""An SSH server of its own, with its sessions: shells, terminals and what runs in them."""

from __future__ import annotations

from labs.catalogue.base import Service

SERVICE = Service(
    name="ssh",
    address="192.0.2.215",
    port=2222,
    command=("sh", "-c", "mkdir -p /run/sshd && exec /usr/sbin/sshd -D -e -f @DATA@/sshd_config"),
    capabilities=(
        "CAP_AUDIT_WRITE",
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_KILL",
        "CAP_NET_BIND_SERVICE",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SYS_CHROOT",
    ),
    files={
        "sshd_config": """\
ListenAddress @ADDRESS@
Port @PORT@
HostKey @DATA@/host_key
AuthorizedKeysFile @DATA@/user_key.pub
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
UseDNS no
PidFile none
PrintLastLog no
PrintMotd no
ClientAliveInterval 2
""",
    },
    setup=(
        "for key in host_key user_key; do ssh-keygen -q -t ed25519 -N '' -C lab -f $key; done",
        'echo "[@ADDRESS@]:@PORT@ $(cat host_key.pub)" >known_hosts',
    ),
    needed="nothing",
)
