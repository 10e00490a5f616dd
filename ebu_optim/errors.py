"""The error that the commands print in one line, without a traceback."""


class InputError(Exception):
    """What the user can put right: a command prints it and exits with status 2."""
