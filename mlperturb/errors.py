"""The errors of mlperturb, one tree; only the command line catches its root.

A message names a parameter in backquotes, as in "expected `passes` of at least 10"; the command line names the option.

MlperturbError              an error that a user can put right; the message is one line
|-- UsageError              an argument is out of its range or does not fit the others
|   `-- LabelError          an unknown label, or a label in two sets
|-- ImageError              one photo cannot be read; the run records it and goes on
|-- CheckpointError         a file is not a checkpoint, or does not fit its network
|-- DatasetError            a data set lacks a file, a split or a label
`-- OutputError             a file cannot be written
    `-- StorageError        the disk is full, read-only or gone: the run stops
"""

from __future__ import annotations


class MlperturbError(Exception):
    """Base of every error that mlperturb raises on purpose."""


class UsageError(MlperturbError):
    """An argument is out of its range, or does not fit the others."""


class LabelError(UsageError):
    """A label name is unknown, or stands in two sets."""


class ImageError(MlperturbError):
    """A photo cannot be read."""


class CheckpointError(MlperturbError):
    """A checkpoint cannot be read, or does not fit its network."""


class DatasetError(MlperturbError):
    """A data set lacks a file, a split or a label."""


class OutputError(MlperturbError):
    """A result cannot be written."""


class StorageError(OutputError):
    """The disk is full, read-only or gone, so that the run cannot go on."""
