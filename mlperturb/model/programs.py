"""Load a program, `.pt2` or `.onnx`, as a classifier, and try it before it is used."""

from __future__ import annotations

from pathlib import Path

from mlperturb.errors import CheckpointError
from mlperturb.model.beside import note_logits
from mlperturb.model.classifier import Classifier
from mlperturb.model.metadata import Metadata
from mlperturb.model.preprocess import Preprocess
from mlperturb.model.program import read_program
from mlperturb.model.softmax import apply_activation
from mlperturb.model.trial import sample_inputs, try_network


def load_program(path: Path, metadata: Metadata) -> tuple[Classifier, Metadata]:
    """Return the classifier of a program, on the CPU, and its metadata with where the logits come from.

    Args:
        path: `.pt2` or `.onnx`.
        metadata: see `beside.describe_program`.

    Raises:
        CheckpointError: if the file cannot be read safely, does not fit the metadata, or is not a program that attacks
            can work on, see `trial.try_network`.
    """
    preprocess = Preprocess.from_dict(metadata.preprocess)
    converted, outputs = None, len(metadata.labels)
    if path.suffix.lower() == ".onnx":
        from mlperturb.model.onnx_program import read_onnx

        converted = read_onnx(path, outputs)
        network = converted.network
    else:
        network = read_program(path, outputs)
    network.form.check(preprocess, path)
    metadata = note_logits(metadata, network.form.activation, path)
    scores = apply_activation(network, metadata.activation, outputs)
    classifier = Classifier(scores, metadata.labels, metadata.thresholds, preprocess, metadata.categories)
    try:
        try_network(classifier, trusted=False)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if converted is not None:
        converted.compare(classifier.arrange(sample_inputs(classifier)))
    return classifier, metadata
