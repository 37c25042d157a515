"""Write a checkpoint of another form as a file of ours."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from mlperturb.errors import CheckpointError
from mlperturb.model.beside import is_program
from mlperturb.model.checkpoints import load_checkpoint, read_tensors, save_checkpoint
from mlperturb.model.folders import find_weights
from mlperturb.model.metadata import Metadata
from mlperturb.model.trial import agree, sample_inputs
from mlperturb.system.files import write_file


def convert(path: Path, out: Path, **said: Any) -> Metadata:
    """Write the weights of a checkpoint, and all that is understood of it, as one `.safetensors` file of ours.

    The file is read back, and its logits are held against those of the checkpoint.

    Args:
        path: of the checkpoint: a folder, or plain weights.
        out: of the file.
        said: what the user says of the checkpoint, see `checkpoints.load_checkpoint`.

    Returns:
        What is understood of the checkpoint.

    Raises:
        CheckpointError: if it cannot be loaded, is a program, or has an architecture that a file of ours cannot name.
        OutputError: if the file cannot be written.
    """
    if is_program(path):
        raise CheckpointError(
            f"{path} is a program: its architecture is none of torchvision's or timm's, expected such"
        )
    original, metadata = load_checkpoint(path, **said)
    weights = find_weights(path) if path.is_dir() else path
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder, "trial.safetensors")
        save_checkpoint(trial, read_tensors(weights), metadata)
        try:
            converted, _ = load_checkpoint(trial)
        except CheckpointError as error:
            reason = str(error).replace(str(trial), str(path))
            raise CheckpointError(f"a file of ours cannot hold {metadata.architecture} of {path}: {reason}") from error
        inputs = sample_inputs(original)
        with torch.no_grad():
            if not agree(original.network_logits(inputs), converted.network_logits(inputs)):
                raise CheckpointError(f"{path} has options of {metadata.architecture} that a file of ours cannot name")
        write_file(out, trial.read_bytes())
    return metadata
