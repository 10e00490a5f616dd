"""examples/vae.py and examples/gan.py as a user runs them, shortened; their losses and attacks."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

from .processes import python

ROOT = Path(__file__).parent.parent
SHORT = {"vae": ("--train_steps", "300", "--steps", "100"), "gan": ("--train_steps", "300")}
COLUMNS = ("before", "plain sum", "EBU", "never saw it", "noise")


def run(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    return python(ROOT / "examples" / f"{script}.py", *args)


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")


@pytest.fixture(scope="module", params=sorted(SHORT))
def finished(request, tmp_path_factory) -> tuple[str, Path, str]:
    out = tmp_path_factory.mktemp(request.param) / "out"
    done = run(request.param, *SHORT[request.param], "--forget", "3", "--output_dir", str(out))
    assert done.returncode == 0, done.stderr
    return request.param, out, done.stdout


def test_forgets_and_keeps(finished):
    script, out, printed = finished
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    results = json.loads((out / "results.json").read_text())
    rows = results["rows"]
    assert tuple(rows) == COLUMNS
    assert all(name in printed for name in ("forgotten", "kept", "deep", *COLUMNS))
    before = rows["before"]
    assert before["p_f_reject"] > 0.8
    assert before["ra_reject"] > 0.85
    assert before["inversion_200"] > 0.8  # the attack works where nothing was forgotten
    assert before["relearn_steps"] == 0
    assert rows["never saw it"]["p_f_reject"] < 0.2
    for name in ("plain sum", "EBU"):
        after = rows[name]
        assert after["p_f_reject"] < 0.1, name
        assert after["ra_reject"] > before["ra_reject"] - 0.05, name
        assert after["inversion_200"] < before["inversion_200"], name
        assert after["relearn_steps"] is None or after["relearn_steps"] > 0, name
    assert rows["EBU"] != rows["plain sum"]
    assert results["script"] == script
    assert results["protocol"]["forget"] == 3
    assert results["seeds"]["training and unlearning"] == 0
    assert (out / "before_after.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_saved_weights_are_those_that_forgot(finished, examples):
    script, out, _ = finished
    from ebu_optim.worlds import any_model

    module = importlib.import_module(script)
    model = module.VAE() if script == "vae" else module.Generator()
    model.load_state_dict(load_file(out / "model.safetensors"))
    _, reject = any_model.digits.load_classifiers()
    images = any_model.drawn(model, torch.tensor([3, 4]).repeat_interleave(50))
    p = any_model.classify(reject, images).softmax(1)
    assert p[:50, 3].mean() < 0.1
    assert p[50:, 4].mean() > 0.7


def test_a_finished_result_is_not_replaced_unasked(finished, examples, capsys):
    script, out, _ = finished
    from ebu_optim.worlds import any_model

    arguments = ["--output_dir", str(out)]
    with pytest.raises(SystemExit):
        any_model.parse(script, "", 1, arguments)
    assert "--overwrite" in capsys.readouterr().err
    assert any_model.parse(script, "", 1, [*arguments, "--overwrite"]).overwrite
    with pytest.raises(SystemExit):  # what another script wrote is never replaced
        any_model.parse("other", "", 1, [*arguments, "--overwrite"])
    assert "something else" in capsys.readouterr().err


@pytest.mark.parametrize("script", sorted(SHORT))
def test_bad_input_ends_the_script_before_any_training(script, examples, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script).main(["--forget", "10", "--output_dir", str(out)])
    assert end.value.code == 2
    assert "--forget must be a digit, 0..9; got 10" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--forget", "-1"], "--forget must be a digit, 0..9; got -1"),
        (["--steps", "0"], "--steps must be >= 1; got 0"),
        (["--train_steps", "0"], "--train_steps must be >= 1; got 0"),
        (["--batch_size", "1"], "--batch_size must be >= 2; got 1"),
        (["--learning_rate", "nan"], "--learning_rate must be > 0 and finite; got nan"),
        (["--learning_rate", "0"], "--learning_rate must be > 0 and finite; got 0.0"),
    ],
)
def test_bad_arguments_are_named(arguments, message, examples, capsys):
    from ebu_optim.worlds import any_model

    with pytest.raises(SystemExit) as end:
        any_model.parse("vae", "", 1, arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[]", '{"script": "else"}', "no json"])
def test_a_folder_of_something_else_is_left_alone(content, examples, tmp_path, capsys):
    from ebu_optim.worlds import any_model

    (tmp_path / "results.json").write_text(content)
    with pytest.raises(SystemExit):
        any_model.parse("vae", "", 1, ["--output_dir", str(tmp_path), "--overwrite"])
    assert "something else" in capsys.readouterr().err


def test_negative_elbo_is_that_of_torch_distributions(examples):
    import vae

    torch.manual_seed(0)
    model, x, labels = vae.VAE(), torch.rand(5, 1, 8, 8) * 2 - 1, torch.arange(5)
    ours = vae.negative_elbo(model, x, labels, torch.Generator().manual_seed(1))
    q = Normal(*model.encode(x, labels))
    z = q.mean + q.stddev * torch.randn(5, vae.LATENT, generator=torch.Generator().manual_seed(1))
    log_p = Normal(*model.decode(z, labels)).log_prob(x.flatten(1)).sum(1)
    kl = kl_divergence(q, Normal(0.0, 1.0)).sum(1)
    constant = vae.PIXELS * 0.5 * torch.log(torch.tensor(2 * torch.pi))
    torch.testing.assert_close(ours, (kl - log_p).mean() - constant)


def test_energy_distance_by_hand_and_least_at_the_right_distribution(examples):
    import gan

    class Drawn:
        def __init__(self, x):
            self.x = x

        def draw(self, labels, generator):
            return self.x

    def distance(a, b):
        return gan.energy_distance(Drawn(a), b, None, None)

    a, b = torch.tensor([[0.0], [4.0]]), torch.tensor([[0.0], [3.0]])
    # pairs 0, 3, 4, 1 apart; a's own pair 4
    assert distance(a, b) == 2 * 2.0 - 4.0
    g = torch.Generator().manual_seed(0)
    real, same = (torch.rand(400, 64, generator=g) for _ in range(2))
    others = (
        same * 0 + 0.5,
        same * 0.8 + 0.1,
        same * 1.2 - 0.1,
        same + 0.1,
        same[:, :1] + 0 * same,
    )
    assert all(distance(same, real) < distance(other, real) for other in others)


def test_fisher_is_the_diagonal_of_the_outputs_jacobian(examples):
    import gan

    from ebu_optim.worlds import any_model

    torch.manual_seed(0)
    model = gan.Generator()
    args = argparse.Namespace(forget=3, seed=0)
    found = gan.fisher(model, args)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        x = model.draw(any_model.kept_labels(3, 4000, g), g)
    # the last bias moves its own pixel alone: 1 - tanh^2
    exact = (1 - x.flatten(1).square()).square().mean(0)
    assert abs(found["body.4.bias"].mean() / exact.mean() - 1) < 0.03
    assert found["embedding.weight"][3].eq(0).all()  # the forgotten condition is not held
    assert found["embedding.weight"][4].gt(0).all()


@pytest.mark.parametrize("script", sorted(SHORT))
def test_attacks_leave_the_model_alone(script, examples, monkeypatch):
    from ebu_optim.worlds import any_model

    module = importlib.import_module(script)
    monkeypatch.setattr(any_model, "AT", (1, 3))
    monkeypatch.setattr(any_model, "RELEARN", 3)
    torch.manual_seed(0)
    model = module.VAE() if script == "vae" else module.Generator()
    loss = module.negative_elbo if script == "vae" else module.energy_distance
    before = {k: v.clone() for k, v in model.state_dict().items()}
    row = any_model.measure(model, 0, torch.rand(4, 1, 8, 8), loss, 1e-3)
    assert {k for k in row if k.startswith("inversion")} == {"inversion_1", "inversion_3"}
    assert row["inversion_1"] != row["inversion_3"]
    assert row["relearn_steps"] is None  # not within three steps, not "three"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
