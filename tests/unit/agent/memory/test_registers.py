"""System calls in the registers of both machines."""

from __future__ import annotations

import struct

import pytest

from coordinator.agent.memory.registers import ERESTARTNOHAND, Arm64Machine, X86Machine, signed, this_machine

MINUS_ONE = (1 << 64) - 1
RAX, ORIG_RAX, RIP = 10, 15, 16


def x86(**values: int) -> bytes:
    words = [1000 + number for number in range(27)]
    for name, value in values.items():
        words[{"rax": RAX, "orig_rax": ORIG_RAX, "rip": RIP}[name]] = value & MINUS_ONE
    return struct.pack("<27Q", *words)


def test_x86_call() -> None:
    words = struct.unpack("<27Q", X86Machine().call(x86(), 0x7000, 323, (1, -1, 3, 4, 5, 6)))
    assert words[RAX] == 323
    assert words[RIP] == 0x7000
    assert words[ORIG_RAX] == MINUS_ONE
    assert [words[n] for n in (14, 13, 12, 7, 9, 8)] == [1, MINUS_ONE, 3, 4, 5, 6]
    changed = {RAX, RIP, ORIG_RAX, 14, 13, 12, 7, 9, 8}
    assert all(words[n] == 1000 + n for n in range(27) if n not in changed)


def test_x86_reads() -> None:
    machine = X86Machine()
    assert machine.result(x86(rax=-22)) == -22
    assert machine.instruction_pointer(x86(rip=7)) == 7
    assert machine.in_call(x86(orig_rax=0))
    assert not machine.in_call(x86(orig_rax=-1))
    assert len(x86()) == machine.register_bytes == 216


@pytest.mark.parametrize("errno", [512, 513, 514, 516])
def test_x86_leaves_restarts_to_the_kernel(errno: int) -> None:
    assert X86Machine().resumable(x86(rax=-errno, orig_rax=232)) == x86(rax=-errno, orig_rax=232)


@pytest.mark.parametrize("number", [232, 281, 45, 220, 128])
def test_x86_calls_that_a_stop_ended_begin_again(number: int) -> None:
    again = x86(rax=-ERESTARTNOHAND, orig_rax=number)
    assert X86Machine().resumable(x86(rax=-4, orig_rax=number)) == again


@pytest.mark.parametrize(("result", "number"), [(-4, 1), (-4, 3), (-4, -1), (4, 232), (-11, 232), (0, 232)])
def test_x86_everything_else_is_as_found(result: int, number: int) -> None:
    assert X86Machine().resumable(x86(rax=result, orig_rax=number)) == x86(rax=result, orig_rax=number)


def test_arm64() -> None:
    machine = Arm64Machine()
    registers = struct.pack("<34Q", *range(34))
    words = struct.unpack("<34Q", machine.call(registers, 0x7000, 282, (9, -1)))
    assert (words[0], words[1], words[8], words[32]) == (9, MINUS_ONE, 282, 0x7000)
    assert all(words[n] == n for n in range(34) if n not in (0, 1, 8, 32))
    assert machine.result(struct.pack("<34Q", MINUS_ONE, *range(33))) == -1
    assert machine.instruction_pointer(registers) == 32
    assert not machine.in_call(registers)
    assert machine.resumable(registers) == registers
    assert len(registers) == machine.register_bytes == 272
    assert int.from_bytes(machine.instruction, "little") == 0xD4000001


def test_machines_by_name() -> None:
    assert isinstance(this_machine("x86_64"), X86Machine)
    assert isinstance(this_machine("aarch64"), Arm64Machine)
    assert this_machine("riscv64") is None
    assert signed(MINUS_ONE) == -1
