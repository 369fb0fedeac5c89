"""mosquitto, an MQTT broker."""

from __future__ import annotations

from labs.catalogue.base import Service

SERVICE = Service(
    name="mosquitto",
    address="192.0.2.214",
    port=1883,
    user="mosquitto",
    command=("mosquitto", "-c", "@DATA@/mosquitto.conf"),
    files={
        "mosquitto.conf": """\
listener @PORT@ @ADDRESS@
allow_anonymous true
persistence true
persistence_location @DATA@/
log_dest stderr
""",
    },
    needed="nothing",
)
