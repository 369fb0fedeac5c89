"""Services that the lab moves: standard library only, because they run on the hosts' own Python."""
