"""The sandbox's filter of system calls, interpreted, and its numbers against the kernel's."""

import fcntl
import os
import re
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.sandboxing import needs_sandbox

from coding import confine

pytestmark = needs_sandbox


def filtered(machine: str, number: int, *arguments: int, foreign: bool = False) -> int:
    """What the filter for `machine` returns for a system call: its instructions, interpreted."""
    architecture = confine.MACHINES[machine][1]
    words = {0: number, 4: architecture + foreign} | {16 + 8 * i: value for i, value in enumerate(arguments)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.uname", lambda: SimpleNamespace(machine=machine))
        program = confine.filter_program()
    accumulator = position = 0
    while True:
        code, if_true, if_false, constant = program[position]
        position += 1
        if code == confine.LOAD:
            accumulator = words[constant]
        elif code == confine.AND:
            accumulator &= constant
        elif code == confine.JUMP_IF:
            position += if_true if accumulator == constant else if_false
        else:
            assert code == confine.RETURN
            return constant


@pytest.mark.parametrize("machine", confine.MACHINES)
def test_sandbox_filter_allows_what_is_listed_and_nothing_else(machine: str) -> None:
    column, _ = confine.MACHINES[machine]
    allowed = {numbers[column] for numbers in confine.ALLOWED.values()}
    examined = {confine.OPENAT[column], confine.FCNTL[column]}
    assert len(allowed) == len(confine.ALLOWED)
    for number in set(range(500)) - examined:
        assert filtered(machine, number) == (confine.ALLOW if number in allowed else confine.DENY)
        assert filtered(machine, number | 0x40000000) == confine.DENY  # x32
        assert filtered(machine, number, foreign=True) == confine.KILL
    for command in range(1100):
        harmless = command in (fcntl.F_DUPFD, fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL, fcntl.F_DUPFD_CLOEXEC)
        assert filtered(machine, confine.FCNTL[column], 1, command) == (confine.ALLOW if harmless else confine.DENY)
    for access, others in product((os.O_RDONLY, os.O_WRONLY, os.O_RDWR), (0, os.O_CREAT, os.O_APPEND, os.O_CLOEXEC)):
        flags = access | others
        assert filtered(machine, confine.OPENAT[column], 0, 0, flags) == confine.ALLOW
        emptied = filtered(machine, confine.OPENAT[column], 0, 0, flags | os.O_TRUNC)
        assert emptied == (confine.DENY if access == os.O_RDONLY else confine.ALLOW)


@pytest.mark.parametrize(
    ("column", "header"),
    [(0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), (1, "/usr/include/asm-generic/unistd.h")],
    ids=confine.MACHINES,
)
def test_sandbox_numbers_of_system_calls_are_the_kernels(column: int, header: str) -> None:
    if not Path(header).exists():
        pytest.skip(f"{header} is not installed")
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(header).read_text())
    numbers = {name: int(number) for name, number in found}
    numbers["newfstatat"] = numbers.get("newfstatat") or numbers["fstatat"]
    for name, listed in {**confine.ALLOWED, "openat": confine.OPENAT, "fcntl": confine.FCNTL}.items():
        assert numbers[name] == listed[column], name
