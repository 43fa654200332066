"""The sandbox: what untrusted code can do, what it cannot, and what happens where it could not be held."""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.escapes import DIRECT, PREAMBLE
from support.sandboxing import needs_sandbox

from coding import confined
from coding.confined import Limits, SandboxError, run_confined
from coding.sandbox import protection, run_python

pytestmark = needs_sandbox

EXAMPLES = Path(confined.__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where submissions run during one test; at its end nothing of them may be left, neither files nor processes."""
    home = tmp_path / "runs"
    home.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(home))
    yield home
    assert list(home.iterdir()) == []
    assert submissions_of(os.getpid()) == []


def submissions_of(grader: int) -> list[str]:
    """Ids of the processes that run submissions for this process id; it is among their arguments."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_text().split("\0")
        except OSError:  # it has ended
            continue
        if any(argument.endswith("confine.py") for argument in arguments) and str(grader) in arguments:
            found.append(process.name)
    return found


def unconfined(code: str, folder: Path, descriptor: int) -> str:
    command = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(
        command,
        cwd=folder,
        env={"SECRET": "1"},
        pass_fds=[descriptor],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", DIRECT)
def test_sandbox_refuses_what_works_outside(name: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "grader").mkdir()
    (tmp_path / "free").mkdir()
    secret = tmp_path / "grader" / "secret"
    secret.write_text("42")
    descriptor = os.open(secret, os.O_RDONLY)
    os.set_inheritable(descriptor, True)
    names = f"secret, parent, descriptor = {str(secret)!r}, {os.getpid()}, {descriptor}\n"
    code = f"{PREAMBLE}{names}{DIRECT[name]}\nprint('did it')\n"
    try:
        done = run_python(code, timeout=5)
        assert "did it" not in done.stdout
        assert done.ended == "exit"
        assert done.returncode == 1
        assert secret.read_text() == "42"
        assert [path.name for path in secret.parent.iterdir()] == ["secret"]
        assert "did it" in unconfined(code, tmp_path / "free", descriptor)
    finally:
        os.close(descriptor)


def test_sandbox_runs_an_ordinary_program(folder: Path) -> None:
    done = run_python(
        "import sys, math, json, re, dataclasses, collections, random, hashlib\n"
        "print(input(), math.prod([2, 3]), __name__, sys.argv)\n"
        "print('trouble', file=sys.stderr)\n"
        "open('left.txt', 'w').write('here')\n"
        "open('left.txt', 'a').write(open('left.txt').read())\n"
        "print(sorted(__import__('os').listdir('.')))\n"
        "import __main__; print(__main__.math is math)\n"
        "quit(3)\n",
        stdin="hello\n",
    )
    assert (done.ended, done.returncode) == ("exit", 3)
    assert done.stdout == "hello 6 __main__ ['submission.py']\n['left.txt']\nTrue\n"
    assert done.stderr == "trouble\n"
    assert done.files == {"left.txt": b"herehere"}


def test_sandbox_hands_on_nothing_but_the_three_streams(folder: Path) -> None:
    done = run_python(
        "import os, sys\n"
        "def is_open(descriptor):\n"
        "    try: return bool(os.fstat(descriptor))\n"
        "    except OSError: return False\n"
        "print([d for d in range(64) if is_open(d)], any('site-packages' in path for path in sys.path))\n"
    )
    assert done.stdout == "[0, 1, 2] False\n"


def test_sandbox_leaves_no_memory_image_of_a_crash(folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    try:
        done = run_python("import ctypes; ctypes.string_at(0)")
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))
    assert (done.ended, done.files) == ("signal", {})


def test_sandbox_keeps_limits_that_are_lower_already(tmp_path: Path) -> None:
    code = (
        f"import resource, sys; sys.path.insert(0, {str(EXAMPLES)!r})\n"
        "from coding.sandbox import run_python\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))\n"
        'for n in (10, 20): print(run_python(f\'files = [open("a", "w") for _ in range({n})]\').returncode)\n'
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout == "0\n1\n"


def test_sandbox_says_what_holds() -> None:
    assert repr(protection()).startswith("Protection(Landlock ")
    assert "seccomp" in repr(protection())


@pytest.mark.parametrize(
    ("code", "ended"),
    [
        ("while True: pass", "timeout"),
        ("import time; time.sleep(60)", "timeout"),
        ("import os; os.close(1); os.close(2)\nwhile True: pass", "timeout"),
        ("import signal\nfor s in (2, 3, 15): signal.signal(s, signal.SIG_IGN)\nwhile True: pass", "timeout"),
        ("while True: print('a' * 1000)", "output"),
        ("import sys\nwhile True: sys.stderr.write('a')", "output"),
        ("i = 0\nwhile True:\n    open(str(i), 'w').close(); i += 1", "files"),
        ("for i in range(17): open(str(i), 'w').close()", "files"),
        ("import ctypes; ctypes.string_at(0)", "signal"),
        ("import os; os.abort()", "signal"),
        ("import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()", None),
        ("import os\nwhile True:\n    os.fork()", "exit"),
        ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "timeout"),
        ("bytearray(10 * 2**30)", "exit"),
        ("a = []\nwhile True: a.append(bytearray(2**20))", "exit"),
        ("raise SystemExit(0)\x00", "exit"),
        ("x = '\ud800'", "exit"),
        ("(" * 10_000, "exit"),
        ("open('a', 'w').write('a' * 2**17)", "exit"),
        ("files = [open('a', 'w') for _ in range(64)]", "exit"),
        ("import os; os.ftruncate(os.open('a', os.O_RDWR | os.O_CREAT), 2**40)", "exit"),
    ],
)
def test_sandbox_survives(code: str, ended: str | None, folder: Path) -> None:
    start = time.monotonic()
    done = run_python(code, timeout=20 if ended not in ("timeout", None) else 0.5)
    assert time.monotonic() - start < 10
    assert done.ended == ended or ended is None
    assert done.returncode != 0 or ended == "files"
    assert len(done.stdout) <= 2**16
    assert len(done.stderr) <= 2**16
    assert all(len(content) <= 2**16 for content in done.files.values())
    assert run_python("print('alive')").stdout == "alive\n"


def test_sandbox_limits_are_the_callers(folder: Path) -> None:
    printing, allocating = "print('a' * 1000)", "bytearray(2**27); print('done')"
    assert run_python(printing).ended == "exit"
    assert run_python(printing, output_bytes=1000).ended == "output"
    assert run_python(allocating).stdout == "done\n"
    assert "MemoryError" in run_python(allocating, memory_bytes=2**27).stderr
    writing = "open('a', 'w').write('a' * 1000); open('b', 'w').close()"
    assert len(run_python(writing).files["a"]) == 1000
    assert len(run_python(writing, file_bytes=999).files["a"]) == 999
    assert run_python(writing, max_files=2).ended == "exit"
    too_many = run_python(writing, max_files=1)
    assert (too_many.ended, too_many.files) == ("files", {})
    sleeping = "import time; time.sleep(.4)"
    assert run_python(sleeping, timeout=5).ended == "exit"
    assert run_python(sleeping, timeout=0.2).ended == "timeout"


def test_sandbox_reads_whatever_was_left(folder: Path) -> None:
    done = run_python(
        "import os, sys\n"
        "os.write(os.open('hidden', os.O_WRONLY | os.O_CREAT, 0), b'x')\n"
        "open(b'\\xff', 'w').close()\n"
        "sys.stdout.buffer.write(b'\\xff\\x00ok')\n"
    )
    assert done.stdout == "\ufffd\x00ok"
    assert done.files == {"hidden": b"x", "\udcff": b""}


def test_sandbox_keeps_runs_apart(folder: Path) -> None:
    run_python("open('note', 'w').write('x'); import builtins; builtins.note = 1")
    assert run_python("import os; print(os.listdir('.'), 'note' in dir(__builtins__))").stdout == "[] False\n"


@pytest.mark.parametrize(
    ("limit", "value"), [("timeout", 0), ("timeout", float("inf")), ("memory_bytes", -1), ("max_files", 1.5)]
)
def test_sandbox_refuses_limits_that_are_none(limit: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"`{limit}` should be a positive .* Found {value}"):
        run_python("pass", **{limit: value})
    with pytest.raises(ValueError, match="`memory_bytes` should be 67108864 or more. Found 67108863"):
        run_python("pass", memory_bytes=2**26 - 1)
    assert run_python("import json, dataclasses; print(1)", memory_bytes=2**26).stdout == "1\n"


@pytest.fixture
def patched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Runs `confine.py` with one piece of its text replaced."""

    def patch(old: str, new: str) -> None:
        text = confined.CONFINE.read_text()
        assert old in text
        script = tmp_path / "confine.py"
        script.write_text(text.replace(old, new))
        monkeypatch.setattr(confined, "CONFINE", script)

    return patch


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("landlock(444, None", "landlock(9999, None", "Landlock .version; Linux 5.13 or later. is not available"),
        ("landlock(445", "landlock(9999", "Landlock .rule for .* is not available"),
        ("landlock(446", "landlock(9999", "Landlock .restriction.* is not available"),
        ("libc.prctl(PR_SET_SECCOMP", "libc.prctl(9999", "a seccomp filter is not available .Invalid argument"),
        ("libc.prctl(PR_SET_NO_NEW_PRIVS", "libc.prctl(9999", "PR_SET_NO_NEW_PRIVS is not available"),
        ("libc.prctl(PR_SET_PDEATHSIG", "libc.prctl(9999", "PR_SET_PDEATHSIG is not available"),
        ("0x20080522", "0", "giving up the capabilities is not available"),
        ("os.getppid() != parent", "True", "the grader has ended"),
        ("import ctypes", "import ctypes_of_another_python as ctypes", "the interpreter did not start"),
    ],
)
def test_sandbox_runs_nothing_where_something_is_missing(
    old: str, new: str, message: str, patched: Callable[[str, str], None], folder: Path
) -> None:
    patched(old, new)
    with pytest.raises(SandboxError, match=f"cannot be confined here: .*{message}"):
        run_confined("raise SystemExit(7)", "", Limits())


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("    filter_system_calls()\n", "", "could make a process\ncould open a socket\ncould signal the grader"),
        ('    landlock(446, ctypes.c_int(ruleset), ctypes.c_uint32(0), what="restriction")\n', "", "could read a file"),
        ("    limit(resource.RLIMIT_AS, memory_bytes)\n", "", "could allocate"),
        ('"newfstatat": (262, 79), ', "", "Found Completed.ended='exit', returncode=1"),
    ],
)
def test_sandbox_is_probed_before_it_is_trusted(
    old: str, new: str, found: str, patched: Callable[[str, str], None], folder: Path
) -> None:
    patched(old, new)
    protection.cache_clear()
    try:
        with pytest.raises(SandboxError, match=f"A probe of the sandbox should be held(.|\n)*{found}"):
            run_python("pass")
    finally:
        protection.cache_clear()


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="i386 system calls are x86_64's")
def test_sandbox_kills_on_a_system_call_of_another_architecture(folder: Path) -> None:
    done = run_python(
        "import ctypes, mmap\n"
        "memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)\n"
        "memory.write(b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3')  # mov eax, getpid; int 0x80; ret\n"
        "print('calling', flush=True)\n"
        "print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))())\n"
    )
    assert (done.stdout, done.ended) == ("calling\n", "signal")


@pytest.mark.parametrize(
    "attempt",
    ["open(path, 'a')", "open(path, 'r+')", "open(path, 'w')", "os.open(path, os.O_RDONLY | os.O_TRUNC)"],
)
def test_sandbox_keeps_libraries_as_they_are(
    attempt: str, patched: Callable[[str, str], None], tmp_path: Path, folder: Path
) -> None:
    module = tmp_path / "library" / "module.py"
    module.parent.mkdir()
    module.write_text("x = 1")
    patched("libraries = [", f"libraries = [{str(module.parent)!r}, ")
    code = f"import os\npath = {str(module)!r}\nprint(open(path).read(), flush=True)\n{attempt}"
    done, _ = run_confined(code, "", Limits())
    assert done.stdout == "x = 1\n"
    assert "PermissionError" in done.stderr
    assert module.read_text() == "x = 1"
    assert "PermissionError" not in unconfined(code, tmp_path, 0)


def test_sandbox_leaves_no_process_behind_when_the_grader_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, tempfile\n"
        f"sys.path.insert(0, {str(EXAMPLES)!r}); tempfile.tempdir = {str(tmp_path)!r}\n"
        "from coding.sandbox import run_python\n"
        'run_python(\'open("started", "w").write("running")\\nimport time; time.sleep(60)\', timeout=60)\n'
    )
    grader = subprocess.Popen([sys.executable, "-c", code])
    try:
        # the probe comes first, and is short
        until(lambda: any(path.read_text() == "running" for path in tmp_path.glob("submission-*/started")), seconds=20)
        (running,) = map(int, submissions_of(grader.pid))
        assert os.getsid(running) == running  # an interrupt from the terminal is the grader's alone
    finally:
        grader.kill()
        grader.wait()
    until(lambda: not submissions_of(grader.pid), seconds=5)


def until(holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)
