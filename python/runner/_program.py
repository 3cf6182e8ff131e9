"""The command `runner`: where it is, and how it is asked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from typing import List, Sequence

from ._errors import RunnerError

# Ends of the command at which it has said what it found.
ANSWERED = (0, 1, 3)


def program() -> str:
    """The command that came with this package, that `RUNNER` names, or that is in PATH.

    Raises:
        RunnerError: there is none.
    """
    named = os.environ.get("RUNNER")
    if named:
        return named
    for scripts in [sysconfig.get_path("scripts"), os.path.dirname(sys.executable)]:
        path = os.path.join(scripts, "runner")
        if os.access(path, os.X_OK):
            return path
    found = shutil.which("runner")
    if found:
        return found
    raise RunnerError(
        "the command `runner` is not beside this Python and not in PATH: install the wheel, or "
        "set RUNNER to where it is"
    )


def ask(arguments: Sequence[str], also: Sequence[int] = ()) -> "subprocess.CompletedProcess[str]":
    """Runs the command; what it prints comes back. `also` are ends of it that are answers as well.

    Raises:
        RunnerError: it could not start, or ended without an answer; its own words say why.
    """
    command: List[str] = [program(), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RunnerError(f"cannot start {command[0]}: {error.strerror or error}") from error
    if done.returncode not in (*ANSWERED, *also):
        words = done.stderr.strip() or done.stdout.strip() or f"it ended with {done.returncode}"
        raise RunnerError(words)
    return done
