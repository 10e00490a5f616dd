"""A pass without gradients under autocast takes no gradient from a later one.

Autocast keeps the 16-bit copies of the weights until its block ends. An older torch (seen in 2.4.1)
hands a copy that was made under no_grad to the passes with gradients too, which then end at it: no
error, and no gradient for any Conv or Linear. On a newer torch these tests hold without our doing.
"""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ebu_optim import DiagonalFisher
from ebu_optim import diffusion as D
from ebu_optim.metrics import classify

from .models import schedule, tiny_unet

SHAPE = (1, 8, 8)
LABELS, OTHERS, NULL = torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([4, 4])
X = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(1)) * 2 - 1
T = torch.tensor([10, 500])


def gen() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def relabelled(model, source):
    return D.relabel_loss(
        model, X, LABELS, OTHERS, schedule(), teacher=source, timesteps=T, noise=X.flip(0)
    )


def guided(model, source):
    ddim = DDIMScheduler.from_config(schedule().config)
    x_t, t = D.partly_denoised(
        source, ddim, LABELS, 4, SHAPE, num_inference_steps=3, earliest=1, generator=gen()
    )
    return D.esd_loss(model, source, x_t, t, LABELS, NULL)


def anchored(model, source):
    def on_labels(m):
        return lambda x, t, encoder_hidden_states: m(x, t, class_labels=encoder_hidden_states)

    return D.anchor_loss(on_labels(model), on_labels(source), X, T, LABELS) + D.denoising_loss(
        model, X, LABELS, schedule(), timesteps=T, noise=X.flip(0)
    )


def distilled(model, source):
    D.distillation_loss(model, source, X, LABELS, schedule(), timesteps=T, generator=gen())
    return D.denoising_loss(model, X, LABELS, schedule(), timesteps=T, noise=X.flip(0))


def after_a_fisher(model, source):
    batches = D.FisherBatches(X, LABELS, schedule(), timesteps=2)
    DiagonalFisher.estimate(source, D.fisher_loss(schedule()), batches, method="loop")
    return D.denoising_loss(model, X, LABELS, schedule(), timesteps=T, noise=X.flip(0))


def after_a_measure(model, source):
    def logits(of):
        return lambda x: of(x, T, class_labels=LABELS).sample

    classify(logits(source), X)
    return D.denoising_loss(model, X, LABELS, schedule(), timesteps=T, noise=X.flip(0))


def gradients(loss, model, source) -> dict[str, Tensor | None]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss(model, source).backward()
    return {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    "loss",
    [relabelled, guided, anchored, distilled, after_a_fisher, after_a_measure],
)
def test_the_gradient_is_that_with_a_frozen_copy_as_the_other_model(loss):
    model = tiny_unet()
    frozen = copy.deepcopy(model)  # autocast keeps copies by tensor: its are not the model's
    expected = gradients(loss, model, frozen)
    found = gradients(loss, model, model)
    for name, grad in expected.items():
        assert (grad is None) == (found[name] is None), name
        assert grad is None or torch.equal(grad, found[name]), name
    assert expected["conv_in.weight"].any()
