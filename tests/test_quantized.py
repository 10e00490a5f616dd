"""A frozen base in 8 and in 4 bits under a LoRA."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers comes with the extra text_to_image")
pytest.importorskip("peft", reason="peft comes with the extra text_to_image")

from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from ebu_optim.diffusion import model_hash
from ebu_optim.errors import InputError
from ebu_optim.text_to_image import quantized

from .scripts import run_script
from .text_to_image import pipeline

SCRIPT = Path(__file__).parent.parent / "examples" / "stable_diffusion" / "unlearn.py"
HOW = ["int8", "nf4"]
#: Error of what four layers say, and of the gradient that goes through it (1 - cosine), at most.
ERROR = {"int8": (0.01, 1e-3), "nf4": (0.2, 0.02)}


def missing(how: str) -> str:
    """Why it cannot be tried here, or nothing."""
    try:
        importlib.import_module(quantized.PACKAGES[how])
    except Exception as error:  # one of these libraries raises many kinds with an older torch
        return f"{quantized.PACKAGES[how]} cannot be imported here: {error}"
    return ""


@pytest.fixture(params=HOW)
def how(request) -> str:
    if why := missing(request.param):
        pytest.skip(why)
    return request.param


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(256, 512), nn.Linear(512, 256, bias=False)

    def forward(self, x):
        return self.two(torch.nn.functional.gelu(self.one(x)))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 256), Block(), Block()).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_answers_as_before_within_its_bits(how, dtype):
    before = model().to(dtype)
    after = copy.deepcopy(before)
    quantized.quantize(after, how, {"Block"}, "cpu")
    assert torch.equal(after[0].weight, before[0].weight)  # outside of the blocks
    said, through = ERROR[how]
    x = torch.randn(64, 256, dtype=dtype)
    xs, ys = [], []
    for m in (before, after):
        xs.append(x.clone().requires_grad_())
        ys.append(m(xs[-1]))
        ys[-1].float().square().sum().backward()
    assert 0 < (ys[1] - ys[0]).norm() / ys[0].norm() < said + torch.finfo(dtype).eps
    cosine = torch.cosine_similarity(*(x.grad.flatten().double() for x in xs), dim=0)
    assert 1 - cosine < through + 1e-3 * (dtype == torch.bfloat16)


def bytes_of(m: nn.Module) -> int:
    """Of the weights of the blocks, with the scales of them."""
    found = 0
    for name, p in m.named_parameters():
        if not name.startswith("0.") and name.endswith("weight"):
            inner = getattr(p.data, "tensor_data_names", None)
            if inner:  # torchao
                found += sum(getattr(p.data, n).nbytes for n in inner)
            elif state := getattr(p, "quant_state", None):
                found += p.nbytes + state.absmax.nbytes
            else:
                found += p.nbytes
    return found


def test_bytes_are_counted(how):
    m = model()
    before, spared = bytes_of(m), quantized.saved(m, how, {"Block"}, 4)
    quantized.quantize(m, how, {"Block"}, "cpu")
    assert model_hash(m) == model_hash(copy.deepcopy(m)) != model_hash(model())
    assert bytes_of(m) == pytest.approx(before - spared, rel=0.02)
    assert quantized.saved(m, None, {"Block"}, 4) == 0


def test_gradients_keep_no_weight_that_is_not_quantized(how):
    """It would be as large again as the whole model."""
    after = model()
    whole = {tuple(layer.weight.shape) for layer in quantized.layers(after, {"Block"}).values()}
    whole |= {shape[::-1] for shape in whole}
    quantized.quantize(after, how, {"Block"}, "cpu")
    kept = []
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        after[1:](x).square().sum().backward()
    assert not whole & {tuple(shape) for shape in kept}
    # which is the gradient through weights that are rounded so
    rounded = model()
    with torch.no_grad():
        for a, b in zip(after[1:], rounded[1:], strict=True):
            for name in ("one", "two"):
                eye = torch.eye(getattr(b, name).in_features)
                bias = getattr(a, name).bias
                out = getattr(a, name)(eye) - (0 if bias is None else bias)
                getattr(b, name).weight.copy_(out.T)
    (right,) = torch.autograd.grad(rounded[1:](x).square().sum(), x)
    torch.testing.assert_close(x.grad, right, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return pipeline(tmp_path_factory.mktemp("quantized") / "base")


def unlearn(base: Path, out: Path, *more: object) -> tuple[int, str]:
    return run_script(
        SCRIPT,
        "--pretrained_model_name_or_path",
        base,
        "--forget",
        "cat",
        "--remember",
        "a dog",
        "--replay_images",
        2,
        "--surrogate_images",
        2,
        "--num_inference_steps",
        2,
        "--max_train_steps",
        2,
        "--learning_rate",
        1e-2,
        "--validation_steps",
        0,
        "--output_dir",
        out,
        *more,
    )


def test_a_lora_learns_under_it_and_loads_on_the_base(how, base, tmp_path):
    found = {}
    for name, more in (("whole", ()), (how, ("--quantize", how))):
        code, said = unlearn(
            base,
            tmp_path / name,
            "--train_modules",
            "lora",
            "--remember_loss",
            "crossed",
            "--gradient_checkpointing",
            *more,
        )
        assert code == 0, said
        (file,) = (tmp_path / name / "lora").glob("*.safetensors")
        found[name] = load_file(file)
    whole, ours = (torch.cat([t.flatten() for t in found[n].values()]) for n in ("whole", how))
    assert not torch.equal(whole, ours)
    assert torch.cosine_similarity(whole, ours, dim=0) > 0.95
    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.load_lora_weights(tmp_path / how / "lora", weight_name="pytorch_lora_weights.safetensors")


def test_what_is_refused(base, tmp_path, monkeypatch):
    code, said = unlearn(base, tmp_path / "o", "--quantize", "int8", "--train_modules", "full")
    assert code == 2
    assert "--quantize int8: --train_modules full trains the weights themselves" in said
    monkeypatch.setitem(quantized.PACKAGES, "nf4", "ebu_optim.no_such_package")
    with pytest.raises(InputError, match=r"--quantize nf4: .*ebu_optim\[quantized\]"):
        quantized.check("nf4")
    assert not (tmp_path / "o").exists()
