"""Photos of a data set as network input, and a network's logits of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from mlperturb.model.preprocess import Preprocess
from mlperturb.photos.datasets import Dataset
from mlperturb.photos.images import read_photo


class PhotoDataset(TorchDataset[tuple[Tensor, Tensor]]):
    """Decoded photos after a transform, (3, h, w), with their labels, (L,)."""

    def __init__(self, dataset: Dataset, transform: Callable[[Tensor], Tensor]) -> None:
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one photo and its labels."""
        pixels = torch.from_numpy(read_photo(self.dataset.paths[index]).rgb).permute(2, 0, 1)
        return self.transform(pixels), torch.from_numpy(self.dataset.truth[index])


def augmentation(preprocess: Preprocess, size: tuple[int, int], least: float = 0.5) -> Callable[[Tensor], Tensor]:
    """Return a random crop, flip and colour change of an 8-bit photo, as network input.

    Args:
        preprocess: whose mean and standard deviation normalise the pixels.
        size: (height, width) of the network input.
        least: the smallest share of the photo's area that a crop keeps, in (0, 1]; a small object is easily cut off.
    """
    from torchvision.transforms import v2

    transform: Callable[[Tensor], Tensor] = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(least, 1.0), ratio=(0.7, 1.43), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.2, 0.2, 0.2),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(preprocess.mean), list(preprocess.std)),
        ]
    )
    return transform


@torch.inference_mode()
def predict_dataset(
    network: nn.Module,
    dataset: Dataset,
    preprocess: Preprocess,
    *,
    device: str,
    batch_size: int = 64,
    workers: int = 0,
    amp: bool = False,
) -> Tensor:
    """Return the logits of every photo of a data set, (N, L), float32 on the CPU; with `amp` in mixed precision."""
    loader = DataLoader(PhotoDataset(dataset, preprocess.reference()), batch_size, num_workers=workers)
    network.eval()
    with mixed_precision(device, amp):
        outputs = [network(to_device(images, device)).float().cpu() for images, _ in loader]
    return torch.cat(outputs)


def mixed_precision(device: str, enabled: bool) -> torch.autocast:
    """Return the context in which a network computes with 16 bits: float16 on CUDA, bfloat16 on the CPU."""
    kind = device.partition(":")[0]
    return torch.autocast(kind, dtype=torch.float16 if kind == "cuda" else torch.bfloat16, enabled=enabled)


def to_device(images: Tensor, device: str) -> Tensor:
    """Move images, (N, 3, h, w), in the memory format that convolutions are fast in, or features, (N, F)."""
    if images.dim() == 4:
        return images.to(device, memory_format=torch.channels_last, non_blocking=True)
    return images.to(device)
