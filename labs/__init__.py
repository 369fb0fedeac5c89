"""The lab: several Linux hosts, a client and an operator machine on one Ethernet segment, on one machine."""
