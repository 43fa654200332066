"""Python that nobody has read, run where it can do no harm.

    run_python(code, stdin) = Completed(returncode, stdout, stderr, files, ended)

Each run is a fresh interpreter (isolated mode, empty environment, nothing but the standard library) in a folder of its
own, which is deleted afterwards. Before the first line of `code` is compiled, the interpreter gives up for good what
`confine.py` lists: other files, processes and threads, signals, the network. This process watches the rest: time, the
amount of output, the number of files. It needs Linux with Landlock (in 5.13 or later, unless the kernel was built or
booted without it) and seccomp, on x86_64 or aarch64 with glibc, and no privileges: root and an ordinary user are held
alike. There is no weaker way that it would fall back to: where anything is missing, `SandboxError` says what.
"""

import os
import platform
import sys
import tempfile
from dataclasses import dataclass
from functools import cache

from .confined import Completed, Limits, SandboxError, run_confined

# What the probe tries must fail, and what it needs must work; stdin: a path that it may not read.
PROBE = """
import ctypes, json, mmap, os, sys, zlib, _socket
secret = sys.stdin.read()
attempts = {
    "read a file outside": lambda: open(secret).read(),
    "write a file outside": lambda: open(secret, "w"),
    "change a file outside": lambda: os.chmod(secret, 0o777),
    "list a folder outside": lambda: os.listdir("/"),
    "make a process": lambda: os.fork() or os._exit(0),
    "open a socket": lambda: _socket.socket(),
    "signal the grader": lambda: os.kill(os.getppid(), 0),
    "allocate 1 GiB": lambda: mmap.mmap(-1, 2**30),
}
for what, attempt in attempts.items():
    try:
        attempt()
    except (OSError, MemoryError):
        continue
    print("could", what)
open("file", "w").write("held")
print(open("file").read())
"""


@dataclass(frozen=True)
class Protection:
    """What holds submissions on this machine; measured, not assumed."""

    kernel: str
    machine: str
    landlock: int
    user: int

    def __repr__(self) -> str:
        who = "root without capabilities" if self.user == 0 else f"user {self.user}"
        return f"Protection(Landlock {self.landlock}, seccomp; Linux {self.kernel}, {self.machine}, as {who})"


@cache
def protection() -> Protection:
    """What holds submissions here, tried out once per process.

    Raises:
        SandboxError: if something is missing, or a probe could do what it must not.
    """
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise SandboxError(f"The sandbox needs Linux on x86_64 or aarch64. Found {sys.platform}, {platform.machine()}.")
    with tempfile.NamedTemporaryFile() as secret:
        done, report = run_confined(PROBE, secret.name, Limits(timeout=10.0))
    if (done.ended, done.stdout) != ("exit", "held\n"):
        raise SandboxError(f"A probe of the sandbox should be held. Found {done}: {done.stdout}{done.stderr}")
    return Protection(platform.release(), platform.machine(), int(report.removeprefix("landlock ")), os.geteuid())


def run_python(
    code: str,
    *,
    stdin: str = "",
    timeout: float = 2.0,
    memory_bytes: int = 2**28,
    output_bytes: int = 2**16,
    file_bytes: int = 2**16,
    max_files: int = 16,
) -> Completed:
    """Run `code` as a confined program.

    Args:
        code: a whole program; what does not compile ends with returncode 1.
        stdin: what the program reads.
        timeout: seconds from the program's first line on; the interpreter's start does not count.
        memory_bytes: of address space, 2**26 or more.
        output_bytes: that may be printed to stdout, and as many to stderr.
        file_bytes: of each file.
        max_files: that may be left in the folder.

    Raises:
        SandboxError: if this machine cannot hold it.
        ValueError: if a limit is not positive, one that counts is no integer, or `memory_bytes` is too small.
    """
    limits = Limits(timeout, memory_bytes, output_bytes, file_bytes, max_files)
    protection()
    return run_confined(code, stdin, limits)[0]
