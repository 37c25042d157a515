"""The one error tree; the command line is the one place that catches it.

A message names a parameter in backquotes, as in "expected `rmsd` above 0"; the command line names the option instead.

MlperturbError              what a user can put right; the message is one line
|-- UsageError              the call cannot be carried out as it was given
|   `-- LabelError          an unknown label, or a label in two sets
|-- ImageError              one photo cannot be read; the run records it and goes on
|-- CheckpointError         a file is no checkpoint, or does not fit its network
|-- DatasetError            a data set lacks a file, a split or a label
`-- OutputError             a file cannot be written
    `-- StorageError        nothing can be written there (disk full, read-only, gone): the run stops
"""

from __future__ import annotations


class MlperturbError(Exception):
    """Base of every error that mlperturb raises on purpose."""


class UsageError(MlperturbError):
    """The call cannot be carried out as it was given."""


class LabelError(UsageError):
    """A label name is unknown, or stands in two sets."""


class ImageError(MlperturbError):
    """A photo cannot be read."""


class CheckpointError(MlperturbError):
    """A checkpoint cannot be read, or does not fit its network."""


class DatasetError(MlperturbError):
    """A data set is not laid out as expected."""


class OutputError(MlperturbError):
    """A result cannot be written."""


class StorageError(OutputError):
    """Nothing can be written there any more: the disk is full, read-only or gone."""
