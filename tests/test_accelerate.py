"""docs/accelerate.md: every row of "What happens if" that one process on a CPU can try."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ebu_optim import EBUOptimizer

from .distributed.accelerated import assert_close, loss, make, phase, train
from .steps import assert_same

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


# -- what happens if ----------------------------------------------------------------------------


def step_through(made, orders="fr", then=lambda made: None, finish=True):
    """Phases of the first batches; `then`; the step."""
    accelerator, ebu, model, optimizer, forget, remember, _ = made
    x, y = next(iter(forget)), next(iter(remember))
    with accelerator.accumulate(model):
        for letter in orders:
            named = ("forget", x) if letter == "f" else ("remember", y)
            phase(accelerator, ebu, model, named[1], named[0])
        then(made)
        if finish:
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def fails(error, match, made, *arguments, **options):
    before = [p.detach().clone() for p in made[2].parameters()]
    with pytest.raises(error, match=match):
        step_through(made, *arguments, **options)
    assert_same(before, [p.detach().clone() for p in made[2].parameters()])
    made[3].zero_grad()
    if made[3].scaler:
        made[3].scaler.update()
    assert_same(step_through(made), step_through(make(1, 16)))  # as if nothing had happened


def test_closures_through_the_prepared_optimizer():
    fails(TypeError, "use the phases", make(1, 16), then=lambda m: m[3].step(lambda: None))
    fails(TypeError, "positional", make(1, 16), then=lambda m: m[3].step(None, None))
    made, called = make(2, 16), []
    step_through(made, then=lambda m: m[3].step(lambda: called.append(1)))
    assert not called


def test_closures_on_the_handle_step_at_once():
    accelerator, ebu, model, _, forget, remember, _ = make(2, 16)
    before = [p.detach().clone() for p in model.parameters()]
    x, y = next(iter(forget)), next(iter(remember))
    with accelerator.accumulate(model):
        assert not accelerator.sync_gradients
        ebu.step(
            *(
                lambda b=b, f=f: accelerator.backward(loss(model, b, f))
                for b, f in ((x, True), (y, False))
            )
        )
    assert not any(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("max_norm", [0.01, 100.0])
@pytest.mark.parametrize("how", ["clip_grad_norm_", "clip_grad_value_"])
def test_clipping_before_the_step(how, max_norm):
    clip = lambda m: getattr(m[0], how)(m[2].parameters(), max_norm)  # noqa: E731
    fails(RuntimeError, "max_grad_norm", make(1, 16), then=clip)


def scaled(k=1, **options):
    """As accelerate wraps an optimizer for fp16, which it leaves out without a word on a CPU."""
    made = list(make(k, 16 // k, **options))
    accelerator, ebu, scaler = made[0], made[1], torch.amp.GradScaler("cpu", init_scale=16.0)
    made[3] = AcceleratedOptimizer(ebu, scaler=scaler)
    made[6] = AcceleratedScheduler(made[6].scheduler, made[3])
    accelerator.scaler, accelerator.native_amp = scaler, True
    accelerator._optimizers = [made[3]]
    accelerator.state._mixed_precision = "fp16"
    return made


def test_unscaling_before_the_step():
    fails(RuntimeError, r"unscale_\(\)", scaled(), then=lambda m: m[0].unscale_gradients())
    clip = lambda m: m[0].clip_grad_norm_(m[2].parameters(), 1.0)  # noqa: E731
    fails(RuntimeError, "max_grad_norm", scaled(), then=clip)


def snapshot_weights(made):
    return [p.detach().clone() for p in made[2].parameters()]


def test_an_overflow_under_a_scaler():
    accelerator, ebu, model, optimizer, forget, remember, schedule = made = scaled()
    assert_close(train(made), train(make(1, 16)))
    before, lr = snapshot_weights(made), ebu.param_groups[0]["lr"]
    phase(accelerator, ebu, model, next(iter(forget)), "forget")
    phase(accelerator, ebu, model, next(iter(remember)) * torch.inf, "remember")
    optimizer.step()
    schedule.step()
    assert_same(before, snapshot_weights(made))
    assert (ebu.last_step_skipped, ebu.skipped_steps) == (True, 1)
    assert optimizer.scaler.get_scale() == 8.0
    assert not accelerator.optimizer_step_was_skipped
    assert ebu.param_groups[0]["lr"] < lr


def test_zero_grad_between_the_phases():
    between = "f0r"
    for k in (1, 2):
        made = make(k, 16)
        x, y = next(iter(made[4])), next(iter(made[5]))

        def micro_batch(order, made=made, x=x, y=y):
            accelerator, ebu, model, optimizer, *_ = made
            with accelerator.accumulate(model):
                for letter in order:
                    if letter == "0":
                        optimizer.zero_grad()
                    else:
                        named = ("forget", x) if letter == "f" else ("remember", y)
                        phase(accelerator, ebu, model, named[1], named[0])
                optimizer.step()
                optimizer.zero_grad()

        if k == 1:
            with pytest.raises(RuntimeError, match="forget phase is missing"):
                micro_batch(between)
        else:
            micro_batch(between)
            micro_batch("fr")
            assert_same(snapshot_weights(made), step_through(make(1, 16)))


def test_zero_grad_inside_a_phase():
    accelerator, ebu, model, optimizer, forget, remember, _ = made = make(2, 8)
    batches = []
    for x, y in itertools.islice(zip(forget, remember), 2):
        batches.append((x, y))
        with accelerator.accumulate(model):
            for name, batch in (("forget", x), ("remember", y)):
                with getattr(ebu, name)():
                    optimizer.zero_grad()
                    accelerator.backward(loss(model, batch, name == "forget"))
            optimizer.step()
    other = make(2, 8)  # the second micro-batch alone, halved as accelerate does
    x, y = batches[1]
    for name, batch in (("forget", x), ("remember", y)):
        with getattr(other[1], name)():
            (loss(other[2], batch, name == "forget") / 2).backward()
    other[1].step()
    assert_same(snapshot_weights(made), snapshot_weights(other))


def test_without_zero_grad_and_with_a_phase_twice():
    made, other = make(1, 16), make(1, 16)
    made[3].zero_grad = lambda: None
    assert_same(train(made), train(other))
    step_through(twice := make(1, 16), "ffr")
    _, other_ebu, m, _, forget, remember, _ = other = make(1, 16)
    with other_ebu.forget():
        (2 * loss(m, next(iter(forget)), True)).backward()
    with other_ebu.remember():
        loss(m, next(iter(remember)), False).backward()
    other_ebu.step()
    torch.testing.assert_close(
        snapshot_weights(twice), snapshot_weights(other), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(("orders", "name"), [("f", "remember"), ("r", "forget")])
def test_a_missing_phase(orders, name):
    fails(RuntimeError, f"the {name} phase is missing", make(1, 16), orders)


@pytest.mark.parametrize("how", ["losses first", "no_sync", "one outside accumulate"])
def test_what_works_in_one_process(how):
    made = accelerator, ebu, model, optimizer, forget, remember, _ = make(1, 16)
    x, y = next(iter(forget)), next(iter(remember))
    if how == "losses first":
        losses = loss(model, x, True), loss(model, y, False)
        for value, name in zip(losses, ("forget", "remember")):
            with getattr(ebu, name)():
                accelerator.backward(value)
    elif how == "no_sync":
        with accelerator.no_sync(model):
            phase(accelerator, ebu, model, x, "forget")
            phase(accelerator, ebu, model, y, "remember")
    else:
        phase(accelerator, ebu, model, x, "forget")
        with accelerator.accumulate(model):
            phase(accelerator, ebu, model, y, "remember")
    optimizer.step()
    assert_same(snapshot_weights(made), step_through(make(1, 16)))


def test_batches_that_do_not_divide_and_loaders_of_different_lengths():
    assert len(train(made := make(2, 16), epochs=1)) == 2  # of three batches: two, then one
    assert made[1].stats
    # the second loader is the one that tells accelerate of its end
    made = make(2, 16, (64, 48))
    assert len(train(made, epochs=1)) == 2
    made = make(2, 16, (48, 64))
    assert len(train(made, epochs=1)) == 1
    assert len(train(made, epochs=1)) == 2  # 1 micro-batch left over and 3 new ones
    mixed = make(1, 16, (48, 64))
    assert len(train(mixed, epochs=1)) == 3


def test_moving_averages():
    made = make(2, 8)
    accelerator, ebu, model, optimizer, forget, remember, schedule = made
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    start, weights = snapshot_weights(made), []
    for x, y in zip(forget, remember):
        with accelerator.accumulate(model):
            phase(accelerator, ebu, model, x, "forget")
            phase(accelerator, ebu, model, y, "remember")
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            ema.update_parameters(model)
            weights.append(snapshot_weights(made))
            kept = copy.deepcopy(model.state_dict())  # swapped in between steps, and out again
            model.load_state_dict(ema.module.state_dict())
            model.load_state_dict(kept)
    assert_same(weights, [after["weights"] for after in train(make(2, 8), epochs=1)])
    for p, q in zip(model.parameters(), start):
        assert torch.equal(ebu.anchor_of(p), q)
    expected = weights[0]
    for later in weights[1:]:
        expected = [0.5 * a + 0.5 * b for a, b in zip(expected, later)]
    torch.testing.assert_close([*ema.module.parameters()], expected, rtol=1e-12, atol=0)


def test_torch_compile():
    """Captured and differentiated; generating code takes too long here."""
    made = list(make(2, 8))
    plain = made[2]
    made[2] = torch.compile(plain, backend="aot_eager")
    got = train(made, epochs=1)
    torch._dynamo.reset()
    assert_close(got, train(make(2, 8), epochs=1))


def test_parameters_outside_the_optimizer():
    accelerator = Accelerator(cpu=True)
    inside, outside = nn.Linear(4, 4).double(), nn.Linear(4, 2).double()
    ebu = EBUOptimizer(torch.optim.Adam(inside.parameters()))
    model, optimizer = accelerator.prepare(nn.Sequential(inside, outside), ebu)
    x, before, total = torch.randn(8, 4).double(), copy.deepcopy(outside), 0
    for _ in range(2):
        for name in ("forget", "remember"):
            with getattr(ebu, name)():
                value = loss(model, x, name == "forget")
                (grad,) = torch.autograd.grad(value, outside.weight, retain_graph=True)
                total = total + grad
                accelerator.backward(value)
        optimizer.step()
        optimizer.zero_grad()
    assert_same([*before.parameters()], [*outside.parameters()])
    torch.testing.assert_close(outside.weight.grad, total)
    assert ebu.stats["total"] == 4 * 4 + 4


def test_a_second_optimizer_beside():
    accelerator = Accelerator(cpu=True)
    body, head = nn.Linear(4, 4).double(), nn.Linear(4, 2).double()
    twin = copy.deepcopy(nn.Sequential(body, head))
    ebu = EBUOptimizer(torch.optim.Adam(body.parameters()))
    second = torch.optim.SGD(head.parameters(), lr=0.1)
    model, optimizer, second = accelerator.prepare(nn.Sequential(body, head), ebu, second)
    x = torch.randn(8, 4).double()
    for name in ("forget", "remember"):
        with getattr(ebu, name)():
            accelerator.backward(loss(model, x, name == "forget"))
    optimizer.step()
    second.step()
    (loss(twin, x, True) + loss(twin, x, False)).backward()
    want = [p - 0.1 * p.grad for p in twin[1].parameters()]
    torch.testing.assert_close([*head.parameters()], want)


def test_the_prepared_optimizer_forwards_no_phases():
    """Why the page says to keep the handle; the sentence goes when accelerate forwards them."""
    _, ebu, _, optimizer, *_ = make(1, 16)
    assert isinstance(optimizer, AcceleratedOptimizer)
    for name in ("forget", "remember", "stats"):
        assert not hasattr(optimizer, name)
        assert hasattr(ebu, name)


# -- mixed precision ----------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("k", [1, 2])
def test_mixed_precision_is_the_run_under_autocast_by_hand(precision, k):
    """fp16 accelerate leaves out on a CPU: it is switched on here as it is on a GPU."""
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    x, fp16 = torch.randn(6, 2, k, 8, 4), precision == "fp16"
    accelerator = Accelerator(
        cpu=True, mixed_precision="no" if fp16 else "bf16", gradient_accumulation_steps=k
    )
    if fp16:
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    m = copy.deepcopy(start)
    ebu = EBUOptimizer(torch.optim.Adam(m.parameters(), lr=0.01), max_grad_norm=0.5)
    model, optimizer = accelerator.prepare(m, ebu)
    n = copy.deepcopy(start)
    opt = EBUOptimizer(torch.optim.Adam(n.parameters(), lr=0.01), max_grad_norm=0.5)
    dtype = torch.float16 if fp16 else torch.bfloat16
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=fp16)
    for i, step in enumerate(x):
        step = step * (1e5 if fp16 and i == 2 else 1)  # overflows in float16
        for j in range(k):
            with accelerator.accumulate(model):
                for name, batch in zip(("forget", "remember"), step[:, j]):
                    phase(accelerator, ebu, model, batch, name)
                optimizer.step()
                optimizer.zero_grad()
        for name, batches in zip(("forget", "remember"), step):
            for batch in batches:
                with getattr(opt, name)():
                    with torch.autocast("cpu", dtype=dtype):
                        out = n(batch)
                    value = (out.float() - (1 if name == "forget" else -1)).square().mean()
                    scaler.scale(value / k).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        assert ebu.last_step_skipped == opt.last_step_skipped == (fp16 and i == 2)
        assert_same([*m.parameters()], [*n.parameters()])
        assert not any(map(torch.equal, m.parameters(), start.parameters()))
    assert all(p.dtype == torch.float32 for p in m.parameters())
    assert ebu.skipped_steps == fp16
    if fp16:
        assert accelerator.scaler.get_scale() == 2.0**9
