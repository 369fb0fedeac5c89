"""Nexuiz and its descendant Xonotic: game servers on the DarkPlaces engine, which speak the same protocol."""

from __future__ import annotations

from labs.catalogue.base import Service

ADDRESS, PORT = "192.0.2.219", 26000
PLACES = 16
BOTS = 4

SETTINGS = f"""\
hostname "a game that moves"
sv_public 0
maxplayers {PLACES}
bot_number {BOTS}
skill 4
// The level never ends.
timelimit_override 0
fraglimit_override 0
// The lab's players come all at once, from one address.
net_connectfloodblockingtimeout 0
net_challengefloodblockingtimeout 0
"""

OPTIONS = ("-userdir", "@DATA@", "-ip", "@ADDRESS@", "-port", "@PORT@", "+exec", "server.cfg")
NEEDED = "nothing"

NEXUIZ = Service(
    name="nexuiz",
    address=ADDRESS,
    port=PORT,
    user="games",
    command=("/usr/games/nexuiz-server", *OPTIONS, "+map", "aggressor"),
    files={"data/server.cfg": SETTINGS},
    needed=NEEDED,
)

XONOTIC_SERVER = "xonotic-linux64-dedicated"
XONOTIC_FILES = "files"
"""Where in its directory the service expects what the game's archive has: the server, and `data` with the levels."""

XONOTIC = Service(
    name="xonotic",
    address=ADDRESS,
    port=PORT,
    user="games",
    command=(
        f"@DATA@/{XONOTIC_FILES}/{XONOTIC_SERVER}",
        *("-basedir", f"@DATA@/{XONOTIC_FILES}", *OPTIONS),
        *("+map", "stormkeep"),
    ),
    files={"data/server.cfg": SETTINGS},
    needed=NEEDED,
)
