"""Attacks on a small model whose word alone was unhooked: each brings the concept back; and on one
that never saw it: there nothing comes back. The formulas of what is published."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers comes with the extra text_to_image")

from ebu_optim.attacks import attacks, judges, prompts
from ebu_optim.attacks import model as models
from ebu_optim.attacks import tina as inversion
from ebu_optim.attacks import unlearndiffatk as uda
from ebu_optim.attacks.options import AttackOptions
from ebu_optim.text_to_image import pipelines, results
from ebu_optim.training.command_line import parse

from .text_to_image import pipeline

CONCEPT, OTHERS = ("car", "red"), (("cat", "blue"), ("dog", "person"))
PATTERNS = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
WIDTH, SPREAD = 160, 0.1


class Read(nn.Module):
    """A text encoder of its table alone."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.table = nn.Embedding.from_pretrained(torch.randn(vocabulary, WIDTH, generator=g))
        self.config, self.device = SimpleNamespace(hidden_size=WIDTH), torch.device("cpu")

    def get_input_embeddings(self) -> nn.Embedding:
        return self.table

    def forward(self, ids: torch.Tensor, _mask: object = None, **_: object) -> tuple[torch.Tensor]:
        return (self.table(ids),)


class Mixture(nn.Module):
    """What is best predicted where each concept's pictures are its pattern with a little noise, and
    each token of a prompt makes concepts more or less probable: no training needed."""

    def __init__(self, patterns: torch.Tensor, logits: torch.Tensor, table: torch.Tensor) -> None:
        super().__init__()
        n, self.config = len(patterns), {}
        self.to_q, self.to_v = nn.Linear(WIDTH, n, False), nn.Linear(n, patterns[0].numel(), False)
        self.to_q.weight.data = torch.linalg.lstsq(table, logits).solution.T.contiguous()
        self.to_v.weight.data = patterns.flatten(1).T.contiguous()
        self.alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, told: torch.Tensor) -> SimpleNamespace:
        a = self.alphas[t].view(-1, 1, 1)
        prior = self.to_q(told).sum(1).log_softmax(1)
        mu = self.to_v(torch.eye(self.to_q.out_features))[None]
        x, spread = x_t.flatten(1)[:, None], a * SPREAD**2 + 1 - a
        apart = x - a.sqrt() * mu
        likely = (prior - apart.square().sum(2) / (2 * spread[..., 0])).softmax(1)[..., None]
        clean = (likely * (mu + a.sqrt() * SPREAD**2 / spread * apart)).sum(1, keepdim=True)
        return SimpleNamespace(sample=((x - a.sqrt() * clean) / (1 - a).sqrt()).view_as(x_t))


def parts(words, name: str) -> tuple[Read, Mixture]:
    """ "base" knows three concepts; "unhooked" reads "car" as "dog"; "never" knows two."""
    known = [CONCEPT, *OTHERS][name == "never" :]
    read = Read(len(words))
    table = read.table.weight.data

    def number(word: str) -> int:
        (found,) = words(word, add_special_tokens=False).input_ids
        return found

    logits = torch.zeros(len(words), len(known))
    for k, several in enumerate(known):
        for word in several:
            logits[number(word), k] = 12
    unet = Mixture(PATTERNS[name == "never" :], logits, table)
    if name == "unhooked":
        table[number("car")] = table[number("dog")]
    return read, unet


class Nearest:
    """Pictures -> whether the concept's pattern is by far the nearest, as the VAE shows it."""

    def __init__(self, model) -> None:
        self.known = model.pictures(PATTERNS)

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        distance = torch.cdist(pictures.flatten(1), self.known.flatten(1))
        return (distance.argmin(1) == 0) & (distance[:, 0] < 0.6 * distance[:, 1:].amin(1))


