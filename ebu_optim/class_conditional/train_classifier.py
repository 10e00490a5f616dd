"""Train the classifier that judges generated images.

The protocol for CIFAR and STL: ResNet-34 with ImageNet weights, a new last layer, images enlarged
to 224x224, mirrored at random (--random_flip), Adam 1e-5 (1e-4 for the last layer), weight decay
5e-4, batch 128, 10 epochs. --reject adds a class, which means noise.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import training
from ..errors import InputError
from ..metrics import accuracy, classify
from ..training import data
from .models import Classifier, save_classifier
from .options import TrainClassifier


def pretrained(model: Classifier, given: str) -> None:
    """Load ImageNet's weights into all layers except the last one."""
    if given == "none":
        return
    try:
        if given == "imagenet":
            from torchvision.models import ResNet34_Weights

            state = ResNet34_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True)
        else:
            state = torch.load(given, weights_only=True, map_location="cpu")
    except Exception as error:  # the network fails, or the file or its hash is wrong
        raise InputError(
            f"--pretrained_weights {given} is not available ({type(error).__name__}: {error}); "
            'give the path of torchvision\'s file, or "none"'
        ) from error
    kept = {k: v for k, v in state.items() if not k.startswith("fc.")}
    try:
        model.body.load_state_dict(kept)
    except RuntimeError as error:
        raise InputError(
            f"--pretrained_weights {given} does not hold a ResNet-34: {error}"
        ) from error


def train_classifier(config: TrainClassifier) -> None:
    """Train the classifier, or continue an interrupted run; save to ``config.output_dir``.

    Raises:
        InputError: options or data do not fit.
    """
    train, test = data.load(config, "train"), data.load(config, "test")
    args: Any = config.resolved(len(train.labels))  # complete: nothing is None
    accelerator = training.new_accelerator(args)
    shape = train.images.shape[1:]
    model = Classifier(args.model, shape, len(train.classes) + args.reject)
    resnet = args.model == "resnet34"
    if resnet:
        pretrained(model, args.pretrained_weights)
    batches = data.Batches(
        train.images,
        train.labels,
        args.train_batch_size,
        seed=args.seed,
        flip=args.random_flip,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        device=accelerator.device,
    )
    real = data.to_float(train.images[:1000])

    def loss(prepared: nn.Module, i: int) -> Tensor:
        x, y = batches[i]
        x, y = with_noise(x, y, real, len(train.classes)) if args.reject else (x, y)
        return F.cross_entropy(prepared(x), y)

    def finish(_: object) -> None:
        found = measure(model, test, args.reject)
        info = {
            "kind": args.model,
            "classes": list(train.classes),
            "reject": args.reject,
            "shape": list(shape),
            "source": train.source,
            "steps": args.max_train_steps,
            "skipped_images": len(train.skipped),
            **found,
        }
        save_classifier(args.output_dir, model, info)
        print(*(f"{k} {v:.4f}" for k, v in found.items()), sep=", ")

    lr = args.learning_rate
    groups = [
        {"params": model.body.parameters()},
        {"params": model.head.parameters(), "lr": 10 * lr if resnet else lr},
    ]
    optimizer = torch.optim.Adam if resnet else torch.optim.AdamW
    training.fit(
        args,
        accelerator,
        "train_classifier",
        model,
        optimizer(groups, lr=lr, weight_decay=args.weight_decay),
        loss,
        finish,
        same=train.made_of(),
    )


def with_noise(x: Tensor, y: Tensor, real: Tensor, reject: int) -> tuple[Tensor, Tensor]:
    """Append noise under the reject class, three eighths as many images as the batch has."""
    n = max(3 * len(x) // 8, 1)
    g = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    noise = data.noise_images(n, g, real).to(x.device)
    return torch.cat([x, noise]), torch.cat([y, y.new_full((n,), reject)])


@torch.no_grad()
def measure(model: nn.Module, test: data.Data, reject: bool) -> dict[str, float]:
    """Return the accuracy on the test images, and the share of noise that is rejected."""
    x = data.to_float(test.images)
    found = {"test_accuracy": accuracy(classify(model, x), test.labels)}
    if reject:
        noise = data.noise_images(999, torch.Generator().manual_seed(1), x)
        labels = torch.full((999,), len(test.classes))
        found["noise_rejected"] = accuracy(classify(model, noise), labels)
    return found
