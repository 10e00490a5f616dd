"""The command `ebu`: it turns the file that a person has into the file that they can publish.

    ebu forget model.safetensors "cassette player" --as radio --keep neighbours.txt -o without

ebu forget     makes a model forget; writes the result with a report and evidence
ebu evaluate   runs published evaluations by name
ebu compare    compares models with one another and with published figures
ebu attack     attacks a model to find out whether the concept is really gone
ebu show       prints the report of a folder
ebu verify     checks that a folder is the one that was handed over
ebu doctor     prints what is installed, which kernels run and what fits on this card
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import __version__
from ._extras import require


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of `COMMANDS`. An error that the user can fix is one line; the exit status is 2."""
    given = list(sys.argv[1:] if argv is None else argv)
    name = given[0] if given else "--help"
    if name in ("-h", "--help"):
        print(__doc__.strip())
        print(
            "\n`ebu COMMAND --help` prints the options of a command, `ebu --version` the version."
        )
        return
    if name == "--version":
        print(f"ebu_optim {__version__}")
        return
    if name not in COMMANDS:
        print(f"ebu: error: no command {name!r}; use one of {', '.join(COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    try:
        require("jsonargparse", "text-to-image")
        COMMANDS[name](given[1:])
    except ImportError as error:
        print(f"ebu: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _run(name: str, function: Any, config: Any, doc: str, argv: Sequence[str]) -> None:
    from .training.command_line import command

    command(function, config, doc, argv, prog=f"ebu {name}")


def _forget(argv: Sequence[str]) -> None:
    from . import takedown

    function, config = takedown.chosen(argv)
    _run("forget", function, config, takedown.run.__doc__ or "", argv)


def _attack(argv: Sequence[str]) -> None:
    from .attacks import options, run

    _run("attack", run.attack, options.AttackOptions, run.__doc__ or "", argv)


def _evaluate(argv: Sequence[str]) -> None:
    from .protocols import Evaluate, run

    _run("evaluate", run.evaluate, Evaluate, run.__doc__ or "", argv)


def _compare(argv: Sequence[str]) -> None:
    from .protocols import compare

    _run("compare", compare.compare, compare.Compare, compare.__doc__ or "", argv)


def _show(argv: Sequence[str]) -> None:
    from .training.fields import option

    @dataclass(frozen=True, kw_only=True)
    class Show:
        folder: Path = option(positional="FOLDER", help="A folder that `ebu forget` made.")

    _run("show", lambda config: show(config.folder), Show, "Print the report of a folder.", argv)


def show(folder: Path) -> None:
    """Print the table of a report and the path of its page.

    Raises:
        InputError: the folder holds no report.
    """
    from .errors import InputError

    found = next((f for f in (folder / "report", folder) if (f / "results.md").is_file()), None)
    if found is None:
        raise InputError(f"{folder} holds no report; give a folder that `ebu forget` made")
    print((found / "results.md").read_text(encoding="utf-8"))
    print(f"the page with the images: {found / 'report.html'}")


def _verify(argv: Sequence[str]) -> None:
    from .training.fields import option

    @dataclass(frozen=True, kw_only=True)
    class Verify:
        folder: Path = option(positional="FOLDER", help="A folder that `ebu forget` made.")
        public_key: Path | None = option(None, help="Public key (PEM) of the signer.")
        certificates: list[Path] = option(
            [], help="Root certificates that you trust, if a certificate signed the folder."
        )
        base: str | None = option(None, help="New place of the original model, if it was moved.")

    _run(
        "verify",
        verify,
        Verify,
        "Compute every hash of the evidence again and name what has changed.",
        argv,
    )


def verify(config: Any) -> None:
    """Print every difference from the evidence; exit with status 1 if there is one."""
    from .takedown import evidence

    wrong = evidence.verify(
        config.folder,
        public_key=config.public_key,
        certificates=config.certificates,
        base=config.base,
    )
    for line in wrong:
        print(line)
    if wrong:
        raise SystemExit(1)
    signed = " and signed" if config.public_key or config.certificates else ""
    print(f"{config.folder}: every file is as {evidence.FILE} says{signed}")
    print(f"What that proves: {evidence.PROVES}")


_DOCTOR = """Print what is installed, which kernels run and what fits on this card."""


def _doctor(argv: Sequence[str]) -> None:
    from .takedown.doctor import doctor
    from .training.fields import option

    @dataclass(frozen=True, kw_only=True)
    class Doctor:
        no_memory: bool = option(
            False, help="Leave out the count of what fits on which card, which takes two minutes."
        )

    _run("doctor", lambda c: print(doctor(fits=not c.no_memory)), Doctor, _DOCTOR, argv)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "forget": _forget,
    "evaluate": _evaluate,
    "compare": _compare,
    "attack": _attack,
    "show": _show,
    "verify": _verify,
    "doctor": _doctor,
}
