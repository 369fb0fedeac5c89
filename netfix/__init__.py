"""netfix: the network half of livemove, usable on its own.

Addresses, announcements, gates, the packet hold and the socket inventory of one host. Nothing here imports
`coordinator`; the modules that run on a host need the standard library and pyroute2 only (scapy is for `announce`,
click and rich for `cli` and its parts).
"""
