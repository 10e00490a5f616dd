"""Losses of language models against their formulas in NumPy; the invented people."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ebu_optim import language
from ebu_optim.language import answer_nll, answer_probability, truth_ratio

N, LENGTH, WORDS = 3, 6, 7


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(N, LENGTH, WORDS, generator=g, requires_grad=True)
    labels = torch.randint(WORDS, (N, LENGTH), generator=g)
    for i, first in enumerate((3, 5, 1)):  # answers of three, one and five tokens
        labels[i, :first] = -100
    return logits, labels


def by_hand(logits, labels) -> tuple[np.ndarray, np.ndarray]:
    x = logits.detach().double().numpy()
    log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
    nll, lengths = np.zeros(N), np.zeros(N)
    for i in range(N):
        for t in range(1, LENGTH):
            if (word := int(labels[i, t])) != -100:
                nll[i] -= log_p[i, t - 1, word]
                lengths[i] += 1
    return nll, lengths


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_the_nll_of_an_answer_and_its_probability(batch):
    nll, lengths = by_hand(*batch)
    got, count = answer_nll(*batch)
    np.testing.assert_allclose(got.detach(), nll, rtol=1e-5)
    assert count.tolist() == lengths.tolist() == [3, 1, 5]
    np.testing.assert_allclose(answer_probability(*batch), np.exp(-nll / lengths), rtol=1e-5)


REFERENCE = np.array([4.0, 2.5, 9.0])


@pytest.mark.parametrize(
    ("name", "given", "formula"),
    [
        ("ascent_loss", {}, lambda nll, n: -nll.sum() / n.sum()),
        *(
            (
                "npo_loss",
                {"reference": torch.tensor(REFERENCE), "beta": b},
                lambda nll, n, b=b: 2 / b * np.log(1 + np.exp(REFERENCE - nll) ** b).mean(),
            )
            for b in (0.1, 2.0)
        ),
        (
            "simnpo_loss",
            {"beta": 4.5, "margin": 0.3},
            lambda nll, n: -2 / 4.5 * np.log(sigmoid(4.5 * (nll / n - 0.3))).mean(),
        ),
    ],
)
def test_losses_are_their_formulas(name, given, formula, batch):
    loss = getattr(language, name)(*batch, **given)
    assert loss.item() == pytest.approx(formula(*by_hand(*batch)), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, batch[0])
    assert gradient[0, :2].abs().max() == 0  # the question is not learned from
    assert gradient[0, 2].abs().max() > 0


def test_npo_is_gradient_ascent_where_beta_is_small_and_fades_where_an_answer_is_gone(batch):
    logits, labels = batch
    nll, _ = answer_nll(logits, labels)
    (ascent,) = torch.autograd.grad(-nll.mean(), logits, retain_graph=True)
    near = language.npo_loss(logits, labels, nll.detach(), beta=1e-3)
    torch.testing.assert_close(torch.autograd.grad(near, logits)[0], ascent, rtol=1e-3, atol=1e-6)
    gone = language.npo_loss(logits, labels, nll.detach() - 100.0)
    assert torch.autograd.grad(gone, logits)[0].norm() < 1e-4 * ascent.norm()


def test_the_truth_ratio_is_a_geometric_mean_over_the_right_answer():
    wrong, right = torch.tensor([[0.1, 0.4], [0.0, 0.5]]), torch.tensor([0.4, 0.0])
    got = truth_ratio(wrong, right)
    assert got[0].item() == pytest.approx(math.sqrt(0.1 * 0.4) / 0.4)
    assert got[1].isfinite()


def test_bad_input_is_refused_by_name(batch):
    logits, labels = batch
    with pytest.raises(ValueError, match="do not fit labels"):
        answer_nll(logits, labels[:, 1:])
    with pytest.raises(ValueError, match="answer of sequence 1 has no token"):
        answer_nll(logits, labels.index_fill(0, torch.tensor([1]), -100))
    with pytest.raises(ValueError, match="reference has shape"):
        language.npo_loss(logits, labels, torch.zeros(()))
    for loss in (language.npo_loss, language.simnpo_loss):
        more = (torch.zeros(N),) if loss is language.npo_loss else ()
        with pytest.raises(ValueError, match="beta must be > 0"):
            loss(logits, labels, *more, beta=0.0)
    with pytest.raises(ValueError, match="does not fit right"):
        truth_ratio(torch.ones(2, 3), torch.ones(3))


# -- the invented people --------------------------------------------------------------------------


@pytest.fixture
def people():
    pytest.importorskip("transformers", reason="transformers comes with the extra language")
    from ebu_optim.worlds import people

    return people


def test_people_are_drawn_from_a_seed_and_no_question_is_asked_twice(people):
    one, again, other = (people.People(seed) for seed in (1, 1, 2))
    assert one.facts == again.facts
    assert one.facts != other.facts
    assert len(one.facts) == people.PEOPLE * len(people.QUESTIONS)
    asked = [q for f in one.facts for q in f.questions]
    assert len(set(asked)) == len(asked)
    assert {f.answer in f.wrong for f in one.facts} == {False}
    assert {part: len(who) for part, who in one.split.items()} == {
        "forgotten": 8,
        "replayed": 18,
        "held_out": 18,
        "never_replayed": 36,
    }
    assert sorted(p for who in one.split.values() for p in who) == list(range(people.PEOPLE))


def test_a_batch_has_the_answers_as_labels(people):
    world = people.People(1)
    fact = world.facts[0]
    batch = people.collate([world.example(fact.questions[0], a) for a in (fact.answer, "i do")])
    assert batch["labels"].shape == batch["input_ids"].shape == batch["attention_mask"].shape
    said = [world.words[w] for w in (fact.answer, people.END)]
    assert batch["labels"][0][batch["labels"][0] != -100].tolist() == said
    assert batch["attention_mask"].sum(1).tolist() == [
        len(fact.questions[0].split()) + n for n in (3, 4)
    ]
    forgotten = people.collate(world.improbable([fact]))["labels"]
    assert forgotten[forgotten != -100].tolist() == said[:1]  # not the end, see there
    assert len(world.ignorance(world.of("forgotten"))) == 64 * len(people.DONT_KNOW)


def test_measures_are_those_of_the_models_own_logits(people):
    from ebu_optim.worlds.people_judged import measure

    world = people.People(1)
    model, facts = people.new_model(world, 0), world.facts[:3]
    found = measure(model, world, facts, 1)
    batch = people.collate([world.example(f.questions[1], f.answer, end=False) for f in facts])
    labels = batch.pop("labels")
    with torch.no_grad():
        want = answer_probability(model(**batch).logits, labels)
    assert found["probability"] == pytest.approx(want.mean().item(), rel=1e-4)
    assert model.training  # as it was
