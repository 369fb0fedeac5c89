"""One service with its clients for many tests: unharmed by each, or else started anew for the next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from labs.lab import Lab
from tests.integration.command import livemove
from tests.integration.scene import Scene

HOME = "alpha"


class Stage:
    """Holds the scene that tests share. Every test finds the service on alpha, with its clients connected."""

    def __init__(self, lab: Lab, workload: str, program: str = "pattern_server") -> None:
        self._lab = lab
        self._workload = workload
        self._program = program
        self._scene: Scene | None = None

    @contextmanager
    def scene(self) -> Iterator[Scene]:
        """The scene, for one test. After a test that moved the service or failed it is started anew."""
        scene = self._scene or Scene.start(self._lab, self._workload, HOME, program=self._program)
        self._scene = scene
        scene.begin_hop()
        try:
            yield scene
        except BaseException:
            self._settle()
            self._end()
            raise
        if scene.host != HOME:
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _settle(self) -> None:
        """After a failure nothing unfinished may be in the next test's way."""
        unfinished = livemove(self._lab, "status", "--json").report["unfinished"]
        for migration in {record["id"] for record in unfinished}:
            livemove(self._lab, "recover", migration, "--json")

    def _end(self) -> None:
        if self._scene is not None:
            self._scene.close()
            self._scene = None
