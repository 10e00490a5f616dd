"""DiagonalFisher: the three ways agree, no bias, resume, files, errors."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from ebu_optim import DiagonalFisher, EBUOptimizer
from ebu_optim.diffusion import FisherBatches, fisher_loss
from ebu_optim.fisher._per_sample import METHODS
from ebu_optim.fisher._run import Run

from .models import schedule, tiny_unet

METHOD = pytest.mark.parametrize("method", sorted(METHODS))


def images(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    return torch.rand(n, 1, 8, 8, generator=g) * 2 - 1, torch.arange(n) % 5


def batches(n: int = 6, **kwargs) -> FisherBatches:
    return FisherBatches(*images(n), schedule(), **{"batch_size": 2, "timesteps": 4, **kwargs})


def linear_case() -> tuple[nn.Module, list, torch.Tensor]:
    """y = w x with loss y: the gradient of a sample is its x."""
    model = nn.Linear(3, 1, bias=False)
    x = torch.tensor([[1.0, 2.0, 3.0], [0.0, -2.0, 1.0], [2.0, 0.0, 0.5]])
    return model, [{"x": x[:2]}, {"x": x[2:]}], x.square().mean(0, keepdim=True)


def linear_loss(model, batch):
    return model(batch["x"]).squeeze(1)


@METHOD
def test_mean_of_squared_per_sample_gradients(method):
    model, data, expected = linear_case()
    fisher = DiagonalFisher.estimate(model, linear_loss, data, method=method, progress=False)
    torch.testing.assert_close(fisher["weight"], expected)
    assert fisher.protocol["samples"] == 3


@METHOD
@pytest.mark.parametrize("timesteps", [1, 3])
def test_methods_agree_with_one_autograd_call_per_sample(method, timesteps):
    model, loss = tiny_unet(), fisher_loss(schedule())
    data = batches(4, cross=False, timesteps=timesteps)
    got = DiagonalFisher.estimate(model, loss, data, method=method, progress=False)
    params = dict(model.named_parameters())
    expected = {n: torch.zeros_like(p) for n, p in params.items()}
    for batch in data:
        for i in range(2):
            one = {k: v[i : i + 1] for k, v in batch.items()}
            grads = torch.autograd.grad(loss(model, one).sum(), list(params.values()))
            for (name, e), g in zip(expected.items(), grads, strict=True):
                expected[name] = e + g.square() / 4
    a = torch.cat([got[n].flatten() for n in params])
    b = torch.cat([expected[n].flatten() for n in params])
    assert float((a - b).norm() / b.norm()) < 1e-5


def test_hooks_know_linear_conv_norms_embedding_and_shared_modules():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.e = nn.Embedding(4, 6)
            self.c = nn.Conv2d(1, 4, 3, stride=2, padding=1, dilation=1)
            self.g = nn.GroupNorm(2, 4)
            self.n = nn.LayerNorm(6)
            self.l = nn.Linear(6, 6)
            self.o = nn.Linear(16, 6, bias=False)

        def forward(self, x, y):
            h = self.o(torch.relu(self.g(self.c(x))).flatten(1))
            return self.n(self.l(self.l(h) + self.e(y))).square().sum(1)

    torch.manual_seed(0)
    model = Net()
    data = [{"x": torch.randn(3, 1, 4, 4), "y": torch.tensor([0, 3, 3])}]

    def loss(m, b):
        return m(b["x"], b["y"])

    results = [
        DiagonalFisher.estimate(model, loss, data, method=m, progress=False) for m in METHODS
    ]
    for name in results[0]:
        for other in results[1:]:
            torch.testing.assert_close(results[0][name], other[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "conv",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 1},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    ],
)
def test_hooks_and_loop_give_the_same_float64_gradients_of_convolutions(draws, memory_format, conv):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, **conv), nn.SiLU(), nn.Conv2d(3, 2, **conv)).double()
    batch = {"x": torch.randn(4, draws, 2, 9, 8, dtype=torch.float64)}

    def loss(m, b):
        x = b["x"].flatten(0, 1).to(memory_format=memory_format)
        return m(x).square().flatten(1).sum(1).view(-1, draws).mean(1)

    (got,) = METHODS["hooks"](model, loss, batch)
    truth = list(METHODS["loop"](model, loss, batch))
    assert list(got) == list(truth[0])
    for name, grad in got.items():
        expected = torch.cat([g[name] for g in truth])
        torch.testing.assert_close(grad, expected, rtol=1e-11, atol=1e-11)


def test_hooks_compute_no_gradient_of_a_parameter():
    model, (batch, *_) = tiny_unet(), batches(cross=False)
    asked = []
    for p in model.parameters():
        p.register_hook(asked.append)
    (got,) = METHODS["hooks"](model, fisher_loss(schedule()), batch)
    assert all(bool(got[name].any()) for name in got)
    assert not asked


def test_hooks_refuse_unknown_modules_by_name_and_auto_goes_on():
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(4, 1))
    data = [{"x": torch.randn(2, 1, 4)}]

    def loss(m, b):
        return m(b["x"]).squeeze(1)

    with pytest.raises(TypeError, match=r"Conv1d.*vmap"):
        DiagonalFisher.estimate(model, loss, data, method="hooks", progress=False)
    fisher = DiagonalFisher.estimate(model, loss, data, progress=False)
    assert fisher.protocol["method"] in ("vmap", "loop")


class Tiles(nn.Module):
    """A conv with circular padding, an embedding with a padding row, and a weight used twice."""

    def __init__(self, kind: str):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.c = nn.Conv2d(
            1, 2, 3, padding=1, padding_mode="circular" if kind == "conv" else "zeros"
        )
        self.e = nn.Embedding(4, 2, padding_idx=0 if kind == "embedding" else None)
        self.l = nn.Linear(2, 2)

    def forward(self, x, y):
        h = self.l(self.c(x).mean((2, 3)).square() + self.e(y))
        if self.kind == "functional":
            h = nn.functional.linear(h, self.l.weight)
        return h.square().sum(1)


@pytest.mark.parametrize("kind", ["conv", "embedding", "functional"])
def test_hooks_that_would_be_wrong_are_refused_and_auto_does_without(kind):
    model, g = Tiles(kind), torch.Generator().manual_seed(1)
    data = [{"x": torch.randn(4, 1, 5, 5, generator=g), "y": torch.tensor([0, 1, 2, 0])}]

    def loss(m, b):
        return m(b["x"], b["y"])

    with pytest.raises((TypeError, ValueError), match=r"hooks.*loop"):
        DiagonalFisher.estimate(model, loss, data, method="hooks", progress=False)
    auto, loop = (
        DiagonalFisher.estimate(model, loss, data, method=m, progress=False)
        for m in ("auto", "loop")
    )
    assert auto.protocol["method"] != "hooks"
    for name in loop:
        torch.testing.assert_close(auto[name], loop[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", ["auto", "hooks", "vmap"])
def test_a_loss_that_does_not_put_a_samples_rows_together_is_found(method):
    model, data, _ = linear_case()

    def tiled(m, b):
        out = m(torch.cat([b["x"], 2 * b["x"]])).squeeze(1)
        return out.view(2, -1).mean(0)

    if method == "hooks":
        with pytest.raises(ValueError, match="not adjacent"):
            DiagonalFisher.estimate(model, tiled, data, method=method, progress=False)
    else:
        fisher = DiagonalFisher.estimate(model, tiled, data, method=method, progress=False)
        expected = torch.cat([b["x"] for b in data]).mul(1.5).square().mean(0, keepdim=True)
        torch.testing.assert_close(fisher["weight"], expected)


def test_a_loss_must_be_one_value_per_sample_and_depend_on_the_model():
    model, data, _ = linear_case()
    with pytest.raises(ValueError, match=r"one value per sample, shape \(2,\); got \(\)"):
        DiagonalFisher.estimate(model, lambda m, b: linear_loss(m, b).mean(), data, progress=False)
    other = nn.Linear(3, 1, bias=False)
    with pytest.raises(ValueError, match="does not depend on"):
        DiagonalFisher.estimate(
            model,
            lambda m, b: linear_loss(other, b) + 0 * linear_loss(m, b),
            data,
            method="loop",
            progress=False,
        )


def test_two_seeds_are_two_draws_and_batches_have_streams_of_their_own():
    noises = [batches(4, seed=s, cross=False)[i]["noise"] for s in (0, 1, 9, 2**32) for i in (0, 1)]
    for i, a in enumerate(noises):
        for b in noises[i + 1 :]:
            assert not torch.equal(a, b)


def test_cross_estimate_has_no_bias_from_the_number_of_timesteps():
    """Gradients a + noise: squares are too large by var / T', cross products are not."""
    model = nn.Linear(1, 1, bias=False)
    g = torch.Generator().manual_seed(0)
    signal, n = 0.7, 4000

    def data(draws: int, cross: bool):
        half = [signal + torch.randn(n, draws, generator=g) for _ in range(2 if cross else 1)]
        items = [{"x": h} for h in half]
        return [tuple(items) if cross else items[0]]

    def loss(m, b):
        return m(b["x"].reshape(-1, 1)).reshape(b["x"].shape).mean(1)

    def run(draws, cross):
        return float(
            DiagonalFisher.estimate(
                model, loss, data(draws, cross), method="hooks", progress=False
            )["weight"]
        )

    for draws in (1, 4):
        assert run(draws, True) == pytest.approx(signal**2, abs=0.06)
        assert run(draws, False) == pytest.approx(signal**2 + 1 / draws, abs=0.1)


