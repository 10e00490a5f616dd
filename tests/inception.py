"""Weights for torch-fidelity's Inception that a test makes: the real file's keys, random values."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch_fidelity import FeatureExtractorInceptionV3 as Inception

MODULE = "torch_fidelity.feature_extractor_inceptionv3"


def random_weights(path: Path) -> Path:
    with (
        torch.random.fork_rng(devices=[]),
        mock.patch.object(Inception, "load_state_dict"),
        mock.patch(f"{MODULE}.load_state_dict_from_url"),
    ):
        torch.manual_seed(0)
        model = Inception("inception-v3-compat", ["2048"])
        for m in model.modules():
            if isinstance(m, nn.Conv2d):  # torch's own start lets the features collapse
                nn.init.kaiming_normal_(m.weight)
    torch.save(model.state_dict(), path)
    return path
