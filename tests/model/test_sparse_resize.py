from __future__ import annotations

import pytest
import torch

from mlperturb.model.linear import Banded, Dense, bind_map, resize, resize_back, stack_matrices
from mlperturb.model.preprocess import Preprocess

SIZES = [(40, 31), (9, 60), (1, 4), (12, 10)]


def _pairs(preprocess: Preprocess) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [preprocess.matrices(size) for size in SIZES]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_sparse_and_dense_products_agree_both_ways(interpolation):
    pairs = _pairs(Preprocess(14, (12, 10), interpolation=interpolation))
    banded = bind_map(pairs, "cpu", torch.float64)
    dense = Dense(*(stack_matrices([pair[axis] for pair in pairs]).double() for axis in (0, 1)))
    assert isinstance(banded, Banded)
    images, gradients = torch.rand(4, 3, 40, 60).double(), torch.randn(4, 3, 12, 10).double()
    torch.testing.assert_close(banded.down(images), dense.down(images))
    torch.testing.assert_close(banded.up(gradients), dense.up(gradients))
    rows = torch.tensor([3, 1])
    torch.testing.assert_close(banded.select(rows).up(gradients[rows]), dense.up(gradients)[rows])


def test_one_photo_alone_and_in_a_batch_give_the_same_bits():
    pairs = _pairs(Preprocess((12, 10)))
    together = bind_map(pairs, "cpu", torch.float32).down(torch.ones(4, 3, 40, 60) / 3)
    for row, (pair, (height, width)) in enumerate(zip(pairs, SIZES, strict=True)):
        alone = bind_map([pair], "cpu", torch.float32).down(torch.ones(1, 3, height, width) / 3)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_transposed_map(dtype):
    linear = bind_map(_pairs(Preprocess((12, 10))), "cpu", dtype)
    images = torch.rand(4, 3, 40, 60, dtype=dtype, requires_grad=True)
    weights = torch.randn(4, 3, 12, 10, dtype=dtype)
    (gradient,) = torch.autograd.grad((resize(images, linear) * weights).sum(), images)
    torch.testing.assert_close(gradient, linear.up(weights))
    (back,) = torch.autograd.grad((resize_back(weights.requires_grad_(), linear) * images.detach()).sum(), weights)
    torch.testing.assert_close(back, linear.down(images.detach()))
