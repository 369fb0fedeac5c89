"""nginx with two workers: pages, a large file, and a websocket that it passes on to a program behind it."""

from __future__ import annotations

from pathlib import Path

from labs.catalogue.base import Service

SOCKET = "/run/websocket.socket"

SERVICE = Service(
    name="nginx",
    address="192.0.2.212",
    port=80,
    command=(
        "sh",
        "-c",
        # Who finds nginx listening finds all of it.
        f"rm -f {SOCKET}; python3 @DATA@/websocket_server.py {SOCKET} & until [ -S {SOCKET} ]; do sleep 0.02; done;"
        " exec nginx -c @DATA@/nginx.conf -e stderr",
    ),
    capabilities=("CAP_NET_BIND_SERVICE", "CAP_SETUID", "CAP_SETGID", "CAP_CHOWN", "CAP_DAC_OVERRIDE"),
    files={
        "nginx.conf": """\
daemon off;
user www-data;
worker_processes 2;
pid /run/nginx.pid;
error_log stderr;
events { worker_connections 512; }
http {
    access_log @DATA@/access.log;
    default_type text/plain;
    keepalive_requests 1000000;
    sendfile on;
    client_body_temp_path /tmp/body;
    proxy_temp_path /tmp/proxy;
    fastcgi_temp_path /tmp/fastcgi;
    uwsgi_temp_path /tmp/uwsgi;
    scgi_temp_path /tmp/scgi;
    server {
        listen @ADDRESS@:@PORT@;
        root @DATA@/www;
        location = /moved { return 301 /page; }
        location = /websocket {
            proxy_pass http://unix:/run/websocket.socket;
            proxy_http_version 1.1;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection upgrade;
            proxy_read_timeout 1h;
        }
    }
}
""",
        "websocket_server.py": Path(__file__).with_name("websocket_server.py").read_text(),
    },
    setup=(
        "mkdir www",
        'python3 -c \'for n in range(100): open(f"www/page{n}", "w").write(f"page {n}\\n" * (n + 1))\'',
        "python3 -c 'for n in range(1 << 22): print(f\"{n:015d}\")' >www/large",
        "chmod -R a+rX .",
    ),
    needed="nothing",
)
