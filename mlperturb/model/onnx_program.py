"""An ONNX file as a network: onnx2pytorch makes torch modules of it, and ONNX Runtime checks them.

The extra `onnx` has these libraries. They are given a file that is safe and plain (`mlperturb.model.onnx_graph`).
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mlperturb.errors import CheckpointError, MlperturbError
from mlperturb.model.shaped import Shaped
from mlperturb.model.trial import bounded

if TYPE_CHECKING:
    from onnx import ModelProto

TOLERANCE = 1e-3  # of a logit, beside 1 and the largest logit
_ADVICE = "export the network with torch.export (.pt2) in its place, see docs/checkpoints.md"


@dataclass(frozen=True)
class Converted:
    """A network made of an ONNX file.

    Attributes:
        network: maps (N, C, h, w) to logits, (N, L).
        model: the ONNX model that it was made of.
        path: of the file.
    """

    network: Shaped
    model: ModelProto
    path: Path

    def compare(self, inputs: Tensor) -> None:
        """Hold the network against ONNX Runtime.

        Args:
            inputs: (N, C, h, w), on the CPU.

        Raises:
            CheckpointError: if a logit differs by more than `TOLERANCE`, or ONNX Runtime cannot run the file.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = torch.get_num_threads()
        form = self.network.form
        arranged = inputs.permute(0, 2, 3, 1).contiguous() if form.channels_last else inputs
        try:
            with bounded():
                session = onnxruntime.InferenceSession(
                    self.model.SerializeToString(), options, providers=["CPUExecutionProvider"]
                )
                parts = torch.split(arranged, 1) if form.sizes[0] == 1 else [arranged]
                found = [torch.from_numpy(session.run(None, {"input": part.numpy()})[0]) for part in parts]
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        except Exception as error:  # the runtime has a tree of errors of its own
            reason = str(error).strip().partition("\n")[0]
            raise CheckpointError(f"ONNX Runtime cannot run {self.path}: {reason:.300}") from error
        with torch.no_grad():
            logits = self.network(inputs)
        expected = torch.cat(found)
        if expected.shape != logits.shape:
            got, wanted = tuple(logits.shape), tuple(expected.shape)
            raise CheckpointError(f"{self.path}: PyTorch's logits are {got}, ONNX Runtime's {wanted}; {_ADVICE}")
        error_of = float((logits - expected).abs().max())
        allowed = TOLERANCE * (1 + float(expected.abs().max()))
        if not error_of <= allowed:
            raise CheckpointError(
                f"{self.path}: PyTorch's logits differ from ONNX Runtime's by {error_of:.2g}, expected at most "
                f"{allowed:.2g}; {_ADVICE}"
            )


def read_onnx(path: Path, outputs: int) -> Converted:
    """Make a network of an ONNX file; nothing in it is executed.

    Args:
        path: of the file.
        outputs: L, the number of labels.

    Raises:
        CheckpointError: if the extra `onnx` is not installed, the file is damaged or unsafe, or an operator cannot be
            converted.
    """
    try:
        import onnxruntime  # noqa: F401  # needed later, and said now
        from onnx2pytorch import ConvertModel

        from mlperturb.model.onnx_graph import read_plain
        from mlperturb.model.onnx_modules import replace_modules
    except ImportError as error:
        raise CheckpointError(f"expected the extra `onnx` for {path}: pip install 'mlperturb[onnx]'") from error
    try:
        with bounded():
            plain = read_plain(path, outputs)
        with warnings.catch_warnings(), bounded():
            warnings.simplefilter("ignore")  # of its own code
            logging.getLogger("onnx2pytorch").setLevel(logging.ERROR)
            converted: nn.Module = ConvertModel(plain.model)
            replace_modules(converted)
    except MlperturbError:
        raise
    except Exception as error:  # a converter of two hundred operators may raise anything
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"onnx2pytorch cannot convert {path}: {reason:.300}; {_ADVICE}") from error
    return Converted(Shaped(converted.eval(), plain.form), plain.model, path)