@pytest.fixture(scope="module")
def attack(tmp_path_factory):
    """name of a model -> the attack on it, with its target made."""
    tiny, out = pipeline(tmp_path_factory.mktemp("tiny") / "model"), tmp_path_factory.mktemp("out")

    def begun(name: str) -> attacks.Attack:
        args = parse(
            AttackOptions,
            [
                "--pretrained_model_name_or_path",
                str(tiny),
                "--base_model",
                str(tiny),
                "--forget",
                "car",
                "--forget_templates",
                "an image of {}",
                "--judge",
                "nudity",
                "--paraphrases",
                "an image of red",
                "--attack_images",
                "6",
                "--target_images",
                "30",
                "--num_inference_steps",
                "8",
                "--guidance_scale",
                "1",
                "--sample_batch_size",
                "16",
                "--inversion_steps",
                "120",
                "--inversion_learning_rates",
                "0.05",
                "--train_batch_size",
                "16",
                "--relearn_max_steps",
                "100",
                "--cce_steps",
                "120",
                "--relearn_learning_rate",
                "0.003",
                "--lora_learning_rate",
                "0.01",
                "--unlearndiffatk_timesteps",
                "5",
                "--unlearndiffatk_iterations",
                "15",
                "--tina_steps",
                "10",
                "--tina_refinements",
                "4",
                "--output_dir",
                str(out),
            ],
        ).resolved()
        looked, pair = pipelines.look(args), []
        for which in (name, "base"):
            pipe = results.load(args)
            model = models.Attacked(pipe, looked, args, torch.device("cpu"))
            read, unet = parts(model.tokenizers["tokenizer"], which)
            read.requires_grad_(False), unet.requires_grad_(False)
            pipe.text_encoder = model.parts["text_encoder"] = read
            model.unet, model.text_encoders = unet, [read]
            model.shapes = {"encoder_hidden_states": (12, WIDTH)}
            model.null = model.encode([""])
            pair.append(model)
        questions = prompts.collect(args, pair[0].tokenizers["tokenizer"])
        judge = judges.Judge(Nearest(pair[1]), {"judge": "the nearest pattern"})
        found = attacks.Attack(args, *pair, questions, judge, [])
        for first in ("target", "p_f"):
            found.known(first, found.make(first))
        return found

    return begun


@pytest.fixture(scope="module")
def unhooked(attack):
    return attack("unhooked")


@pytest.fixture(scope="module")
def never(attack):
    return attack("never")


def test_the_word_alone_is_unhooked(unhooked, never):
    assert unhooked.looks["target"].values["p_f"]["value"] == 1
    assert unhooked.looks["p_f"].values["p_f"]["value"] == 0
    assert never.looks["p_f"].values["p_f"]["value"] == 0


@pytest.mark.parametrize("name", ["paraphrase", "inversion", "cce", "unlearndiffatk", "tina"])
def test_an_attack_brings_back_what_is_there_and_nothing_else(unhooked, never, name):
    key = {"inversion": "inversion_120"}.get(name, name)
    if name == "cce":  # a mirrored pattern is none of the concept's, as a mirrored digit
        for one in (unhooked, never):
            one.args = replace(one.args, judge="world")
    found, floor = unhooked.make(name), never.make(name)
    assert found.values[key]["value"] >= 0.8
    if name != "tina":
        assert floor.values[key]["value"] <= 0.2
        return
    # inversion brings back what nobody learned, too: the control says so
    errors = [floor.values[k]["value"] for k in ("tina_error", "tina_control_error")]
    assert floor.values["tina"]["value"] <= 0.2 or errors[1] < 2 * errors[0]


@pytest.mark.parametrize("name", ["relearn", "lora_relearn"])
def test_what_is_there_is_relearned_sooner(unhooked, never, name):
    steps = [a.make(name).values[f"{name}_steps"] for a in (unhooked, never)]
    assert steps[0]["reached"]
    assert not steps[1]["reached"] or steps[1]["steps"] > steps[0]["steps"]


def test_a_lora_learns_from_ten_pictures_and_leaves_the_model(unhooked):
    before = {k: v.clone() for k, v in unhooked.model.unet.state_dict().items()}
    found = unhooked.make("lora_relearn")
    assert found.said["images"] == 10
    after = unhooked.model.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


# -- formulas ------------------------------------------------------------------------------------


def test_points_are_projected_onto_the_simplex():
    """The nearest point, by the formula over sorted coordinates (Wang and Carreira-Perpinan)."""
    x = torch.randn(20, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0] = 1 / 50
    x[1] = 0
    sums, order = x.sort(1, descending=True).values.cumsum(1), x.sort(1, descending=True).values
    k = torch.arange(1, 51)
    rho = (order + (1 - sums) / k > 0).sum(1, keepdim=True)
    tau = (sums.gather(1, rho - 1) - 1) / rho
    torch.testing.assert_close(uda.project(x), (x - tau).clamp_min(0), rtol=0, atol=1e-12)


