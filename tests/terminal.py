"""A command run as a person runs it: a line of words, or on a terminal of its own, 100 columns wide."""

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import termios
from pathlib import Path

STARTUP = Path(__file__).parent / "startup"  # what each process of the tests begins with


def search_path(*folders: object) -> str:
    "PYTHONPATH for a process of the tests that imports from these folders."
    return os.pathsep.join(map(str, [STARTUP, *folders]))


def typed(*words: object) -> subprocess.CompletedProcess:
    "The exit status of `pillsnap` with these words and what it printed, without the start of a process."
    from pillsnap.cli import main

    argv, out, err, status = [str(w) for w in words], io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(argv)
        except SystemExit as end:
            status = end.code or 0
    return subprocess.CompletedProcess(argv, status, out.getvalue(), err.getvalue())


def on_a_terminal(
    command: list[str], cwd=None, env: dict[str, str] | None = None, timeout: float = 300
) -> tuple[int, str]:
    "The exit status, and everything that was written to the terminal."
    ours, theirs = pty.openpty()
    fcntl.ioctl(
        theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0)
    )  # a size of 0 makes programs print no bar at all
    process = subprocess.Popen(command, cwd=cwd, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    written = b""
    try:
        while True:
            try:
                part = os.read(ours, 1 << 16)
            except OSError:  # nobody holds the other end any more
                break
            if not part:
                break
            written += part
        return process.wait(timeout), written.decode("utf-8", "replace")
    finally:
        process.kill()
        os.close(ours)


def screen(written: str) -> list[str]:
    "The lines that are left on the screen: a carriage return begins a line again, ESC[2K empties it."
    left = []
    for line in written.replace("\r\n", "\n").split("\n"):
        line = line.split("\x1b[2K")[-1].split("\r")[-1]
        left.append(re.sub(r"\x1b\[[0-9;]*m", "", line))
    return left
