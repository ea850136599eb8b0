"""What can go wrong, said so that a reader knows how to mend it.

Every error that a user's input can cause derives from `NeuropilError`: the command line prints its
message without a traceback and exits with its `exit_code`. A message says what was given, what was
expected, and what to do about it.
"""


class NeuropilError(Exception):
    """Base of all errors that a user can mend."""

    exit_code = 1


class ModelError(NeuropilError):
    """A model that is missing, corrupt, of an unknown format, or holds weights that are not numbers."""

    exit_code = 3


class MissingAsset(ModelError):  # noqa: N818 - reads as the sentence it is
    """A model or data set that is not on this machine; the message names the command that brings it."""

    exit_code = 4


class NoNeurons(ModelError):  # noqa: N818
    """A model in which no layer of neurons was found."""

    exit_code = 5


class UnknownNeuron(NeuropilError, IndexError):  # noqa: N818
    """An address that names no neuron of this model."""

    exit_code = 6


class AtlasError(NeuropilError):
    """A folder that is no atlas, or an atlas with a truncated, foreign or missing part."""

    exit_code = 7


class AtlasBusy(AtlasError):  # noqa: N818
    """Another process is writing to this atlas."""

    exit_code = 8


class QueryError(NeuropilError):
    """SQL that DuckDB refuses."""

    exit_code = 9


class MissingExtra(NeuropilError, ImportError):  # noqa: N818
    """An optional dependency that is not installed; the message names the extra."""

    exit_code = 10


class Extrapolation(UserWarning):
    """A law was asked about a place outside the range of the data it was fitted to."""
