"""Which pages of the frozen tasks CRIU need not see, because the agent itself brings them to the destination.

A lazy dump leaves private anonymous memory out of its images, but not out of its work: it splices every page into a
pipe, for somebody to fetch, while the tasks are frozen. With pre-copy nobody fetches them. So the agent tells CRIU,
where it asks for the pages of such memory, that there are none (``criu_filter``, docs/decisions/0011-hidden-pages.md).

A page that is hidden is in no image. Two rules keep it from being lost:

- hidden is only what CRIU's restore registers with a userfaultfd, so that its absence is noticed (criu/pie/restorer.c,
  vma_remap): exactly ``vma_entry_can_be_lazy`` of criu/include/vma.h;
- ``check`` fails the move, before the commit, unless the last look at the frozen tasks answers for all that was hidden.

Of a shared object CRIU asks where it has data (lseek(2), SEEK_DATA; criu/shmem.c, next_data_segment), and is told:
nowhere. Whatever it holds is then brought over by ``handing_over``, which reads the object itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from coordinator.agent.memory import base
from coordinator.agent.memory.base import ProcessChanges
from coordinator.agent.memory.mappings import read_mappings
from coordinator.agent.memory.runs import Spans, count_pages, difference, intersection, spans_of, union
from coordinator.agent.memory.shared import worth_hiding
from coordinator.agent.tasks import process_tree
from coordinator.errors import TrackingFailed

#: What things take in the freeze, in microseconds (measured: docs/decisions/0011-hidden-pages.md): CRIU to find a page
#: and splice it, or, of shared memory, to write it and read it back; us to put CRIU under the filter, and to answer
#: what it asks about a mapping.
_PAGE_US, _SHARED_PAGE_US, _FILTER_US, _MAPPING_US = 0.4, 8, 6000, 30


class HiddenPages:
    """The hidden pages of a tree of processes. ``visible`` is asked by one thread, while the tasks are frozen; the
    rest is for before and after.

    ``refusal`` says why nothing could be hidden; the dump is then merely slower."""

    def __init__(
        self,
        root_pid: int,
        *,
        private: bool = True,
        objects: Collection[int] = (),
        processes: Callable[[int], Collection[int]] = process_tree,
        mappings: Callable[[int], list[base.Mapping]] = read_mappings,
    ) -> None:
        """``private``: whether private memory is to be hidden. ``objects``: the inodes of the shared objects that need
        not be seen either."""
        self.refusal = ""
        #: Whether CRIU's questions for private memory are to be answered here.
        self.private = private
        #: The shared objects that need not be seen.
        self.may_hide = objects
        self._hidden_objects: set[int] = set()
        self._root_pid = root_pid
        self._processes = processes
        self._mappings = mappings
        self._tasks: Collection[int] = ()
        self._unread: Iterator[int] | None = None
        self._mapped: set[int] = set()
        self._may_hide: dict[int, Spans] = {}
        self._hidden: dict[int, Spans] = {}

    @property
    def hidden(self) -> Mapping[int, Spans]:
        """What has been hidden so far, by pid here: addresses, whether there are pages or not."""
        return self._hidden

    @property
    def objects(self) -> Collection[int]:
        """The inodes of the shared objects that CRIU was told are empty."""
        return self._hidden_objects

    def hides(self, inode: int) -> bool:
        """Whether CRIU is to see a shared object as empty. From then on it is up to us to bring it over.

        It asks once of each. A segment may have the same number, and comes later (criu/cr-dump.c, cr_dump_tasks). One
        that is not mapped (any more), and has only a descriptor, nobody could bring over."""
        if inode not in self.may_hide or inode in self._hidden_objects or not self._is_mapped(inode):
            return False
        self._hidden_objects.add(inode)
        return True

    def _is_mapped(self, inode: int) -> bool:
        """The tasks are read one after the other, once, until there are no more objects to find."""
        if self._unread is None:
            self._tasks = self._tasks or self._processes(self._root_pid)  # frozen: they stay the same
            self._unread = iter(self._tasks)
        while inode not in self._mapped and not self._mapped.issuperset(self.may_hide):
            if (pid := next(self._unread, None)) is None:
                break
            of_memory = (each for each in self._mappings(pid) if each.anonymous_shared or each.memfd is not None)
            self._mapped.update(each.inode for each in of_memory)
        return inode in self._mapped

    def visible(self, pid: int, start: int, end: int) -> Spans | None:
        """What CRIU is to see of the addresses from ``start`` to ``end``; ``None``: all of it.

        The first question about a process reads its mappings (some milliseconds for a thousand of them)."""
        if pid not in self._may_hide:
            self._tasks = self._tasks or self._processes(self._root_pid)  # frozen: they stay the same
            if pid not in self._tasks:
                return None
            self._may_hide[pid] = hideable(self._mappings(pid))
        asked = [(start, end)]
        hidden = intersection(asked, self._may_hide[pid])
        if not hidden:
            return None
        self._hidden[pid] = union(self._hidden.get(pid, []), hidden)
        return difference(asked, hidden)

    def check(self, last: Iterable[ProcessChanges]) -> None:
        """Raise ``TrackingFailed`` unless the last look at the frozen tasks answers for all that was hidden."""
        answered = {each.pid: spans_of(mapping for mapping in each.changes.mappings if mapping.lazy) for each in last}
        for pid, spans in self._hidden.items():
            if missing := difference(spans, answered.get(pid, [])):
                raise TrackingFailed(
                    f"process {pid}: {count_pages(missing)} pages from address {missing[0][0]:#x} were kept out of the "
                    "dump, and are not among those that were copied",
                    "This is a defect of livemove; `--mode post-copy` moves without hiding pages from CRIU.",
                )


def hide(root_pid: int, known: Iterable[ProcessChanges]) -> HiddenPages | None:
    """The hidden pages of a tree, given what was last seen of it, or ``None`` if it pays to let CRIU see them all."""
    seen = tuple(known)
    private, objects = pays(seen), worth_hiding(seen)
    if not private and sum(objects.values()) * _SHARED_PAGE_US <= _FILTER_US:
        return None
    return HiddenPages(root_pid, private=private, objects=objects.keys())


def pays(known: Iterable[ProcessChanges]) -> bool:
    """Whether CRIU would take longer for the private pages than we for its questions about the mappings (pure)."""
    changes = [each.changes for each in known]
    pages, mappings = sum(each.known_pages for each in changes), sum(len(each.mappings) for each in changes)
    return pages * _PAGE_US > _FILTER_US + mappings * _MAPPING_US


def hideable(mappings: Iterable[base.Mapping]) -> Spans:
    """The memory that CRIU's restore registers with a userfaultfd (pure).

    A private mapping of /dev/zero is anonymous memory to the kernel, but has a file, and to CRIU is a file's
    (criu/proc_parse.c, handle_vma)."""
    return spans_of(each for each in mappings if each.lazy and each.inode == 0)
