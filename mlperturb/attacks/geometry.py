"""Lengths and inner products of batches of images, (n, 3, H, W), and the places of images in a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from mlperturb.model.linear import strips


def is_all(rows: Tensor, count: int) -> bool:
    """Say whether places, (m,), are those of all of `count` images, in their order; a copy of large images is slow."""
    return len(rows) == count and bool((rows == torch.arange(count, device=rows.device)).all())


def norms(images: Tensor) -> Tensor:
    """Return the L2 norm of each image, (n,)."""
    lengths: Tensor = torch.linalg.vector_norm(images.flatten(1), dim=1)
    return lengths


def products(images: Tensor, others: Tensor) -> Tensor:
    """Return the inner product of each pair of images, (n,)."""
    total = images.new_zeros(len(images))
    for rows in strips(images[:1]):  # as if each were alone
        total += (images[:, :, rows] * others[:, :, rows]).flatten(1).sum(1)
    return total


def distances(images: Tensor, others: Tensor) -> Tensor:
    """Return the L2 norm of the difference of each pair of images, in floats or 8-bit pixels and floats, (n,)."""
    cuts = strips(images[:1])  # as if each were alone
    if images.dtype == torch.uint8:
        return _pixel_distances(images, others, cuts)
    parts = [norms(images[:, :, rows] - others[:, :, rows]) for rows in cuts]
    return parts[0] if len(parts) == 1 else norms(torch.stack(parts, dim=1))


def _pixel_distances(pixels: Tensor, images: Tensor, cuts: list[slice]) -> Tensor:
    """Return the L2 norm of the difference of 8-bit pixels and images in [0, 1], (n,), in [0, 1] units."""
    parts, room = [], torch.empty_like(images[:, :, cuts[0]])
    for rows in cuts:
        moved = room[:, :, : rows.stop - rows.start]
        torch.sub(pixels[:, :, rows], images[:, :, rows], alpha=255, out=moved)
        parts.append(norms(moved))
    return norms(torch.stack(parts, dim=1)) / 255


def to_floats(images: Tensor) -> Tensor:
    """Return images in [0, 1], of 8-bit pixels or such images."""
    return images / 255 if images.dtype == torch.uint8 else images


def spread(values: Tensor) -> Tensor:
    """Reshape a value for each image, (n,), to (n, 1, 1, 1), which broadcasts to images."""
    return values.view(-1, 1, 1, 1)
