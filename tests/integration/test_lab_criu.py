"""CRIU and runc work on the lab's hosts: the ground that every migration test stands on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import PIPE

import pytest

from labs.lab import Lab
from labs.machines import Host

PORT = 7100
SERVER = f"""\
import socket
listener = socket.create_server(("0.0.0.0", {PORT}))
connection, _ = listener.accept()
while data := connection.recv(100):
    connection.sendall(data)
"""
CLIENT = f"""\
import socket, sys, time
for attempt in range(200):
    try:
        connection = socket.create_connection((sys.argv[1], {PORT}), 10)
        break
    except ConnectionRefusedError:
        time.sleep(0.02)
for line in sys.stdin:
    connection.sendall(line.encode())
    print(connection.recv(100).decode(), end="", flush=True)
"""
SILENT = "</dev/null >/dev/null 2>&1"


class Client:
    """A connection from the clients machine that is asked to carry a word there and back."""

    def __init__(self, lab: Lab, address: str) -> None:
        process = lab.machine("clients").popen(
            ["python3", "-u", "-c", CLIENT, address], stdin=PIPE, stdout=PIPE, text=True
        )
        assert process.stdin and process.stdout
        self.process, self.words, self.answers = process, process.stdin, process.stdout

    def says(self, word: str) -> str:
        """What comes back; an empty string once the connection is gone."""
        self.words.write(f"{word}\n")
        self.words.flush()
        return str(self.answers.readline())

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def connected(lab: Lab, address: str) -> Iterator[Client]:
    client = Client(lab, address)
    try:
        yield client
    finally:
        client.close()


def test_a_process_with_a_connection_is_dumped_and_restored(lab: Lab) -> None:
    alpha = lab.host("alpha")
    pid = str(alpha.start_service(["python3", "-c", SERVER]))
    with connected(lab, alpha.address) as client:
        assert client.says("before") == "before\n"
        alpha.run(["mkdir", "/tmp/images"])
        options = ["--images-dir", "/tmp/images", "--tcp-established"]
        alpha.run(["criu", "dump", "--tree", pid, "--network-lock", "skip", *options])
        assert alpha.run(["kill", "-0", pid], check=False).returncode != 0
        alpha.run(["criu", "restore", "--restore-detached", *options])
        assert client.says("after") == "after\n"
    alpha.run(["rm", "-r", "/tmp/images"])


@pytest.fixture
def bundle(lab: Lab) -> Iterator[Host]:
    """A host with the bundle of a container over the lab's image."""
    beta = lab.host("beta")
    beta.run(["mkdir", "-p", "/srv/try/rootfs", "/srv/try/disk"])
    beta.run(["mount", "-t", "tmpfs", "disk", "/srv/try/disk"])
    beta.run(["mkdir", "/srv/try/disk/upper", "/srv/try/disk/work"])
    layers = "lowerdir=/srv/image,upperdir=/srv/try/disk/upper,workdir=/srv/try/disk/work"
    beta.run(["mount", "-t", "overlay", "root", "-o", layers, "/srv/try/rootfs"])
    beta.run(["runc", "spec", "--bundle", "/srv/try"])
    spec = json.loads(beta.read_file("/srv/try/config.json"))
    spec["process"] |= {"terminal": False, "args": ["python3", "-c", SERVER]}
    namespaces = spec["linux"]["namespaces"]
    spec["linux"]["namespaces"] = [namespace for namespace in namespaces if namespace["type"] != "network"]
    beta.write_file("/srv/try/config.json", json.dumps(spec))
    yield beta
    beta.run(["runc", "delete", "--force", "try"])
    beta.run(["umount", "/srv/try/rootfs", "/srv/try/disk"])
    beta.run(["rm", "-r", "/srv/try"])


def test_a_container_with_a_connection_is_dumped_and_restored(lab: Lab, bundle: Host) -> None:
    bundle.write_file("/etc/criu/runc.conf", "network-lock skip\n")
    bundle.run(["sh", "-c", f"exec runc run --detach --bundle /srv/try try {SILENT}"])
    with connected(lab, bundle.address) as client:
        assert client.says("before") == "before\n"
        options = "--tcp-established --image-path /tmp/images"
        bundle.run(["sh", "-c", f"exec runc checkpoint {options} try"])
        bundle.run(["sh", "-c", f"exec runc restore --detach {options} --bundle /srv/try try {SILENT}"])
        assert client.says("after") == "after\n"
        assert json.loads(bundle.run(["runc", "state", "try"]).stdout)["status"] == "running"
    bundle.run(["rm", "-r", "/tmp/images", "/etc/criu/runc.conf"])