@pytest.mark.parametrize("stop_after", [1, 2])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, stop_after):
    model, loss = tiny_unet(), fisher_loss(schedule())
    whole = DiagonalFisher.estimate(
        model, loss, batches(), method="vmap", path=tmp_path / "a", progress=False
    )

    class Stops(FisherBatches):
        def __getitem__(self, i):
            if i == stop_after:
                raise KeyboardInterrupt
            return super().__getitem__(i)

    stopping = Stops(*images(6), schedule(), batch_size=2, timesteps=4)
    path = tmp_path / "b"
    with pytest.raises(KeyboardInterrupt):
        DiagonalFisher.estimate(model, loss, stopping, method="vmap", path=path, progress=False)
    assert not path.exists()
    resumed = DiagonalFisher.estimate(model, loss, batches(), path=path, progress=False)
    assert resumed.protocol == whole.protocol
    for name in whole:
        assert torch.equal(whole[name], resumed[name])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_an_interrupt_while_the_result_is_saved_keeps_what_was_done(tmp_path, monkeypatch):
    model, loss, path = tiny_unet(), fisher_loss(schedule()), tmp_path / "f"
    options = {"method": "vmap", "path": path, "progress": False}

    def stops(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(DiagonalFisher, "save", stops)
    with pytest.raises(KeyboardInterrupt):
        DiagonalFisher.estimate(model, loss, batches(), **options)
    monkeypatch.undo()
    monkeypatch.setattr(Run, "add", stops)  # nothing is left to be done
    resumed = DiagonalFisher.estimate(model, loss, batches(), **options)
    (tmp_path / "f.partial").touch()  # a kill just before it is removed
    again = DiagonalFisher.estimate(model, loss, batches(), **options)
    assert all(torch.equal(resumed[n], again[n]) for n in resumed)
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_an_interrupt_in_the_middle_of_an_update_does_not_spoil_the_result(tmp_path, monkeypatch):
    model, loss = tiny_unet(), fisher_loss(schedule())
    options = {"method": "vmap", "save_every": 1, "progress": False}
    whole = DiagonalFisher.estimate(model, loss, batches(), **options)
    calls, lerp = [], torch.Tensor.lerp_

    def stops(self, *args):
        calls.append(1)
        if len(calls) == len(whole) + 5:  # in the second batch, some tensors have it already
            raise KeyboardInterrupt
        return lerp(self, *args)

    monkeypatch.setattr(torch.Tensor, "lerp_", stops)
    with pytest.raises(KeyboardInterrupt):
        DiagonalFisher.estimate(model, loss, batches(), path=tmp_path / "f", **options)
    monkeypatch.undo()
    resumed = DiagonalFisher.estimate(model, loss, batches(), path=tmp_path / "f", **options)
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)


