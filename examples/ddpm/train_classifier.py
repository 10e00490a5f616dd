"""Train the classifier that judges generated images.

    python examples/ddpm/train_classifier.py --digits --model small --output_dir outputs/classifier

The protocol for CIFAR and STL: ResNet-34 with ImageNet weights, a new last layer, images enlarged
to 224x224, mirrored at random (--random_flip), Adam 1e-5 (1e-4 for the last layer), weight decay
5e-4, batch 128, 10 epochs. With --reject there is one class more, which means noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebu_optim import training
from ebu_optim.class_conditional.models import Classifier, save_classifier
from ebu_optim.errors import InputError
from ebu_optim.metrics import accuracy, classify
from ebu_optim.modules import parameter_bytes
from ebu_optim.training import data


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=("resnet34", "small"), default="resnet34")
    parser.add_argument(
        "--pretrained_weights", default="imagenet",
        help='of resnet34: "imagenet" (a download of 83 MB), the file of a state_dict, or "none"',
    )  # fmt: skip
    parser.add_argument("--reject", action="store_true", help="add a class that means noise")
    parser.add_argument("--num_train_epochs", type=int, default=10, help="if no --max_train_steps")
    parser.add_argument("--random_flip", action="store_true")
    parser.add_argument("--weight_decay", type=float)
    data.add_arguments(parser)
    training.add_arguments(parser, learning_rate=None, max_train_steps=None)
    args = parser.parse_args(argv)
    resnet = args.model == "resnet34"
    if args.learning_rate is None:
        args.learning_rate = 1e-5 if resnet else 2e-3
    if args.weight_decay is None:
        args.weight_decay = 5e-4 if resnet else 1e-2
    return args


def pretrained(model: Classifier, given: str) -> None:
    """Load ImageNet's weights into all but the last layer."""
    if given == "none":
        return
    try:
        if given == "imagenet":
            from torchvision.models import ResNet34_Weights

            state = ResNet34_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True)
        else:
            state = torch.load(given, weights_only=True, map_location="cpu")
    except Exception as error:  # the network, the file, its hash
        raise InputError(
            f"--pretrained_weights {given} cannot be had ({type(error).__name__}: {error}): give "
            'the path of torchvision\'s file, or "none"'
        ) from error
    kept = {k: v for k, v in state.items() if not k.startswith("fc.")}
    try:
        model.body.load_state_dict(kept)
    except RuntimeError as error:
        raise InputError(f"--pretrained_weights {given} is no ResNet-34: {error}") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these options; None: those of the command line."""
    args = parse(argv)
    train, test = data.load(args, "train"), data.load(args, "test")
    per_epoch = max(len(train.labels) // args.train_batch_size, 1)
    args.max_train_steps = args.max_train_steps or args.num_train_epochs * per_epoch
    training.check(args)
    accelerator = training.new_accelerator(args)
    shape = train.images.shape[1:]
    raw = Classifier(args.model, shape, len(train.classes) + args.reject)
    if args.model == "resnet34":
        pretrained(raw, args.pretrained_weights)
    faster = 10 if args.model == "resnet34" else 1
    base = torch.optim.Adam if args.model == "resnet34" else torch.optim.AdamW
    with training.Run(
        args,
        accelerator,
        "train_classifier",
        size=parameter_bytes(raw),
        same={"data": train.source},
    ) as run:
        lr = args.learning_rate
        groups = [{"params": raw.body.parameters()},
                  {"params": raw.head.parameters(), "lr": faster * lr}]  # fmt: skip
        optimizer = base(groups, lr=lr, weight_decay=args.weight_decay)
        schedule = training.new_schedule(args, optimizer)
        model, optimizer = accelerator.prepare(raw, optimizer)
        begin = run.resume({"model": raw, "optimizer": optimizer.optimizer, "schedule": schedule})
        batches = data.Batches(
            train.images, train.labels, args.train_batch_size, seed=args.seed,
            flip=args.random_flip, process=accelerator.process_index,
            processes=accelerator.num_processes, device=accelerator.device,
        )  # fmt: skip
        real = data.to_float(train.images[:1000])
        model.train()
        for step in run.steps(begin, "classifier"):
            for micro in range(args.gradient_accumulation_steps):
                x, y = batches[(step - 1) * args.gradient_accumulation_steps + micro]
                x, y = with_noise(x, y, real, len(train.classes)) if args.reject else (x, y)
                with accelerator.accumulate(model):
                    loss = F.cross_entropy(model(x), y)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients and args.max_grad_norm:
                        accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
            schedule.step()
            if step % args.logging_steps == 0:
                run.log(step, loss=loss.item(), lr=schedule.get_last_lr()[0])
        if accelerator.is_main_process:
            found = measure(raw, test, args.reject)
            info = {
                "kind": args.model, "classes": list(train.classes), "reject": args.reject,
                "shape": list(shape), "source": train.source, "steps": args.max_train_steps,
                "skipped_images": len(train.skipped), **found,
            }  # fmt: skip
            save_classifier(Path(args.output_dir), raw, info)
            print(*(f"{k} {v:.4f}" for k, v in found.items()), sep=", ")
        accelerator.wait_for_everyone()


def with_noise(x: Tensor, y: Tensor, real: Tensor, reject: int) -> tuple[Tensor, Tensor]:
    """The batch and three eighths of it again in noise, under the reject class."""
    n = max(3 * len(x) // 8, 1)
    g = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    noise = data.noise_images(n, g, real).to(x.device)
    return torch.cat([x, noise]), torch.cat([y, y.new_full((n,), reject)])


@torch.no_grad()
def measure(model: nn.Module, test: data.Data, reject: bool) -> dict[str, float]:
    """Accuracy on the test images, and the share of noise that is called noise."""
    x = data.to_float(test.images)
    found = {"test_accuracy": accuracy(classify(model, x), test.labels)}
    if reject:
        noise = data.noise_images(999, torch.Generator().manual_seed(1), x)
        labels = torch.full((999,), len(test.classes))
        found["noise_rejected"] = accuracy(classify(model, noise), labels)
    return found


if __name__ == "__main__":
    training.exit_on_input_errors(main)
