"""ebu_optim.integrations.transformers: the Trainer's two phases beside a loop written by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip("transformers", "5", reason="tried with transformers 5")

from torch.optim import AdamW

from ebu_optim import EBUOptimizer
from ebu_optim.baselines import GradientAscent, Joint
from ebu_optim.integrations.transformers import Pairs

from .distributed.launch import launch
from .steps import assert_same
from .trainers import REMEMBER, SGD, both_nll, joined, make, npo, tiny, trained

PLAIN = partial(Joint, nonfinite="raise")


def by_hand(tmp_path, loss, steps=None, **options):
    """The same run without the Trainer's steps; of it come the order of the batches and AdamW."""
    k = options.get("gradient_accumulation_steps", 1)
    trainer = make(tmp_path, forget_loss=loss, **options)
    model, base = trainer.model, AdamW(trainer.model.parameters(), lr=0.01, weight_decay=0.0)
    opt = EBUOptimizer(base, gamma=3.0, max_grad_norm=0.5)
    loader, total = trainer.get_train_dataloader(), 6 // k
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: (total - step) / total)
    for epoch in range(2):
        loader.set_epoch(epoch)
        batches = list(loader)
        for i in range(0, len(batches), k):
            group = batches[i : i + k]
            tokens = {
                name: sum((b[name]["labels"][:, 1:] != -100).sum() for b in group)
                for name in ("forget", "remember")
            }
            for b in group:
                with opt.forget():
                    if loss == "labels":
                        model(**b["forget"], num_items_in_batch=tokens["forget"]).loss.backward()
                    else:
                        (loss(model, b["forget"]) / len(group)).backward()
                with opt.remember():
                    model(**b["remember"], num_items_in_batch=tokens["remember"]).loss.backward()
            opt.step()
            schedule.step()
            opt.zero_grad()
    return {"weights": [p.detach() for p in model.parameters()], "state": opt.state_dict()}


def given(model):
    """Of the parameters in the model's order, as a user may hand it over."""
    return EBUOptimizer(AdamW(model.parameters(), lr=0.01, weight_decay=0.0), gamma=3.0)


@pytest.mark.parametrize("loss", [npo, "labels"])
@pytest.mark.parametrize("k", [1, 3])
def test_it_is_the_loop_written_by_hand_bit_for_bit(loss, k, tmp_path):
    model, more = tiny(), {"gradient_accumulation_steps": k}
    trainer = make(tmp_path, forget_loss=loss, model=model, optimizers=(given(model), None), **more)
    got, want = trained(trainer), by_hand(tmp_path, loss, **more)
    assert_same(got["weights"], want["weights"])
    assert_same(got["state"]["state"], want["state"]["state"])
    assert not torch.equal(got["weights"][0], next(tiny().parameters()))
    assert trainer.state.global_step == 6 // k