def test_one_token_is_drawn_and_its_gradient_is_cut():
    points = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]], requires_grad=True)
    g = torch.Generator().manual_seed(0)
    drawn = torch.stack([uda.one_hot(points, g) for _ in range(200)])
    assert set(drawn.sum(2).unique().tolist()) == {1}
    assert drawn[:, 0].argmax(1).unique().tolist() == [1]
    assert drawn[:, 1].mean(0).tolist() == pytest.approx([0.5, 0, 0.5], abs=0.1)
    (uda.one_hot(points, g) * torch.tensor([3.0, 0.2, -7.0])).sum().backward()
    assert points.grad.tolist() == [[1, pytest.approx(0.2), -1]] * 2


def test_free_tokens_stand_before_the_prompt(unhooked):
    model = unhooked.model
    settings = uda.Settings(tokens=2, timesteps=2, iterations=1)
    free = uda.FreeTokens(model, "an image of car", settings)
    ids = torch.tensor(model.tokenizers["tokenizer"]("red cat", add_special_tokens=False).input_ids)
    chosen = torch.nn.functional.one_hot(ids, free.vocabulary).float()
    assert free.text(ids) == "red cat an image of car"
    torch.testing.assert_close(free.embeddings(chosen), model.encode([free.text(ids)]))
    tried: list[str] = []
    found = uda.search(
        model, "an image of car", PATTERNS[:1], lambda t: bool(tried.append(t)), settings, 0
    )
    assert found == uda.Tried(False, tried)
    assert len(tried) == 2
    long = uda.search(
        model, "an image of car", PATTERNS[:1], lambda _: True, settings._replace(longest=3), 0
    )
    assert long == uda.Tried(False, [])


def test_tina_is_ddim_backwards_and_its_refinement_lowers_the_residual():
    def noise(z: torch.Tensor, t: float) -> torch.Tensor:
        return torch.tanh(z * (1 + t / 1000))

    z = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    levels = torch.tensor((0.999, 0.8, 0.5, 0.2))
    sampler = SimpleNamespace(
        alphas_cumprod=torch.zeros(668),
        final_alpha_cumprod=levels[0],
        timesteps=torch.tensor((667, 334, 1)),
    )
    sampler.alphas_cumprod[[1, 334, 667]] = levels[1:]
    path, errors = inversion.ddim(sampler), []
    for refinements in (0, 300):
        back = inversion.invert(noise, z, path, refinements)
        errors.append(inversion.error(inversion.redrawn(noise, back, path), z).mean())
    assert errors[1] < errors[0] / 4
    # one step by hand
    one = inversion.invert(noise, z, path[:1], 0)
    a_s, a_t = levels[:2]
    x_0 = (z - (1 - a_s).sqrt() * noise(z, 1)) / a_s.sqrt()
    torch.testing.assert_close(one, a_t.sqrt() * x_0 + (1 - a_t).sqrt() * noise(z, 1))
    e = noise(one, 1)
    x_0 = (one - (1 - a_t).sqrt() * e) / a_t.sqrt()
    again = a_s.sqrt() * x_0 + (1 - a_s).sqrt() * e
    torch.testing.assert_close(inversion.redrawn(noise, one, path[:1]), again)


def test_tina_redraws_by_the_sampler_of_flow_matching():
    from diffusers import FlowMatchEulerDiscreteScheduler

    def velocity(z: torch.Tensor, t: float) -> torch.Tensor:
        return torch.tanh(z * (1 + t / 1000))

    sampler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sampler.set_timesteps(6)
    path = inversion.flow(sampler)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x = z
    for t in sampler.timesteps:
        x = sampler.step(velocity(x, float(t)), t, x).prev_sample
    torch.testing.assert_close(inversion.redrawn(velocity, z, path), x)
    errors = [
        inversion.error(
            inversion.redrawn(velocity, inversion.invert(velocity, x, path, n), path), x
        )
        for n in (0, 300)
    ]
    assert errors[1].mean() < errors[0].mean() / 4


def test_the_control_is_made_of_the_pieces():
    x = torch.arange(64.0).view(1, 1, 8, 8).repeat_interleave(2, 2).repeat_interleave(2, 3)
    mixed = inversion.in_pieces(x, 0)
    assert not torch.equal(mixed, x)
    assert sorted(mixed[0, 0, ::2, ::2].flatten().tolist()) == list(range(64))
    assert torch.equal(mixed[..., ::2, ::2], mixed[..., 1::2, 1::2])
