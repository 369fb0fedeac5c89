"""PostgreSQL: a process for every connection, and shared memory of every kind."""

from __future__ import annotations

from labs.catalogue.base import Service

PROGRAMS = "/usr/lib/postgresql/*/bin"

SERVICE = Service(
    name="postgresql",
    address="192.0.2.213",
    port=5432,
    user="postgres",
    command=("sh", "-c", f"exec {PROGRAMS}/postgres -D @DATA@/base"),
    files={
        "settings": """\
listen_addresses = '@ADDRESS@'
port = @PORT@
unix_socket_directories = ''
shared_buffers = 32MB
max_connections = 40
""",
        # A line is a statement: postgres --single.
        "schema.sql": """\
CREATE TABLE branches AS SELECT 1 AS bid, 0 AS balance;
CREATE TABLE tellers AS SELECT tid, 0 AS balance FROM generate_series(1, 10) AS tid;
CREATE TABLE accounts AS SELECT aid, 0 AS balance FROM generate_series(1, 10000) AS aid;
ALTER TABLE accounts ADD PRIMARY KEY (aid);
CREATE TABLE history (tid int, aid int, delta int, at timestamptz);
CREATE TABLE copied (number int PRIMARY KEY, word text);
""",
    },
    setup=(
        f"{PROGRAMS}/initdb --no-sync --no-instructions --auth=trust --username=postgres --locale=C base >initdb.log",
        "cat settings >>base/postgresql.conf",
        "echo 'host all all all trust' >>base/pg_hba.conf",
        f"{PROGRAMS}/postgres --single -D base postgres <schema.sql >schema.log",
    ),
    refused={"process": "SYSV_SHARED_WITH_HOST"},
    needed="an IPC namespace and a /dev/shm of its own",
)
