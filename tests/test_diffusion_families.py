"""Schedulers of other families than DDPM's, in the library and on disk."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch

from ebu_optim import diffusion as D
from ebu_optim.class_conditional.models import load_scheduler
from ebu_optim.errors import InputError
from ebu_optim.text_to_image import pipelines

from . import text_to_image
from .by_hand import gen

STRANGERS = {
    "FlowMatchEulerDiscreteScheduler": ({}, "no alphas_cumprod", "no beta_schedule"),
    "FlowMatchHeunDiscreteScheduler": ({}, "no alphas_cumprod", "no beta_schedule"),
    "EDMEulerScheduler": ({}, "no alphas_cumprod", "no beta_schedule"),
    "EDMDPMSolverMultistepScheduler": ({}, "no alphas_cumprod", "no beta_schedule"),
    "ScoreSdeVeScheduler": ({}, "no alphas_cumprod", "no beta_schedule"),
    "CMStochasticIterativeScheduler": ({}, "no alphas_cumprod", "no beta_schedule"),
    "VQDiffusionScheduler": ({"num_vec_classes": 3}, "no alphas_cumprod", "no beta_schedule"),
    "EulerDiscreteScheduler": (
        {"timestep_type": "continuous", "prediction_type": "v_prediction"},
        "timestep_type",
        "timestep_type",
    ),
}
if "use_flow_sigmas" in diffusers.UniPCMultistepScheduler().config:  # not in diffusers 0.31
    STRANGERS["UniPCMultistepScheduler"] = (
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
        "use_flow_sigmas",
        "use_flow_sigmas",
    )


def strange(name: str):
    options, *whys = STRANGERS[name]
    return getattr(diffusers, name)(**options), *whys


#: What the library's losses know, but not as a model of DDPM's family on disk.
FLOW = "FlowMatchEulerDiscreteScheduler"


@pytest.mark.parametrize("name", [name for name in STRANGERS if name != FLOW])
def test_a_scheduler_of_another_family_is_refused_before_anything_is_drawn(name):
    scheduler, why, _ = strange(name)
    x, y, g = torch.zeros(2, 1, 2, 2), torch.tensor([0, 1]), gen()
    before = g.get_state()

    def model(*args, **kwargs):
        raise AssertionError("called")

    for call in (
        lambda: D.denoising_loss(model, x, y, scheduler, generator=g),
        lambda: D.gaussian_forget_loss(model, x.shape, y, scheduler, generator=g),
        lambda: D.distillation_loss(model, model, x, y, scheduler, crossed=y, generator=g),
        lambda: D.relabel_loss(model, x, y, y, scheduler, generator=g),
        lambda: D.sample(model, scheduler, y, (1, 2, 2), generator=g),
        lambda: D.partly_denoised(model, scheduler, y, 0, (1, 2, 2), generator=g),
        lambda: D.FisherBatches(x, y, scheduler),
    ):
        with pytest.raises(ValueError, match=f"{name}.*{why}"):
            call()
    assert torch.equal(g.get_state(), before)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return text_to_image.pipeline(tmp_path_factory.mktemp("pipeline") / "base")


@pytest.mark.parametrize("name", STRANGERS)
def test_a_saved_scheduler_of_another_family_is_refused(pipeline, name):
    """Read as a DDPMScheduler's, its configuration would give linear betas without a word."""
    scheduler, _, why = strange(name)
    file = pipeline / "scheduler" / "scheduler_config.json"
    ours = file.read_text()
    try:
        scheduler.save_pretrained(file.parent)
        assert json.loads(file.read_text())["_class_name"] == name
        with pytest.raises(InputError, match=f"{name}.*{why}"):
            pipelines.look(pipelines.Model(pretrained_model_name_or_path=str(pipeline)))
        with pytest.raises(InputError, match=f"{name}.*{why}"):
            load_scheduler(pipeline)
    finally:
        file.write_text(ours)
    kept = json.loads(ours)
    looked = pipelines.look(pipelines.Model(pretrained_model_name_or_path=str(pipeline)))
    for found in (looked.scheduler, load_scheduler(pipeline)):
        assert found.config.beta_end == kept["beta_end"] == 0.012