def test_ctrl_c_in_the_middle_of_an_update_keeps_every_batch_that_was_done(tmp_path, monkeypatch):
    model, loss = tiny_unet(), fisher_loss(schedule())
    options = {"method": "vmap", "progress": False}  # saved every 50 batches
    whole = DiagonalFisher.estimate(model, loss, batches(), **options)
    calls, lerp = [], torch.Tensor.lerp_

    def pressed(self, *args):
        calls.append(1)
        if len(calls) == len(whole) + 5:
            signal.raise_signal(signal.SIGINT)
        return lerp(self, *args)

    monkeypatch.setattr(torch.Tensor, "lerp_", pressed)
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            DiagonalFisher.estimate(model, loss, batches(), path=tmp_path / "f", **options)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert len(calls) == 2 * len(whole)  # the second update ran to its end
    resumed = DiagonalFisher.estimate(model, loss, batches(), path=tmp_path / "f", **options)
    assert len(calls) == len(batches()) * len(whole)  # and was not done again
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)


@METHOD
@given(st.integers(0, 5), st.sampled_from([math.nan, math.inf, 1e30]))
@settings(max_examples=10, deadline=None)
def test_nan_ends_an_estimate_with_the_name_of_its_batch_and_spoils_nothing(method, at, value):
    x = torch.arange(18.0).view(6, 3) / 18
    good = [{"x": x[i : i + 2]} for i in (0, 2, 4)]
    x = x.clone()
    x[at, 1] = value  # 1e30 squared is Inf
    bad = [{"x": x[i : i + 2]} for i in (0, 2, 4)]
    model, b = nn.Linear(3, 1, bias=False), at // 2
    with TemporaryDirectory() as folder:
        path = Path(folder) / "f"
        run = {"path": path, "method": method, "progress": False}
        said = rf"batch {b} \(samples {2 * b} to {2 * b + 1}\): weight\[0\] holds NaN or Inf"
        for _ in range(2):  # the rerun too
            with pytest.raises(ValueError, match=said):
                DiagonalFisher.estimate(model, linear_loss, bad, **run)
            assert not path.exists()
        with pytest.raises(ValueError, match=said):
            DiagonalFisher.estimate(model, linear_loss, bad, method=method, progress=False)
        whole = DiagonalFisher.estimate(model, linear_loss, good, method=method, progress=False)
        resumed = DiagonalFisher.estimate(model, linear_loss, good, **run)
    assert torch.equal(whole["weight"], resumed["weight"])
    assert whole.protocol == resumed.protocol


