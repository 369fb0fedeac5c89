"""The ways a service address gets to another host: one protocol (`base`), and an implementation for each way."""
