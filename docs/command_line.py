"""Write docs/command_line.md from the configs behind the commands, so that it cannot go stale.

    python docs/command_line.py            # write it
    python docs/command_line.py --check    # exit status 1 where it is not what the configs say

The options are read from the same parser that `ebu COMMAND --help` prints.
"""

from __future__ import annotations

import re
import sys
from argparse import SUPPRESS, Action
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import jsonargparse

from ebu_optim import cli
from ebu_optim.takedown import ForgetClasses
from ebu_optim.training.command_line import add_flags
from ebu_optim.training.fields import argument_of, key_of

PAGE = Path(__file__).with_name("command_line.md")
HEAD = """\
# Command line

This page is for those who look up an option. At the end you know what each option of the command
`ebu` does, which values it takes and what its default is. It is generated from the configs behind
the commands by `docs/command_line.py`.

For an introduction read [Your model in ten minutes](forget.md). `ebu COMMAND --help` prints the
same options, and `python -m ebu_optim COMMAND` is the same command. Several values of one option
are separated by spaces. Every command also takes `--config FILE`, a YAML file of options by their
names without dashes; what follows it on the command line has precedence.
"""
KINDS = {str: "text", int: "integer", float: "number", Path: "path", dict: "JSON"}
FOR_CLASSES = (
    "ebu forget, for classes",
    "If MODEL is a folder with `classes.json`, as `examples/ddpm/train.py` makes it, `ebu forget` "
    "takes these options.",
)


def configs() -> Iterator[tuple[str, str, type]]:
    """Title, introduction and config of every command."""
    for name, command in cli.COMMANDS.items():
        yield f"ebu {name}", summary(name), config_of(command)
        if name == "forget":
            yield *FOR_CLASSES, ForgetClasses


def config_of(command: Callable[[list[str]], None]) -> type:
    """What a command gives to its parser."""
    found: list[type] = []
    run, cli._run = cli._run, lambda name, function, config, doc, argv: found.append(config)
    try:
        command([])
    finally:
        cli._run = run
    (config,) = found
    return config


def summary(name: str) -> str:
    """What `ebu --help` says of a command, as a sentence."""
    lines = (cli.__doc__ or "").splitlines()
    said = next(line for line in lines if line.startswith(f"ebu {name} ") and "  " in line)
    said = said.partition("  ")[2].strip()
    return f"{said[0].upper()}{said[1:]}" + "." * (not said.endswith("?"))


def groups(config: type) -> Iterator[tuple[str, list[Action]]]:
    """Title and options of each group, in the order of `--help`."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    add_flags(parser, config)
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if a.dest not in ("help", "print_config")]
        if actions:
            yield str(group.title), actions


def kinds(config: type) -> dict[str, str]:
    """What an option takes, by its name in the parser."""
    hints, wanted = get_type_hints(config), config
    told = {f: argument_of(f, hints[f.name]) for f in fields(wanted)}
    return {
        name: KINDS.get(how.get("type"), "")
        for f, how in told.items()
        for name in (f.name, key_of(f))
    }


def row(action: Action, kind: str) -> str:
    """A line of the table."""
    name = ", ".join(f"`{flag}`" for flag in action.option_strings) or f"`{action.metavar}`"
    values = ", ".join(f"`{choice}`" for choice in action.choices or ()) or kind
    if action.nargs == 0:
        values = "switch"
    elif action.nargs in ("+", "*"):
        values += "; one or several"
    said = " ".join(str(action.help or "").split()).replace("|", "\\|").replace("<", "&lt;")
    said = re.sub(r"(?<!\w)--?[a-z]\w*", r"`\g<0>`", said)
    return f"| {name} | {values} | {said} |"


def page() -> str:
    parts = [HEAD]
    for title, introduction, config in configs():
        parts.append(f"## {title}\n\n{introduction}\n")
        kind = kinds(config)
        for group, actions in groups(config):
            head = f"### {title}: {group.removeprefix('positional ')}\n\n"
            rows = "\n".join(row(a, kind[a.dest]) for a in actions if a.help is not SUPPRESS)
            parts.append(f"{head}| option | values | meaning |\n|---|---|---|\n{rows}\n")
    return "\n".join(parts)


def main() -> None:
    text: Any = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != text:
        raise SystemExit(f"{PAGE.name} is not what the configs say: run docs/command_line.py")


if __name__ == "__main__":
    main()