def test_a_fisher_with_nan_is_neither_written_nor_read(tmp_path):
    fisher = DiagonalFisher({"a": torch.ones(2), "b": torch.tensor([0.0, math.nan])}, {})
    with pytest.raises(ValueError, match=r"f is not written: b\[1\] holds NaN"):
        fisher.save(tmp_path / "f")
    assert not (tmp_path / "f").exists()
    save_file(fisher.tensors, tmp_path / "f", {"meta": '{"kind": "ebu_optim fisher"}'})
    with pytest.raises(ValueError, match=r"b\[1\] holds NaN or Inf.*delete it and make it again"):
        DiagonalFisher.load(tmp_path / "f")


def test_other_weights_data_or_reduction_are_another_run(tmp_path):
    path, model = tmp_path / "f", tiny_unet()
    run = {"path": path, "progress": False}
    DiagonalFisher.estimate(model, fisher_loss(schedule()), batches(2), **run)
    x, y = images(2)
    other = FisherBatches(x + 0.1, y, schedule(), batch_size=2, timesteps=4)
    with pytest.raises(ValueError, match="another data"):
        DiagonalFisher.estimate(model, fisher_loss(schedule()), other, **run)
    with pytest.raises(ValueError, match="another reduction"):
        DiagonalFisher.estimate(model, fisher_loss(schedule(), reduction="mean"), batches(2), **run)
    with pytest.raises(ValueError, match="another seed"):
        DiagonalFisher.estimate(model, fisher_loss(schedule()), batches(2, seed=1), **run)
    with torch.no_grad():
        model.conv_in.weight += 1
    with pytest.raises(ValueError, match="another model"):
        DiagonalFisher.estimate(model, fisher_loss(schedule()), batches(2), **run)


def test_finished_file_is_loaded_and_another_protocol_is_refused(tmp_path):
    model, data, _ = linear_case()
    path = tmp_path / "fisher.safetensors"
    first = DiagonalFisher.estimate(
        model, linear_loss, data, path=path, protocol={"data": "x"}, progress=False
    )

    def never(*_):
        raise AssertionError("must not be computed again")

    again = DiagonalFisher.estimate(
        model, never, data, path=path, protocol={"data": "x"}, progress=False
    )
    assert torch.equal(first["weight"], again["weight"])
    assert again.protocol == first.protocol
    with pytest.raises(ValueError, match=r"another data .'x'"):
        DiagonalFisher.estimate(model, never, data, path=path, protocol={"data": "y"})
    with pytest.raises(ValueError, match="another model"):
        DiagonalFisher.estimate(nn.Linear(2, 2), never, data, path=path, protocol={"data": "x"})


def test_convergence_is_the_relative_standard_error_over_batches():
    model = nn.Linear(1, 1, bias=False)
    x = torch.tensor([1.0, 2.0, 3.0])
    fisher = DiagonalFisher.estimate(
        model, linear_loss, [{"x": v.view(1, 1)} for v in x], method="loop", progress=False
    )
    squares = x.square()
    expected = float(squares.std() / math.sqrt(3) / squares.mean())
    assert fisher.protocol["convergence"]["trace_relative_error"] == pytest.approx(expected)
    assert fisher.protocol["convergence"]["entry_relative_error"] == pytest.approx(expected)


def test_model_is_left_as_it_was_and_frozen_parameters_are_left_out():
    model = tiny_unet().train()
    model.conv_in.weight.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    fisher = DiagonalFisher.estimate(model, fisher_loss(schedule()), batches(2), progress=False)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert "conv_in.weight" not in fisher


