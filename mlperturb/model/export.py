"""Write a classifier as a program of `torch.export`, with the JSON file that `mlperturb.load` wants beside it."""

from __future__ import annotations

import io
import json
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from mlperturb.errors import CheckpointError, UsageError
from mlperturb.model.beside import describe_program
from mlperturb.model.classifier import Classifier, find_logits
from mlperturb.model.given import Given
from mlperturb.model.programs import load_program
from mlperturb.model.trial import agree, sample_inputs, try_network
from mlperturb.system.files import write_file


class _Logits(nn.Module):
    """A network that gives its logits alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits, (N, L)."""
        return find_logits(self.network(inputs))


def export(classifier: Classifier, path: str | Path) -> None:
    """Write a classifier as a program, NAME.pt2, and what the program does not record as NAME.json beside it.

    The program has a free batch, and the height and width of the classifier's `Preprocess`. It is read back, and its
    logits are held against the network's. The code of the network is not needed any more where it is loaded.

    Args:
        classifier: with any network that `torch.export` can follow: no Python that depends on the numbers of a photo.
        path: of the program, `.pt2`.

    Raises:
        UsageError: if the path does not end in `.pt2`, or the `Preprocess` gives photos of different sizes.
        CheckpointError: if attacks cannot work on the network, or torch.export cannot follow it.
        OutputError: if a file cannot be written.
    """
    path, preprocess = Path(path), classifier.preprocess
    if path.suffix != ".pt2":
        raise UsageError(f"expected a path that ends in .pt2, got {str(path)!r}")
    if preprocess.crop is None and isinstance(preprocess.resize, int):
        raise UsageError(f"expected a Preprocess that gives one height and width, got {preprocess}")
    try_network(classifier)
    data = _export(classifier)
    described = {
        "labels": list(classifier.labels),
        "thresholds": list(classifier.thresholds),
        "preprocess": preprocess.to_dict(),
    }
    beside = (json.dumps(described, indent=1) + "\n").encode()
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder, "program.pt2")
        trial.write_bytes(data)
        trial.with_suffix(".json").write_bytes(beside)
        back = load_program(trial, describe_program(trial, Given()))[0].to(classifier.device)
    inputs = sample_inputs(classifier, seed=3)
    with torch.no_grad():
        if not agree(back.network_logits(inputs), classifier.network_logits(inputs)):
            raise CheckpointError(
                "the program gives other logits than the network: its code depends on more than shapes"
            )
    write_file(path.with_suffix(".json"), beside)
    write_file(path, data)


def _export(classifier: Classifier) -> bytes:
    """Return the program of a classifier's network."""
    stream, batch = io.BytesIO(), torch.export.Dim("batch")
    example = classifier.arrange(sample_inputs(classifier, seed=2))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own code
            program = torch.export.export(_Logits(classifier.network), (example,), dynamic_shapes=({0: batch},))
            torch.export.save(program, stream)
    except Exception as error:  # torch.export may raise anything at code that it cannot follow
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.300}"
        raise CheckpointError(f"torch.export cannot follow the network: {reason}") from error
    return stream.getvalue()
