"""The errors that are told apart."""


class InputError(Exception):
    """What the user can put right: a command prints it and exits with status 2."""


class NonFiniteError(RuntimeError):
    """NaN or Inf in a gradient, or in what is made of two: the training diverges."""
