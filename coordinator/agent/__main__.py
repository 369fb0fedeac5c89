"""Starts the agent: ``python3 -m coordinator.agent``."""

from coordinator.agent.server import main

main()
