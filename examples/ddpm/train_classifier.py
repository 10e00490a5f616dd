"""Train the classifier that judges generated images.

    python examples/ddpm/train_classifier.py --digits --model small --output_dir outputs/classifier

The protocol for CIFAR and STL: ResNet-34 with ImageNet weights, a new last layer, images enlarged
to 224x224, mirrored at random (--random_flip), Adam 1e-5 (1e-4 for the last layer), weight decay
5e-4, batch 128, 10 epochs. With --reject there is one class more, which means noise.
"""

from ebu_optim.class_conditional.options import TrainClassifier
from ebu_optim.class_conditional.train_classifier import train_classifier
from ebu_optim.training import command

if __name__ == "__main__":
    command(train_classifier, TrainClassifier, __doc__)
