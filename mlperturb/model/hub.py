"""Checkpoints of the Hugging Face Hub, `hf:OWNER/NAME` or `hf:OWNER/NAME@REVISION`: a folder, fetched once.

This is the only module of mlperturb that touches a network. It fetches safetensors, JSON, CSV and text files of the top
folder, and nothing else: no code, no pickle.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mlperturb.errors import CheckpointError

HUB = "hf:"  # prefix of a checkpoint's name
_NAME = re.compile(r"hf:(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_FETCHED = ["*.safetensors", "*.json", "*.csv", "*.txt"]
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Fetched:
    """A folder of the hub on this machine.

    Attributes:
        folder: on this machine.
        repository: OWNER/NAME.
        commit: its 40 hexadecimal digits.
    """

    folder: Path
    repository: str
    commit: str

    @property
    def name(self) -> str:
        """The name that fetches these very files again."""
        return f"{HUB}{self.repository}@{self.commit}"


def is_hub(name: object) -> bool:
    """Say whether a checkpoint's name is that of the hub."""
    return str(name).startswith(HUB)


def fetch(name: str, *, fetched_before: bool = False) -> Fetched:
    """Fetch a checkpoint of the hub, unless this machine has it already.

    Args:
        name: `hf:OWNER/NAME`, with or without `@REVISION`: a branch, a tag or a commit.
        fetched_before: touch no network; what this machine has must do.

    Raises:
        CheckpointError: if the name has another form, huggingface_hub is not installed, or the hub cannot be reached
            or does not have it.
    """
    found = _NAME.fullmatch(name)
    if found is None or ".." in name:
        raise CheckpointError(f"expected hf:OWNER/NAME or hf:OWNER/NAME@REVISION, got {name!r:.120}")
    repository, revision = found["repository"], found["revision"]
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"expected the library huggingface_hub for {name}: pip install 'mlperturb[hf]', or give a folder"
        ) from error
    try:
        folder = Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=_FETCHED,
                ignore_patterns=["*/*"],
                local_files_only=fetched_before,
            )
        )
    except Exception as error:  # of the network, of the hub, of the disk: no list of them is complete
        reason = " ".join(str(error).partition("\n")[0].split()) or type(error).__name__
        raise CheckpointError(
            f"cannot fetch {name}: {reason:.200}; a folder with its files on this machine does as well"
        ) from error
    commit = _COMMIT.search(folder.name)
    if commit is None:
        raise CheckpointError(f"expected a folder named by its commit for {name}, got {folder.name!r:.80}")
    return Fetched(folder, repository, commit[0])
