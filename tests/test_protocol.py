"""A protocol is complete or says what is missing."""

from __future__ import annotations

import platform

import pytest
import torch

from ebu_optim import __version__
from ebu_optim.metrics import check_protocol, versions
from ebu_optim.metrics.protocol import CLASS_WISE, PROTOCOL, missing_protocol


def whole(parts=CLASS_WISE):
    return {part: dict.fromkeys(PROTOCOL[part], "said") for part in parts}


def test_a_whole_protocol_passes_with_more_than_is_asked_for():
    protocol = whole()
    protocol["unlearning"]["condition_dropout"] = 0
    protocol["sampling"]["starting_noise"] = False
    protocol["classifier"]["more"] = None
    assert missing_protocol(protocol) == {}
    check_protocol(protocol)


def test_everything_unsaid_is_named_with_what_it_means():
    protocol = whole()
    del protocol["fid"]["reference_split"]
    protocol["unlearning"]["reduction"] = None
    protocol["unlearning"]["ema"] = ""
    protocol["data"]["replayed"] = []
    del protocol["seeds"]
    assert set(missing_protocol(protocol)) == {
        "fid.reference_split",
        "unlearning.reduction",
        "unlearning.ema",
        "data.replayed",
        "seeds.unlearning",
        "seeds.evaluation",
    }
    with pytest.raises(ValueError, match=r"6 things unsaid") as error:
        check_protocol(protocol)
    assert "unlearning.reduction: sum or mean over C, H, W" in str(error.value)


def test_parts_that_were_not_measured_are_left_out():
    parts = ("data", "nudity")
    check_protocol(whole(parts), parts)
    assert len(missing_protocol({}, parts)) == len(PROTOCOL["data"]) + len(PROTOCOL["nudity"])
    with pytest.raises(ValueError, match=r"parts must be of .*got fids"):
        check_protocol({}, ("fids",))


def test_versions_are_those_at_hand():
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert found["ebu_optim"] == __version__
    assert missing_protocol({"versions": found}, ("versions",)) == {}
