"""One confined run: starts `confine.py`, waits for its report, and watches what it cannot limit by itself.

    run_confined(code, stdin, limits) = (Completed, what the interpreter reported of its confinement)

Time, the amount of output and the number of files are watched from here; whatever happens, the process is killed at
the end, and as it cannot make others, nothing of it is left.
"""

import os
import selectors
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

CONFINE = Path(__file__).with_name("confine.py")
START_SECONDS = 60.0  # for the interpreter to start and confine itself on a busy machine
POLL_SECONDS = 0.02
LEAST_MEMORY = 2**26  # an interpreter with a few modules takes half of it; with less, right code would fail
Ended = Literal["exit", "signal", "timeout", "output", "files"]


class SandboxError(RuntimeError):
    """Code cannot be confined on this machine, so none is run."""


@dataclass(frozen=True)
class Limits:
    """What one run may use; see `run_python`."""

    timeout: float = 2.0
    memory_bytes: int = 2**28
    output_bytes: int = 2**16
    file_bytes: int = 2**16
    max_files: int = 16

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < 2**63 or (name != "timeout" and type(value) is not int):
                kind = "number of seconds" if name == "timeout" else "integer"
                raise ValueError(f"`{name}` should be a positive {kind}. Found {value!r}.")
        if self.memory_bytes < LEAST_MEMORY:
            raise ValueError(f"`memory_bytes` should be {LEAST_MEMORY} or more. Found {self.memory_bytes}.")


@dataclass(frozen=True)
class Completed:
    """How a run ended, and what it left.

    Args:
        ended: by itself ("exit", or "signal": a crash), or because it ran for too long, or because it printed or left
            more than it may.
        returncode: of the process; -9 where it was ended.
        stdout: at most `output_bytes`; what is not UTF-8 is replaced by U+FFFD.
        stderr: the same.
        files: name -> content of the files in its folder; none where `ended` is "files".
    """

    ended: Ended
    returncode: int
    stdout: str = field(repr=False)
    stderr: str = field(repr=False)
    files: dict[str, bytes] = field(repr=False)


def run_confined(code: str, stdin: str, limits: Limits) -> tuple[Completed, str]:
    """The completed run, and what the interpreter reported of its confinement.

    Raises:
        SandboxError: if it reported that something is missing, or nothing.
    """
    # A lone surrogate is the submission's fault: it is for its compiler to refuse.
    source = code.encode("utf-8", "surrogatepass")
    with tempfile.TemporaryDirectory(prefix="submission-") as folder, tempfile.TemporaryFile() as given:
        given.write(source + stdin.encode("utf-8", "surrogatepass"))
        given.seek(0)
        reports, ready = os.pipe()
        try:
            numbers = (os.getpid(), ready, len(source), limits.memory_bytes, limits.file_bytes)
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(CONFINE), *map(str, numbers)],
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env={},
                pass_fds=(ready,),
                start_new_session=True,
            )
        except BaseException:
            os.close(reports)
            raise
        finally:
            os.close(ready)
        with process:
            try:
                report = _report(reports)
                if not report.startswith("landlock "):
                    raise SandboxError(f"Code cannot be confined here: {report or 'the interpreter did not start'}.")
                ended, streams = _watch(process, folder, limits)
            finally:
                process.kill()
        if ended == "exit" and process.returncode < 0:
            ended = "signal"
        left = list(Path(folder).iterdir())
        if len(left) > limits.max_files:
            ended, left = "files", []
        for file in left:
            file.chmod(0o600)  # it may have been made unreadable
        files = {file.name: file.read_bytes() for file in left}
    stdout, stderr = (stream[: limits.output_bytes].decode("utf-8", "replace") for stream in streams)
    return Completed(ended, process.returncode, stdout, stderr, files), report


def _report(reports: int) -> str:
    """The line that the interpreter writes before the submission runs; the submission finds the pipe closed."""
    line, deadline = b"", time.monotonic() + START_SECONDS
    with open(reports, "rb", buffering=0) as pipe, selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while not line.endswith(b"\n") and selector.select(max(0.0, deadline - time.monotonic())):
            chunk = pipe.read(2**12)
            if not chunk:
                break
            line += chunk
    return line.decode().strip()


def _watch(process: subprocess.Popen[bytes], folder: str, limits: Limits) -> tuple[Ended, list[bytearray]]:
    """Read what the process prints, until it ends by itself or has to be ended."""
    streams = {process.stdout: bytearray(), process.stderr: bytearray()}
    ended: Ended = "exit"
    deadline = time.monotonic() + limits.timeout
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream, selectors.EVENT_READ)
        while ended == "exit" and (selector.get_map() or process.poll() is None):
            wait = min(POLL_SECONDS, deadline - time.monotonic())
            if wait <= 0:
                ended = "timeout"
            elif not selector.get_map():  # it may close what it prints to and go on
                with suppress(subprocess.TimeoutExpired):
                    process.wait(wait)
            for key, _ in selector.select(max(0.0, wait)) if selector.get_map() else ():
                chunk = os.read(key.fd, 2**16)
                streams[key.fileobj] += chunk
                if not chunk:
                    selector.unregister(key.fileobj)
            if max(map(len, streams.values())) > limits.output_bytes:
                ended = "output"
            if len(os.listdir(folder)) > limits.max_files:
                ended = "files"
    return ended, list(streams.values())
