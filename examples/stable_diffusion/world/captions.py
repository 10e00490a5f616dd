"""Print prompts of digits in styles that leave out a concept."""

from ebu_optim.worlds.styled_digits.captions import main

if __name__ == "__main__":
    main()
