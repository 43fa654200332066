"""Run as a script by `sandbox.py`: gives up all that a submission must not have, then executes it in this process.

    limits -> no capabilities, no new privileges -> Landlock -> seccomp -> "ready" -> exec(submission)

| given up                                              | by                                                        |
|-------------------------------------------------------|-----------------------------------------------------------|
| all files but Python's own, read-only, and the folder | Landlock: what is not granted is denied, to root as well  |
| links, folders, pipes and devices in the folder       | Landlock: only plain files may be made                    |
| processes, threads, signals, sockets, ptrace, mount, ioctl, chmod, ... | seccomp: calls that are not listed fail  |
| memory, size of a file, number of open files          | resource limits, which without capabilities stay for root |
| outliving the grader                                  | PR_SET_PDEATHSIG                                          |

All of it is irrevocable, so native code (ctypes) gains nothing. What stays possible: to ask whether a path outside
exists and how large it is (Landlock does not govern `stat`), to read the clock, and all of Python within the limits.
"""

import builtins
import ctypes
import errno
import os
import resource
import struct
import sys

# name: (x86_64, aarch64). A call that a newer libc wants and that is not here fails; none is let through unread.
ALLOWED = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62), "readv": (19, 65),
    "writev": (20, 66), "pread64": (17, 67), "pwrite64": (18, 68), "dup": (32, 23), "ftruncate": (77, 46),
    "getdents64": (217, 61), "newfstatat": (262, 79), "statx": (332, 291), "readlinkat": (267, 78),
    "faccessat": (269, 48), "faccessat2": (439, 439), "getcwd": (79, 17),
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "mremap": (25, 216),
    "madvise": (28, 233), "futex": (202, 98), "membarrier": (324, 283), "rseq": (334, 293),
    "set_robust_list": (273, 99), "sched_yield": (24, 124), "sched_getaffinity": (204, 123),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "restart_syscall": (219, 128), "exit": (60, 93), "exit_group": (231, 94),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "gettimeofday": (96, 169), "times": (100, 153), "getrusage": (98, 165), "uname": (63, 160),
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174), "getgid": (104, 176),
    "geteuid": (107, 175), "getegid": (108, 177), "getrandom": (318, 278),
}  # fmt: skip
FCNTL, OPENAT = (72, 25), (257, 56)
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC: F_SETOWN with F_SETSIG would send signals to any process
FCNTL_COMMANDS = (0, 1, 2, 3, 1030)
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH

LOAD, AND, JUMP_IF, RETURN = 0x20, 0x54, 0x15, 0x06  # of classic BPF
ALLOW, DENY, KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER, SIGKILL = 2, 9

WRITE_FILE, READ_FILE, READ_DIR, MAKE_REG = (1 << bit for bit in (1, 2, 3, 8))
# The rights of Landlock's first version; what later ones add (moves, truncation, ioctl) the filter denies.
GOVERNED = (1 << 13) - 1

libc = ctypes.CDLL(None, use_errno=True)


def demand(result: int, what: str) -> int:
    """`result` of a system call; raises where it is negative."""
    if result < 0:
        raise OSError(f"{what} is not available ({os.strerror(ctypes.get_errno())})")
    return result


def landlock(number: int, *arguments: object, what: str) -> int:
    return demand(libc.syscall(ctypes.c_long(number), *arguments), f"Landlock ({what}; Linux 5.13 or later)")


def restrict_files(readable: list[str], folder: str) -> int:
    """Leave reading in `readable` and plain files in `folder`; returns the kernel's version of Landlock."""
    version = landlock(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1), what="version")
    attributes = ctypes.create_string_buffer(struct.pack("=Q", GOVERNED), 8)
    ruleset = landlock(444, attributes, ctypes.c_size_t(8), ctypes.c_uint32(0), what="ruleset")
    rules = [(path, READ_FILE | READ_DIR) for path in readable]
    rules.append((folder, READ_FILE | READ_DIR | WRITE_FILE | MAKE_REG))
    for path, rights in rules:
        beneath = os.open(path, os.O_PATH | os.O_DIRECTORY)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, beneath), 12)
        landlock(445, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint32(0), what=f"rule for {path}")
        os.close(beneath)
    landlock(446, ctypes.c_int(ruleset), ctypes.c_uint32(0), what="restriction")
    os.close(ruleset)
    return version