def test_goes_into_the_optimizer_by_name_or_by_parameter():
    model, data, _ = linear_case()
    fisher = DiagonalFisher.estimate(model, linear_loss, data, progress=False)
    opt = EBUOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), fisher=fisher.for_model(model))
    x = data[0]["x"]
    opt.step(forget=lambda: model(x).sum().backward(), remember=lambda: model(-x).sum().backward())
    with pytest.raises(ValueError, match="no entry 'bias'"):
        fisher.for_model(nn.Linear(3, 1))
    with pytest.raises(ValueError, match=r"shape \(1, 3\).*\(1, 4\)"):
        fisher.for_model(nn.Linear(4, 1, bias=False))


def test_a_compiled_model_has_the_names_of_the_plain_one(tmp_path):
    model, data, expected = linear_case()
    compiled, path = torch.compile(model, backend="eager"), tmp_path / "f"
    run = {"method": "loop", "path": path, "progress": False}
    fisher = DiagonalFisher.estimate(compiled, linear_loss, data, **run)
    assert list(fisher) == ["weight"]
    torch.testing.assert_close(fisher["weight"], expected)
    assert DiagonalFisher.estimate(model, linear_loss, data, **run).protocol == fisher.protocol
    for one in (model, compiled):  # they share their parameters
        assert fisher.for_model(one) == {model.weight: fisher["weight"]}
    # named as the compiled model names them, also in a file of an earlier version
    EBUOptimizer(torch.optim.SGD(compiled.named_parameters(), lr=0.1), fisher=fisher)
    assert "_orig_mod.weight" in fisher
    save_file({"_orig_mod.weight": expected}, path, {"meta": '{"kind": "ebu_optim fisher"}'})
    assert list(DiagonalFisher.load(path)) == ["weight"]


def test_damaged_and_foreign_files(tmp_path):
    path = tmp_path / "f.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        DiagonalFisher.load(path)
    from ebu_optim.files import save_tensors

    save_tensors(path, {"a": torch.zeros(1)}, {"kind": "other"})
    with pytest.raises(ValueError, match="not a Fisher"):
        DiagonalFisher.load(path)
    with pytest.raises(FileNotFoundError):
        DiagonalFisher.load(tmp_path / "missing")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"timesteps": 3}, "even"), ({"timesteps": 0}, "timesteps"), ({"labels": 1}, "labels")],
)
def test_batches_reject_bad_arguments(kwargs, message):
    x, y = images(4)
    y = y[: kwargs.pop("labels", 4)]
    with pytest.raises(ValueError, match=message):
        FisherBatches(x, y, schedule(), **kwargs)


def test_estimate_rejects_bad_arguments():
    model, data, _ = linear_case()
    with pytest.raises(ValueError, match="method must be"):
        DiagonalFisher.estimate(model, linear_loss, data, method="fast")
    with pytest.raises(ValueError, match="batches is empty"):
        DiagonalFisher.estimate(model, linear_loss, [])
    with pytest.raises(ValueError, match="reduction"):
        fisher_loss(schedule(), reduction="max")
    with pytest.raises(ValueError, match="save_every must be >= 1; got 0"):
        DiagonalFisher.estimate(model, linear_loss, data, save_every=0)
    for protocol, message in (({"samples": 3}, "samples"), ({"d": torch.float32}, "JSON")):
        with pytest.raises(ValueError, match=message):
            DiagonalFisher.estimate(model, linear_loss, data, protocol=protocol)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        DiagonalFisher.estimate(model, linear_loss, data)


def test_a_protocol_with_tuples_fits_itself(tmp_path):
    model, data, _ = linear_case()
    for _ in range(2):
        DiagonalFisher.estimate(
            model,
            linear_loss,
            data,
            path=tmp_path / "f",
            protocol={"shape": (1, 2)},
            progress=False,
        )


def test_trace_is_that_of_the_result_whatever_the_batches():
    model = nn.Linear(1, 1, bias=False)
    x = torch.cat([torch.ones(15, 1), torch.full((1, 1), 9.0)])
    data = [{"x": x[:15]}, {"x": x[15:]}]
    fisher = DiagonalFisher.estimate(model, linear_loss, data, method="loop", progress=False)
    assert fisher.protocol["trace"] == pytest.approx(float(fisher["weight"].sum()))


def test_bfloat16_models():
    model = tiny_unet().bfloat16()
    loss = fisher_loss(schedule())
    fishers = [
        DiagonalFisher.estimate(model, loss, batches(2), method=m, progress=False) for m in METHODS
    ]
    assert all(t.dtype == torch.float32 for f in fishers for t in f.tensors.values())
