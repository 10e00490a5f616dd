"""What is remembered from step to step changes nothing: a twin that forgets does the same."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ebu_optim import EBUOptimizer
from ebu_optim.kernels.contract import Column

from ..steps import assert_same

SHAPES = ((3,), (4, 5), (0, 2), (), (2, 3, 4), (300, 30))
FLOATS = (torch.float32,) * 5 + (torch.bfloat16, torch.float16, torch.float64)
FORMS = ("dense",) * 4 + ("none", "strided", "view", "expanded", "zeros")


def parameter(rng: random.Random, dtypes: tuple[torch.dtype, ...] = FLOATS) -> nn.Parameter:
    g = torch.Generator().manual_seed(rng.randrange(2**31))
    values = torch.randn(rng.choice(SHAPES), generator=g) * rng.choice((1, 1, 0))  # theta0 = 0 too
    return nn.Parameter(values.to(rng.choice(dtypes)))


def gradient(p: Tensor, rng: random.Random) -> Tensor | None:
    """In one of the ways in which a gradient may lie in memory."""
    form = rng.choice(FORMS)
    g = torch.Generator().manual_seed(rng.randrange(2**31))
    value = torch.randn(p.shape, generator=g).to(p.dtype)
    if rng.random() < 0.02 and value.numel():
        value.view(-1)[0] = rng.choice((math.inf, math.nan))
    if form == "none":
        return None
    if form == "strided":
        return value.mT.contiguous().mT if value.dim() > 1 else value
    if form == "view":
        return torch.cat([value.flatten(), value.flatten()])[: value.numel()].view_as(value)
    if form == "expanded":
        return value.new_full((), 0.5).expand(value.shape)
    return value.zero_() if form == "zeros" else value


class Run:
    """An optimizer and its parameters, driven by seeds."""

    def __init__(self, forgets: bool, seed: int, **options: Any) -> None:
        rng = random.Random(seed)
        groups = [
            [parameter(rng, FLOATS if seed % 2 else FLOATS[:1]) for _ in range(n)] for n in (4, 2)
        ]
        base = torch.optim.Adam([{"params": ps} for ps in groups], lr=0.01, foreach=False)
        self.opt = EBUOptimizer(base, gamma=3.0, nonfinite="skip", **options)
        self.forgets = forgets

    def forget_all(self) -> None:
        if self.forgets:
            self.opt._slots._seen = []  # the next look makes another list of slots
            self.opt._anchors._columns = Column(), Column()
            self.opt._anchors._fits = None, []

    @property
    def params(self) -> list[nn.Parameter]:
        return [p for group in self.opt.param_groups for p in group["params"]]

    def step(self, rng: random.Random) -> None:
        largest = max(self.params, key=Tensor.numel)
        absent = [p is not largest and rng.random() < 0.2 for p in self.params]
        for letter in rng.choice(("fr", "fr", "rf", "frf", "rfr")):
            self.forget_all()
            with self.opt.forget() if letter == "f" else self.opt.remember():
                for p, left_out in zip(self.params, absent, strict=True):
                    g = None if left_out else gradient(p, rng)
                    p.grad = p.grad if g is None else g
                if largest.grad is None:
                    largest.grad = torch.ones_like(largest)  # a phase needs one
        self.forget_all()
        self.opt.step()
        if rng.random() < 0.7:
            self.opt.zero_grad()

    # -- what may happen between two steps --------------------------------------------------------

    def nothing(self, rng: random.Random) -> None:
        """The next step is like the last one."""

    def add_a_group(self, rng: random.Random) -> None:
        if len(self.params) < 12:
            self.opt.add_param_group({"params": [parameter(rng)], "ebu_delta": 0.4})

    def replace_a_parameter(self, rng: random.Random) -> None:
        params = rng.choice(self.opt.param_groups)["params"]
        i = rng.randrange(len(params))
        old = params[i]
        params[i] = nn.Parameter(old.detach().clone() + 1)
        self.opt.state[params[i]] = self.opt.state.pop(old, {})

    def give_other_memory(self, rng: random.Random) -> None:
        p = rng.choice(self.params)
        p.grad = None
        other = p.detach() * 2
        p.data = other.mT.contiguous().mT if other.dim() > 1 and rng.random() < 0.5 else other

    def freeze_or_thaw(self, rng: random.Random) -> None:
        rng.choice(self.params[1:]).requires_grad_(rng.random() < 0.5)

    def schedule(self, rng: random.Random) -> None:
        group = rng.choice(self.opt.param_groups)
        name, value = rng.choice(
            (
                ("alpha", 0.2),
                ("delta", 0.3),
                ("delta", (0.2, 0.7)),
                ("gamma", 7.0),
                ("gamma", 0.0),
                ("delta", torch.tensor(0.25)),
            )
        )
        group[f"ebu_{name}"] = value

    def load(self, rng: random.Random) -> None:
        self.opt.zero_grad()
        self.opt.load_state_dict(copy.deepcopy(self.opt.state_dict()))

    def copy(self, rng: random.Random) -> None:
        self.opt.zero_grad()
        self.opt = copy.deepcopy(self.opt)

    def taken(self) -> dict[str, Any]:
        return {
            "params": [p.detach() for p in self.params],
            "state": self.opt.state_dict(),
            "stats": self.opt.stats,
            "skipped": (self.opt.skipped_steps, self.opt.last_step_skipped),
            "grads": [p.grad is not None and p.grad.clone() for p in self.params],
        }


CHANGES = [
    Run.nothing,
    Run.add_a_group,
    Run.replace_a_parameter,
    Run.give_other_memory,
    Run.freeze_or_thaw,
    Run.schedule,
    Run.load,
    Run.copy,
]
OPTIONS = [
    {},
    {"granularity": "tensor"},
    {"unrelated": "freeze", "max_grad_norm": 1.0},
    {"fisher": None},
    {"fused": False},
    {"update": "routed", "penalty": "full"},
]


def same(a: Any, b: Any) -> None:
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}

    def hidden(x: Any) -> Any:  # NaN too is compared bit by bit
        if isinstance(x, Tensor) and x.is_floating_point():
            return x.contiguous().view(bits[x.element_size()]) if x.dim() else x.nan_to_num()
        if isinstance(x, dict):
            return {k: hidden(v) for k, v in x.items()}
        return [hidden(v) for v in x] if isinstance(x, (list, tuple)) else x

    assert_same(hidden(a), hidden(b))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**20),
    options=st.sampled_from(OPTIONS),
    walk=st.lists(st.sampled_from(CHANGES), min_size=3, max_size=14),
)
@pytest.mark.filterwarnings("ignore")
def test_a_twin_that_forgets_takes_the_same_steps(seed, options, walk):
    runs = [Run(forgets, seed, **options) for forgets in (False, True)]
    for i, change in enumerate(walk):
        for run in runs:
            change(run, random.Random(f"{seed} {i} change"))
            run.step(random.Random(f"{seed} {i} step"))
        same(*(run.taken() for run in runs))