@pytest.mark.parametrize("loss", [both_nll, "labels"])
def test_two_micro_batches_are_one_batch_of_double_size(loss, tmp_path):
    one, two = (
        trained(
            make(
                tmp_path,
                forget_loss=loss,
                wrap=PLAIN,
                per_device_train_batch_size=4 // k,
                gradient_accumulation_steps=k,
                **SGD,
            )
        )
        for k in (1, 2)
    )
    for a, b in zip(one["weights"], two["weights"]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_longer_set_is_an_epoch_and_the_shorter_one_is_repeated(tmp_path):
    pairs = Pairs(range(3), range(5))
    assert [pairs[i] for i in range(len(pairs))] == [(0, 0), (1, 1), (2, 2), (0, 3), (1, 4)]
    batches = list(make(tmp_path).get_train_dataloader())
    seen = torch.cat([b["remember"]["input_ids"] for b in batches])
    assert len(seen) == len(REMEMBER)
    assert {tuple(t.tolist()) for t in seen} == {tuple(d["input_ids"].tolist()) for d in REMEMBER}


def test_the_trainers_own_optimizer_is_wrapped_and_clips_as_args_say(tmp_path):
    trainer = make(tmp_path, max_steps=2, weight_decay=0.1, gradient_accumulation_steps=2)
    trained(trainer)
    opt = trainer._phased()
    assert isinstance(opt, EBUOptimizer)
    assert opt.max_grad_norm == 0.5
    assert [g["weight_decay"] for g in opt.param_groups] == [0.1, 0.0]
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert last["loss"] == pytest.approx(last["forget_loss"] + last["remember_loss"], rel=1e-4)
    assert last["grad_norm"] == pytest.approx(opt.stats["update_norm"])
    assert trainer.accelerator.clip_grad_norm_(None, 1.0) is None
    unclipped = make(tmp_path, max_steps=1, max_grad_norm=0.0)
    trained(unclipped)
    assert unclipped._phased().max_grad_norm is None


def test_a_rule_that_needs_one_gradient_runs_one_phase(tmp_path):
    trainer = make(tmp_path, wrap=GradientAscent, max_steps=2, forget_loss="labels")
    trained(trainer)
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(logged["forget_loss"])
    assert "remember_loss" not in logged


def test_an_evaluation_is_the_models_own_loss(tmp_path):
    trainer = make(tmp_path, per_device_eval_batch_size=12)
    found = trainer.evaluate(eval_dataset=REMEMBER)["eval_loss"]
    batch = {k: torch.stack([d[k] for d in REMEMBER]) for k in REMEMBER[0]}
    assert found == pytest.approx(tiny()(**batch).loss.item(), rel=1e-4)


@pytest.mark.parametrize(("k", "at"), [(1, 4), (3, 2)])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(k, at, tmp_path):
    options = {
        "gradient_accumulation_steps": k,
        "num_train_epochs": 4,
        "save_strategy": "steps",
        "save_steps": at,
    }
    whole = trained(make(tmp_path / "a", **options))
    checkpoint = tmp_path / "a" / f"checkpoint-{at}"
    # weights_only, as the Trainer loads it
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert state["param_groups"][0]["ebu_gamma"] == 3.0
    again = trained(make(tmp_path / "b", **options), resume_from_checkpoint=str(checkpoint))
    assert_same(again, whole)


def test_bf16_trains_by_autocast(tmp_path):
    half, whole = (trained(make(tmp_path, bf16=bf16))["weights"] for bf16 in (True, False))
    assert all(p.dtype == torch.float32 for p in half)
    assert any(not torch.equal(a, b) for a, b in zip(half, whole))
    assert all(p.isfinite().all() for p in half)


def with_scaler(trainer, scale: float):
    """What fp16 gives on a GPU; accelerate has no scaler on a CPU."""
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100)
    return trainer


def test_a_grad_scaler_changes_nothing_but_the_scale(tmp_path):
    whole = trained(make(tmp_path))
    scaled = trained(with_scaler(make(tmp_path), 2.0**10))
    assert_same(scaled["weights"], whole["weights"])


@pytest.mark.parametrize("bad", ["forget", "remember"])
def test_an_overflow_in_either_loss_skips_the_step_and_shrinks_the_scale(bad, tmp_path):
    trainer = with_scaler(make(tmp_path, max_steps=3, logging_nan_inf_filter=False), 16.0)
    calls, real = [], trainer.compute_loss

    def overflows(*args, **kwargs):
        calls.append(trainer.phase)
        loss = real(*args, **kwargs)
        return loss * float("inf") if calls.count(bad) == 2 and trainer.phase == bad else loss

    trainer.compute_loss = overflows
    trained(trainer)
    assert trainer._phased().skipped_steps == 1
    assert trainer.accelerator.scaler.get_scale() == 8.0
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_two_processes_are_one_with_the_joined_batch(tmp_path):
    done = launch(2, "trainer", tmp_path)
    assert not any(done.codes), done.said
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert_same(ranks[0], ranks[1])
    one = joined(tmp_path / "one", 1)
    for name, weights in one.items():
        for a, b, start in zip(weights, ranks[0][name], tiny().parameters()):
            assert (a - b).norm() < 1e-2 * (a - start).norm(), name


def test_bad_input_is_refused_by_name(tmp_path):
    for name, bad in (
        ("remember_dataset", None),
        ("remember_dataset", iter(REMEMBER)),
        ("train_dataset", None),
        ("train_dataset", []),
    ):
        with pytest.raises(TypeError, match=f"{name} must be a data set with a length"):
            make(tmp_path, **{name: bad})
    with pytest.raises(TypeError, match="forget_loss must be a function"):
        make(tmp_path, forget_loss=None)
    model = tiny()
    bare = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"the optimizer is SGD.*EBUOptimizer\(SGD"):
        make(tmp_path, model=model, optimizers=(bare, None))
    with pytest.raises(TypeError, match="has no phases"):
        make(tmp_path, wrap=lambda base, max_grad_norm: base).train()
    with pytest.raises(ValueError, match=r"max_grad_norm=0\.5 and max_grad_norm=1\.0 of the"):
        make(tmp_path, model=model, optimizers=(EBUOptimizer(bare, max_grad_norm=1.0), None))
    with pytest.raises(ValueError, match="compute_loss_func would replace both"):
        make(tmp_path, compute_loss_func=lambda *a, **k: None)
