"""A script that stops itself at a given moment, so that a signal meets it there on any machine.

    python -m tests.stopping FILE SCRIPT ARGUMENTS

runs the script and stops (SIGSTOP) when FILE is there, at the next file that the script opens,
renames or removes. `signalled` starts one, sends its signal then and lets it go on.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

from .processes import ROOT, environment


def signalled(
    how: signal.Signals, moment: Path, script: Path, *arguments: object
) -> tuple[int, str]:
    """Exit code, negative for a signal, and stderr of the script that got `how` at its moment."""
    command = [sys.executable, "-m", "tests.stopping", moment, script, *arguments]
    with subprocess.Popen(
        [*map(str, command)],
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            found = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            assert found.si_code == os.CLD_STOPPED, f"ended before {moment} was there"
            process.send_signal(how)
            process.send_signal(signal.SIGCONT)
            _, said = process.communicate()
        finally:
            process.kill()
    return process.returncode, said


def main(moment: str, script: str, *arguments: str) -> None:
    stopped = False

    def heard(event: str, _: object) -> None:
        nonlocal stopped
        if not stopped and event in ("open", "os.rename", "os.remove") and os.path.exists(moment):
            stopped = True
            os.kill(os.getpid(), signal.SIGSTOP)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever this process inherited
    sys.addaudithook(heard)
    sys.argv, sys.path[0] = [script, *arguments], str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
