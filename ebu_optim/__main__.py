"""``python -m ebu_optim`` and ``accelerate launch -m ebu_optim`` are the command `ebu`."""

from .cli import main

if __name__ == "__main__":
    main()