def filter_program() -> list[tuple[int, int, int, int]]:
    """BPF instructions (code, jump if true, jump if false, constant) that allow what is listed and deny the rest."""
    column, architecture = MACHINES[os.uname().machine]
    # seccomp_data: number at 0, architecture at 4, low words of the arguments at 16, 24, 32, ...
    program = [(LOAD, 0, 0, 4), (JUMP_IF, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    for numbers in ALLOWED.values():
        program += [(JUMP_IF, 0, 1, numbers[column]), (RETURN, 0, 0, ALLOW)]
    # A file that may be read could be emptied on being opened for that: the first version does not govern O_TRUNC.
    flags = [(LOAD, 0, 0, 32), (AND, 0, 0, os.O_TRUNC | os.O_ACCMODE), (JUMP_IF, 0, 1, os.O_TRUNC | os.O_RDONLY)]
    flags += [(RETURN, 0, 0, DENY), (RETURN, 0, 0, ALLOW)]
    commands = [(LOAD, 0, 0, 24)]
    for command in FCNTL_COMMANDS:
        commands += [(JUMP_IF, 0, 1, command), (RETURN, 0, 0, ALLOW)]
    commands.append((RETURN, 0, 0, DENY))
    for numbers, checks in ((OPENAT, flags), (FCNTL, commands)):
        program += [(JUMP_IF, 0, len(checks), numbers[column]), *checks]
    return [*program, (RETURN, 0, 0, DENY)]


def filter_system_calls() -> None:
    instructions = b"".join(struct.pack("=HBBI", *instruction) for instruction in filter_program())
    array = ctypes.create_string_buffer(instructions, len(instructions))
    program = ctypes.create_string_buffer(struct.pack("HP", len(instructions) // 8, ctypes.addressof(array)))
    demand(libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), program, 0, 0), "a seccomp filter")


def limit(kind: int, value: int) -> None:
    """Lower a resource limit for good; one that is lower already stays."""
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def confine(parent: int, memory_bytes: int, file_bytes: int) -> int:
    """Give everything up, for good; returns the kernel's version of Landlock."""
    demand(libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(SIGKILL), 0, 0, 0), "PR_SET_PDEATHSIG")
    if os.getppid() != parent:
        raise OSError("the grader has ended")
    demand(libc.prctl(PR_SET_DUMPABLE, ctypes.c_ulong(0), 0, 0, 0), "PR_SET_DUMPABLE")
    limit(resource.RLIMIT_AS, memory_bytes)
    limit(resource.RLIMIT_FSIZE, file_bytes)
    limit(resource.RLIMIT_NOFILE, 32)
    demand(libc.prctl(PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    demand(libc.capset(struct.pack("=Ii", 0x20080522, 0), bytes(24)), "giving up the capabilities")
    # Extension modules load libraries when they are imported, so where these lie stays readable.
    libraries = [os.path.join(sys.base_prefix, "lib"), "/lib", "/lib64", "/usr/lib", "/usr/lib64"]
    version = restrict_files([path for path in (*sys.path, *libraries) if os.path.isdir(path)], ".")
    filter_system_calls()
    return version


def main() -> None:
    parent, ready, length, memory_bytes, file_bytes = map(int, sys.argv[1:])
    submission = b""
    while len(submission) < length:
        submission += os.read(0, length - len(submission))
    try:
        report = f"landlock {confine(parent, memory_bytes, file_bytes)}\n"
    except BaseException as error:
        os.write(ready, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)
    os.write(ready, report.encode())
    os.close(ready)

    # without `site`, which would put installed packages on the path, these are missing
    from _sitebuiltins import Quitter  # noqa: PLC0415

    builtins.exit, builtins.quit = Quitter("exit", "Ctrl-D"), Quitter("quit", "Ctrl-D")
    sys.argv = ["submission.py"]
    sys.modules["__main__"] = module = type(sys)("__main__")
    exec(compile(submission, "submission.py", "exec"), module.__dict__)


if __name__ == "__main__":
    main()
