"""Clients of the lab's services, which notice every byte that a migration loses, doubles or mixes up."""
