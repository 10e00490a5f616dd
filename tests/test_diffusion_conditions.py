"""Nested conditions under guidance and on a device."""

from __future__ import annotations

from typing import NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from ebu_optim import diffusion as D

from .by_hand import BAR, column, gen


class Size(NamedTuple):
    pooled: Tensor
    scale: float


def nested(shape: str, n: int, seed: int):
    """A condition of n rows, and its tensors in order."""
    g = gen(seed)
    a, b, c = (torch.randn(n, *rest, generator=g) for rest in ((3, 4), (5,), (2, 2)))
    return {
        "flat": ({"text": a}, [a]),
        "mapping": ({"text": a, "added": {"ids": b, "pooled": c, "flag": True}}, [a, b, c]),
        "inside first": ({"added": {"ids": b, "none": None}, "text": a}, [b, a]),
        "list": ({"text": a, "residuals": [b, c]}, [a, b, c]),
        "tuple": ({"text": a, "more": ((b,), [{"c": c}], 3)}, [a, b, c]),
        "named": ({"text": a, "size": Size(c, 0.5)}, [a, c]),
        "scalar": ({"text": a, "scale": torch.tensor(2.0)}, [a]),
    }[shape]


def leaves(x) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x] if x.dim() else []
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ()
    return [t for part in parts for t in leaves(part)]


SHAPES = ("flat", "mapping", "inside first", "list", "tuple", "named", "scalar")


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_guidance_gives_each_branch_its_own_nested_condition(shape, n):
    condition, ours = nested(shape, n, 1)
    null, theirs = nested(shape, n, 2)
    ddim = diffusers.DDIMScheduler(clip_sample=False)
    calls = []

    def value(tensors, i) -> float:
        return sum(float(t[i].double().mean()) for t in tensors)

    def model(x, t, **given):
        calls.append((x, given))
        found = leaves(given)
        return torch.zeros_like(x) + column([value(found, i) for i in range(len(x))], x)

    got = D.sample(
        model,
        ddim,
        condition,
        (1, 2, 2),
        num_inference_steps=2,
        guidance_scale=3.0,
        null_condition=null,
        clip=False,
        generator=gen(),
    )
    for x, given in calls:
        assert len(x) == 2 * n
        assert [type(v) for v in given.values()] == [type(v) for v in condition.values()]
        for found, a, b in zip(leaves(given), theirs, ours, strict=True):
            assert torch.equal(found[:n], a)
            assert torch.equal(found[n:], b)
    x = torch.randn((n, 1, 2, 2), generator=gen()).double().numpy()
    eps = np.array([value(theirs, i) + 3 * (value(ours, i) - value(theirs, i)) for i in range(n)])
    for a, b in ((BAR[500], BAR[0]), (BAR[0], BAR[0])):
        e = eps.reshape(-1, 1, 1, 1)
        b = 1.0 if a == b else b  # DDIM ends at alpha 1
        x = np.sqrt(b) * (x - np.sqrt(1 - a) * e) / np.sqrt(a) + np.sqrt(1 - b) * e
    np.testing.assert_allclose(got.numpy(), x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_nested_conditions_are_moved_to_the_device(shape, guidance):
    def model(x, t, **given):
        assert {v.device.type for v in (x, t, *leaves(given))} == {"meta"}
        return x

    D.sample(
        model,
        diffusers.DDIMScheduler(clip_sample=False),
        nested(shape, 2, 1)[0],
        (1, 2, 2),
        num_inference_steps=2,
        guidance_scale=guidance,
        null_condition=nested(shape, 2, 2)[0],
        device="meta",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["added"].pop("pooled"), r"null_condition\['added'\]\['pooled'\].*got none"),
        (lambda c: c["added"].update(ids=c["added"]["ids"][:1]), r"must be 2 rows; got 1 rows"),
        (
            lambda c: c["added"].update(ids=c["added"]["ids"][:, :1]),
            r"shape \(2, 1\).*\(2, 5\)",
        ),
        (
            lambda c: c["added"].update(flag=False),
            r"\['flag'\] is False, but the condition's is True",
        ),
        (lambda c: c["added"].update(other=1), r"has \['other'\], which the condition lacks"),
        (lambda c: c.update(added=3), r"null_condition\['added'\] must be a mapping"),
        (lambda c: c.update(more=(c["more"][0],)), r"null_condition\['more'\] must have 2 values"),
    ],
)
def test_a_null_condition_that_is_not_like_the_condition_is_told_where(change, message):
    def condition(seed):
        given = nested("mapping", 2, seed)[0]
        return given | {"more": [torch.zeros(2), torch.ones(2)]}

    null = condition(2)
    change(null)
    with pytest.raises(ValueError, match=message):
        D.sample(
            lambda x, t, **given: x,
            diffusers.DDIMScheduler(),
            condition(1),
            (1, 2, 2),
            num_inference_steps=1,
            guidance_scale=2.0,
            null_condition=null,
        )


def test_rows_that_are_no_images_are_refused():
    given = {"text": torch.zeros(2, 3), "bias": torch.zeros(5, 5)}
    with pytest.raises(ValueError, match=r"\['bias'\] has 5 rows for 2 images"):
        D.sample(
            lambda x, t, **given: x,
            diffusers.DDIMScheduler(),
            given,
            (1, 2, 2),
            num_inference_steps=1,
            guidance_scale=2.0,
            null_condition=given,
        )
    with pytest.raises(ValueError, match="holds no tensor"):
        D.sample(lambda x, t, **_: x, diffusers.DDIMScheduler(), {"flag": True}, (1, 2, 2))
