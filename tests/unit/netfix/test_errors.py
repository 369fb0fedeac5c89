"""Errors of netfix: codes are stable and distinct, and foreign errors are mapped at the border."""

import errno

import pytest

from netfix import errors
from netfix.errors import KernelLacksError, KernelRefusedError, NetfixError, NoSuchInterfaceError, NotPermittedError


def _tree(root: type[NetfixError]) -> list[type[NetfixError]]:
    return [root] + [each for kind in root.__subclasses__() for each in _tree(kind)]


def test_every_error_has_a_code_of_its_own_and_an_exit_status() -> None:
    kinds = _tree(NetfixError)
    assert len({kind.code for kind in kinds}) == len(kinds)
    assert all(kind.code.startswith("netfix.") and kind.exit_status in (2, 3) and kind.__doc__ for kind in kinds)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EPERM, NotPermittedError),
        (errno.ENODEV, NoSuchInterfaceError),
        (errno.EOPNOTSUPP, KernelLacksError),
        (errno.EBUSY, KernelRefusedError),
        (0, KernelRefusedError),
    ],
)
def test_error_numbers_become_errors_that_say_what_was_being_done(number: int, kind: type[NetfixError]) -> None:
    error = errors.from_errno(number, "adding 192.0.2.10", "the kernel's words")
    assert type(error) is kind
    assert error.message.startswith("adding 192.0.2.10: the kernel's words (")


def test_a_hint_can_be_given() -> None:
    assert NetfixError("no", hint="do this").hint == "do this"
    assert NotPermittedError("no").hint == NotPermittedError.default_hint
