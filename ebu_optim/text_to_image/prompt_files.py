"""Reads prompts: given as text, in text files, or in CSV and parquet tables."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError

PROMPT = "prompt"
#: Names of the columns for seed and guidance in published tables (I2P, UnlearnDiffAtk, ESD,
#: COCO-10k).
SEED = ("evaluation_seed", "sd_seed", "seed")
GUIDANCE = ("evaluation_guidance", "sd_guidance_scale", "guidance_scale", "guidance")
ENDINGS = (".txt", ".csv", ".parquet")


class Row(NamedTuple):
    """A prompt with its seed and guidance scale; None where a row has none."""

    prompt: str
    seed: int | None = None
    guidance: float | None = None


def read(values: Iterable[str], option: str) -> list[str]:
    """The prompts of :func:`rows`, without duplicates."""
    return list(dict.fromkeys(row.prompt for row in rows(values, option)))


def rows(values: Iterable[str], option: str) -> list[Row]:
    """The prompts of :func:`listed`, without duplicate rows."""
    return list(dict.fromkeys(listed(values, option)))


def listed(values: Iterable[str], option: str) -> list[Row]:
    """Prompts given as text and read from files, in their order.

    A ``.txt`` file has one prompt per line: blank lines and comments (#) are skipped, ``""`` is
    the empty prompt. A ``.csv`` or ``.parquet`` table has a column `prompt` and may have one column
    of `SEED` and one of `GUIDANCE`. Text is UTF-8, with or without a byte order mark.

    Args:
        option: the option whose values they are, for messages.

    Raises:
        InputError: a file cannot be read, has no prompt or has another ending; a table lacks the
            column `prompt`, or has two columns for the seed or the guidance; a seed is not a whole
            number >= 0, or a guidance is not a number >= 0.
    """
    found: list[Row] = []
    for value in values:
        ending = os.path.splitext(value)[1].lower()
        if ending not in ENDINGS:
            if os.path.isfile(value):
                raise InputError(
                    f"{option} {value} is a file; prompts are read from {', '.join(ENDINGS)}: "
                    "give it one of these endings"
                )
            found.append(Row(value.strip()))
            continue
        told = f"{option} {value}"
        text = ending == ".txt"
        own = _lines(told, value) if text else [row for row, _ in table(value, option, ())]
        if not own:
            raise InputError(f"{told} has no prompt: give a file with at least one")
        found += own
    return found


def _lines(told: str, path: str) -> list[Row]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{told} cannot be read: {error}") from error
    lines = [line.strip() for line in text.splitlines()]
    kept = [line for line in lines if line and not line.startswith("#")]
    return [Row("" if line == '""' else line) for line in kept]


def table(
    path: str, option: str, columns: Sequence[str] | None = None
) -> list[tuple[Row, Mapping[str, Any]]]:
    """The rows of a ``.csv`` or ``.parquet`` table that have a prompt, with their cells.

    Duplicate rows are kept.

    Args:
        columns: the cells to read in addition to those of `Row`; None: all.

    Raises:
        InputError: see :func:`listed`.
    """
    ending = os.path.splitext(path)[1].lower()
    if ending not in ENDINGS[1:]:
        raise InputError(f"{option} {path} is not a table: give a {' or '.join(ENDINGS[1:])} file")
    told = f"{option} {path}"
    read = read_csv if ending == ".csv" else _parquet
    try:
        names, cells = read(Path(path), columns)
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{told} cannot be read: {error}") from error
    if PROMPT not in names:
        raise InputError(f"{told} has no column {PROMPT!r}: it has {', '.join(map(str, names))}")
    seed, guidance = (_column(told, names, known) for known in (SEED, GUIDANCE))
    found = []
    for i, row in enumerate(cells, 1):
        prompt = str(row[PROMPT] or "").strip()
        if prompt:
            where = f"{told}, row {i}"
            own = Row(prompt, _seed(where, row.get(seed)), _guidance(where, row.get(guidance)))
            found.append((own, row))
    return found


def read_csv(
    path: Path, columns: Sequence[str] | None = None
) -> tuple[Sequence[str], Iterator[Mapping[str, Any]]]:
    """The names of all columns, and the rows with all cells."""
    with open(path, newline="", encoding="utf-8-sig") as opened:
        reader = csv.DictReader(opened)
        return list(reader.fieldnames or ()), iter(list(reader))


def _parquet(
    path: Path, columns: Sequence[str] | None
) -> tuple[Sequence[str], Iterator[Mapping[str, Any]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(f'it needs pyarrow: pip install "ebu_optim[data]" ({error})') from error
    try:
        names = parquet.read_schema(path).names
        known = (PROMPT, *SEED, *GUIDANCE, *(names if columns is None else columns))
        wanted = [n for n in names if n in known]
        return names, iter(parquet.read_table(path, columns=wanted).to_pylist())
    except ArrowException as error:
        raise ValueError(str(error)) from error


def _column(told: str, names: Sequence[str], known: Sequence[str]) -> str:
    there = [n for n in known if n in names]
    if len(there) > 1:
        raise InputError(f"{told} has the columns {' and '.join(there)}: remove all but one")
    return there[0] if there else ""


def _seed(where: str, cell: Any) -> int | None:
    number = _number(where, "seed", cell)
    if number is None:
        return None
    if number != int(number) or number < 0:
        raise InputError(f"{where}: the seed must be a whole number >= 0; got {cell!r}")
    return int(number)


def _guidance(where: str, cell: Any) -> float | None:
    number = _number(where, "guidance", cell)
    if number is not None and number < 0:
        raise InputError(f"{where}: the guidance must be >= 0; got {cell!r}")
    return number


def _number(where: str, what: str, cell: Any) -> float | None:
    """The number in a cell; None for an empty cell."""
    if cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell)):
        return None
    try:
        number = float(cell)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: the {what} must be a number; got {cell!r}") from error
    if not math.isfinite(number):
        raise InputError(f"{where}: the {what} must be a finite number; got {cell!r}")
    return number
