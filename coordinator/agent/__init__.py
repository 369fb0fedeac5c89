"""The agent: everything that runs on a host. Standard library and pyroute2 only; nothing outside imports it."""
