"""The errors that callers distinguish."""


class InputError(Exception):
    """An error that the user can fix: a command prints it and exits with status 2."""


class NonFiniteError(RuntimeError):
    """NaN or Inf in a gradient or in the combined gradient: the training diverges."""
