"""A Java virtual machine: a program of the lab's own, `Server.java`, with 20 threads that serve."""

from __future__ import annotations

from pathlib import Path

from labs.catalogue.base import Service

SERVICE = Service(
    name="jvm",
    address="192.0.2.217",
    port=9000,
    user="www-data",
    command=("java", "-Xmx64m", "-cp", "@DATA@", "Server", "@ADDRESS@", "@PORT@"),
    files={"Server.java": Path(__file__).with_name("Server.java").read_text()},
    setup=("java -m jdk.compiler/com.sun.tools.javac.Main -d . Server.java",),
    # Else it has a file mapped in /tmp/hsperfdata_USER.
    as_process={"JAVA_TOOL_OPTIONS": "-XX:+PerfDisableSharedMem"},
    needed="nothing",
)
