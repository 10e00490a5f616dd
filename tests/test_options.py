"""A config and its command line."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch.optim import SGD

from ebu_optim.class_conditional.options import Unlearn
from ebu_optim.errors import InputError
from ebu_optim.training import new_accelerator, new_schedule
from ebu_optim.training.command_line import parse
from ebu_optim.training.fields import as_dict, as_yaml, at_least, flags, option
from ebu_optim.training.options import SCHEDULES, TrainingOptions, ddim_takes


@dataclass(frozen=True, kw_only=True)
class Sources:
    group: ClassVar[str] = "sources"

    files: list[Path] | None = option(None, exclusive="source", help="some")
    hub: str | None = option(None, exclusive="source")


@dataclass(frozen=True, kw_only=True)
class Example(Sources):
    size: int = option(help="of it")
    kind: Literal["a", "b"] = option("a")
    rates: list[float] = option([0.5])
    more: dict[str, Any] = option({})
    fast: bool = option(False)
    remember: str = option("x", flag="--remember_loss", choices=("x", "y"))

    def __post_init__(self) -> None:
        at_least(self, 1, "size")


def test_every_kind_of_field_has_its_flag():
    argv = [
        "--size",
        "3",
        "--kind",
        "b",
        "--rates",
        "1",
        "2",
        "--fast",
        "--remember_loss",
        "y",
        "--files",
        "p",
        "q",
        "--more",
        '{"lam": 1}',
    ]
    found = parse(Example, argv)
    assert found == Example(
        size=3,
        kind="b",
        rates=[1.0, 2.0],
        more={"lam": 1},
        fast=True,
        remember="y",
        files=[Path("p"), Path("q")],
    )
    assert as_dict(found)["rates"] == [1.0, 2.0]


def test_defaults_are_the_fields_and_no_two_configs_share_one():
    found = parse(Example, ["--size", "1"])
    assert found == Example(size=1)
    assert (found.kind, found.rates, found.files, found.fast) == ("a", [0.5], None, False)
    assert found.more is not Example(size=1).more


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "the following arguments are required: --size"),
        (["--size", "many"], "argument --size: Expected int. Got value: many"),
        (["--size", "1", "--kind", "c"], "argument --kind: invalid choice: 'c'"),
        (["--size", "1", "--more", "{"], "argument --more: Expected dict. Got value: {"),
        (["--size", "1", "--hub", "a", "--files", "b"], "not allowed with argument --hub"),
        (["--size", "1", "--sizes", "1"], "unrecognized arguments: --sizes 1"),
    ],
)
def test_what_is_not_understood_is_one_line_and_status_2(argv, said, capsys):
    with pytest.raises(SystemExit) as end:
        parse(Example, argv)
    assert end.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_config_is_checked_when_it_is_made_and_nobody_writes_into_it():
    with pytest.raises(InputError, match="--size must be >= 1; got 0"):
        parse(Example, ["--size", "0"])
    found = Example(size=1)
    with pytest.raises(InputError, match="--size must be >= 1; got -1"):
        replace(found, size=-1)
    with pytest.raises(FrozenInstanceError):
        found.size = 2


GIVEN = [
    {},
    {"kind": "b", "rates": [1e-05, 2.0], "fast": True, "remember": "y"},
    {"files": [Path("a b"), Path("c")], "more": {"lam": 1e7, "deep": {"x": [None, True]}}},
    {"hub": "", "rates": [-1.0]},
]


@pytest.mark.parametrize("given", GIVEN)
def test_flags_are_the_command_line_of_a_config(given):
    config = Example(size=3, **given)
    assert parse(Example, flags(config)) == config
    assert flags(Example(size=3)) == ["--size", "3"]  # what is as by default is left out


@pytest.mark.parametrize("given", GIVEN)
def test_yaml_of_a_config_gives_it_again_and_flags_have_the_last_word(given, tmp_path):
    config = Example(size=3, **given)
    file = tmp_path / "run.yaml"
    file.write_text(as_yaml(config), encoding="utf-8")
    assert parse(Example, ["--config", str(file)]) == config
    assert parse(Example, ["--config", str(file), "--size", "4"]) == replace(config, size=4)


def test_a_file_of_options_that_cannot_be_is_one_line(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    for text, said in (
        ("sizes: 1", "run.yaml: there is no option sizes: did you mean size?"),
        ("size: many", "argument --size: Expected int. Got value: many"),
        ("kind: [a", "run.yaml is not YAML: while parsing"),
        ("fast: perhaps", "run.yaml: fast must be true or false; got 'perhaps'"),
        ("rates: 3", "run.yaml: rates must be a list, such as [rates]; got 3"),
        ("- size", "run.yaml must map options to values"),
    ):
        file.write_text(text)
        with pytest.raises(SystemExit) as end:
            parse(Example, ["--config", str(file)])
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    with pytest.raises(SystemExit):
        parse(Example, ["--config", str(tmp_path / "none.yaml")])
    assert "none.yaml" in capsys.readouterr().err


@dataclass(frozen=True, kw_only=True)
class Forgetting(Example):
    model: str = option(positional="MODEL")
    words: list[str] = option(positional="WORD")
    instead: list[str] = option([], flag=("-a", "--as"))
    size: int = option(1)


def test_what_comes_first_has_no_flag(tmp_path, capsys):
    found = parse(Forgetting, ["m", "a b", "c", "--as", "d", "--size", "2"])
    assert found == Forgetting(model="m", words=["a b", "c"], instead=["d"], size=2)
    assert parse(Forgetting, flags(found)) == found
    assert parse(Forgetting, ["m", "a b", "c", "-a", "d", "--size", "2"]) == found
    (tmp_path / "run.yaml").write_text(as_yaml(found))
    again = ["--config", str(tmp_path / "run.yaml")]
    assert parse(Forgetting, again) == found
    assert parse(Forgetting, [*again, "other"]) == replace(found, model="other")
    with pytest.raises(SystemExit):
        parse(Forgetting, ["m"])
    assert "the following arguments are required: WORD" in capsys.readouterr().err


def test_flags_of_a_command_give_its_config_again():
    config = Unlearn(
        pretrained_model_name_or_path="m",
        prepared_dir=Path("sets"),
        output_dir=Path("o"),
        method="joint",
        method_options={"forget_weight": 0.5},
        forget=["0", "cat dog"],
        learning_rate=1e-05,
        mixed_precision="bf16",
        cpu=True,
    )
    assert parse(Unlearn, flags(config)) == config


def test_help_says_what_a_group_has(capsys):
    with pytest.raises(SystemExit):
        parse(Example, ["--help"], "Makes it.")
    said = capsys.readouterr().out
    assert "Makes it." in said
    options = said.partition("help message")[2]
    assert options.index("--size SIZE") < options.index("sources:") < options.index("--hub HUB")
    assert "of it" in said


def test_training_options_refuse_what_cannot_be():
    TrainingOptions(output_dir=Path("x")).check_training()
    for bad in (
        {"max_train_steps": 0},
        {"learning_rate": 0.0},
        {"logging_steps": -1},
        {"lr_warmup_steps": -1},
        {"seed": -1},
        {"seed": 2**32},
    ):
        (name,) = bad
        with pytest.raises(InputError, match=f"--{name} must be"):
            TrainingOptions(output_dir=Path("x"), **bad).check_training()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("rate", [1e-4, 1e-9])
def test_every_schedule_that_is_offered_is_made_or_refused_at_once(name, rate):
    def config():
        made = TrainingOptions(output_dir=Path("x"), lr_scheduler=name, learning_rate=rate)
        made.check_training()
        return made

    if name == "polynomial" and rate < 1e-7:
        with pytest.raises(InputError, match=r"--lr_scheduler polynomial: .*1e-07.*1e-09"):
            config()
        return
    schedule = new_schedule(config(), SGD([torch.zeros(1)], lr=rate))
    assert schedule.get_last_lr()[0] <= rate


def test_unlearning_on_a_device_without_float64_is_refused(monkeypatch, fresh_accelerate):
    monkeypatch.setattr("ebu_optim.training.loop.has_float64", lambda device: False)
    options = {"output_dir": Path("x"), "cpu": True}
    new_accelerator(TrainingOptions(**options))  # training needs none
    with pytest.raises(InputError, match=r"float64.*give --cpu"):
        new_accelerator(Unlearn(pretrained_model_name_or_path="m", prepared_dir=Path(), **options))


@pytest.mark.parametrize(
    ("offset", "spacing", "most"),
    [(0, "leading", 1000), (1, "leading", 999), (1, "trailing", 1000)],
)
def test_as_many_steps_as_ddim_takes_are_taken(offset, spacing, most):
    schedule = DDPMScheduler(steps_offset=offset, timestep_spacing=spacing)
    for steps in (1, 50, most):
        ddim_takes(SimpleNamespace(steps=steps), schedule, "steps")
        ddim = DDIMScheduler.from_config(schedule.config)
        ddim.set_timesteps(steps)
        for t in ddim.timesteps[:1]:
            ddim.step(torch.zeros(1), t, torch.zeros(1))
    for steps in {most + 1, 1001, 5000}:
        with pytest.raises(InputError, match=f"--steps must be <= {most}, .*; got {steps}"):
            ddim_takes(SimpleNamespace(steps=steps), schedule, "steps")
