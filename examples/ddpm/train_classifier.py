"""Train the classifier that judges generated images.

    python examples/ddpm/train_classifier.py --digits --model small --output_dir outputs/classifier

The protocol for CIFAR and STL is a ResNet-34 with ImageNet weights and a new last layer, on images
enlarged to 224x224 and mirrored at random (--random_flip), with Adam 1e-5 (1e-4 for the last
layer), weight decay 5e-4, batch size 128 and 10 epochs. --reject adds a class for noise.
"""

from ebu_optim.class_conditional.options import TrainClassifier
from ebu_optim.class_conditional.train_classifier import train_classifier
from ebu_optim.training import command

if __name__ == "__main__":
    command(train_classifier, TrainClassifier, __doc__)
