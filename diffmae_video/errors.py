"""Errors that a user can act on, each with the exit code of its kind.

Every message is one sentence: what happened, the file or option it happened to, and what to do about it.
"""


class DiffmaeError(Exception):
    """Base of every error shown to a user without a traceback; the process exits with `exit_code`."""

    exit_code = 1


class UsageError(DiffmaeError):
    """The request cannot be carried out as written: an unknown name, a value out of range, two options that clash."""

    exit_code = 2


class DataError(DiffmaeError):
    """The input is missing, empty, damaged or not what it claims to be."""

    exit_code = 3


class LimitError(DataError):
    """The input is larger or longer than what is read; the bounds are `data.media.Limits`."""


class StorageError(DataError):
    """A disk or a server does not answer; this says nothing about the data, and the same command may go on later."""

    exit_code = 1


class Stopped(DiffmaeError):
    """A signal ended the run after its state was saved; running the same command again continues it."""

    exit_code = 75
