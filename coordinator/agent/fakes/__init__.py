"""Two hosts in memory, on which the real agents and the real halves run: for tests, and for trying an order of steps.

``world`` says what is where and watches the invariants; ``criu``, ``host`` and ``channel`` are the adapters of one
agent; ``clock`` is an event loop whose time passes only when nothing else is left to do.
"""
