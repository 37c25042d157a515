"""Several classifiers at once: labels matched by name, each one's own readers, and costs counted."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from support.models import make_net
from torch import Tensor, nn

from mlperturb import Classifier, Limits, Preprocess, attack
from mlperturb.errors import LabelError, UsageError
from mlperturb.labels import Request
from mlperturb.model.ensemble import Ensemble, bind, places_of, read_columns, to_columns
from mlperturb.model.readers import parse_readers
from mlperturb.model.trial import try_network
from mlperturb.model.views import read_logits
from mlperturb.photos.forms import open_images
from mlperturb.targets import decide

FIRST, SECOND = ("cat", "dog", "hen"), ("dog", "cow", "cat")
PHOTOS = torch.rand(4, 3, 14, 15, generator=torch.Generator().manual_seed(0))


class Counted(nn.Module):
    """A network that counts the images of its forward and backward passes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.passes = network, 0

    def forward(self, images: Tensor) -> Tensor:
        self.passes += len(images)
        logits = self.network(images)
        if logits.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, gradient: Tensor) -> None:
        self.passes += len(gradient)


def make(labels: tuple[str, ...], seed: int, *, readers: tuple[str, ...] = ("float", "pillow")) -> Classifier:
    network = Counted(make_net(len(labels), seed=seed, dtype=torch.float32))
    return Classifier(network, labels, (0.5, 0.4, 0.6), Preprocess(resize=(10, 10), readers=readers))


@pytest.fixture
def pair() -> dict[str, Classifier]:
    return {"a": make(FIRST, 1), "b": make(SECOND, 5, readers=("pillow", "torchvision"))}


def pixels(images: Tensor) -> list:
    return [photo.rgb for photo, _ in open_images(list(images), None)]


def test_labels_are_matched_by_name_and_the_first_that_has_a_label_stands_for_it(pair):
    both = Ensemble(pair)
    assert both.labels == ("cat", "dog", "hen", "cow")
    assert both.places == ((0, 5), (1, 3), (2,), (4,))
    assert both.thresholds == (0.5, 0.4, 0.6, 0.4)
    assert both.columns() == [slice(0, 3), slice(3, 6)]
    assert both.every_reader == ("float", "pillow", "torchvision")
    assert places_of(pair["a"]) == [(0,), (1,), (2,)]


def test_a_label_is_flipped_toward_the_reverse_of_what_the_first_says():
    places = ((0, 5), (1, 3), (2,), (4,))
    request = Request(flip=(0, 3), keep=(1,), add=(2,))
    agreed = to_columns(request, places, torch.tensor([1.0, 1, 1, 1, 1, 1]))
    assert (agreed.flip, agreed.keep, agreed.add, agreed.remove) == ((0, 4), (1, 3), (2,), (5,))
    other = to_columns(request, places, torch.tensor([-1.0, 1, 1, 1, 1, 1]))
    assert (other.add, other.remove) == ((2, 5), ())


def test_a_view_has_the_logits_of_every_classifier_by_its_own_reader(pair):
    both, readers = Ensemble(pair), parse_readers(("float", "pillow", "torchvision"))
    model = bind(both, readers, [(14, 15)] * 4)
    assert (model.views, model.passes) == (3, 2)
    rgb = pixels(PHOTOS)
    files = torch.stack([torch.from_numpy(one).permute(2, 0, 1) / 255 for one in rgb])
    used = {"a": ("float", "pillow", "float"), "b": ("pillow", "pillow", "torchvision")}  # its first, for one it lacks
    for view in range(3):
        alone = [
            torch.cat([read_logits(pair[name], one, parse_readers([used[name][view]])[0]) for name in pair], 1)
            for one in rgb
        ]
        assert torch.allclose(model(files, view), torch.cat(alone), atol=1e-5)
        assert torch.allclose(torch.cat([read_columns(both, one, readers[view]) for one in rgb]), torch.cat(alone))
    mixed = model.look(files, torch.tensor([2, 0, 1, 2]))
    for row, view in enumerate((2, 0, 1, 2)):
        assert torch.allclose(mixed[row], model(files, view)[row], atol=1e-5)
    assert torch.allclose(model.select(torch.tensor([3, 1]))(files[[3, 1]], 1), model(files, 1)[[3, 1]], atol=1e-5)


@pytest.mark.parametrize("more", [{}, {"aim": "strongest", "limits": Limits(rmsd=14.0)}, {"method": "ml-dp"}])
def test_a_success_fools_each_classifier_alone_in_all_of_its_readers(pair, more):
    result = attack(pair, PHOTOS, flip="cat", keep="rest", **more)
    assert int(result.success.sum()) >= 3
    assert set(result.readers) == {"float", "pillow", "torchvision"}
    before, after = pixels(PHOTOS), pixels(result.images)
    for (name, one), row in product(pair.items(), range(4)):
        held = []
        for reader in parse_readers(one.preprocess.readers):
            was, now = (decide(read_logits(one, rgb[row], reader), one.boundary)[0] for rgb in (before, after))
            first = decide(read_logits(pair["a"], before[row], parse_readers(["float"])[0]), pair["a"].boundary)[0, 0]
            wanted = was.clone()
            wanted[one.labels.index("cat")] = -first
            held.append(bool((now == wanted).all()))
        assert bool(result.classifiers[name].success[row]) == all(held)
    both = torch.stack([one.success for one in result.classifiers.values()]).all(0)
    assert torch.equal(both, result.success)


def test_a_label_that_one_lacks_constrains_only_those_that_have_it(pair):
    result = attack(pair, PHOTOS, add="cow", remove="hen")
    a, b = result.classifiers["a"], result.classifiers["b"]
    assert (a.flip | a.keep).any(0).tolist() == [False, False, True]
    assert (b.flip | b.keep).any(0).tolist() == [False, True, False]
    assert result.success.all()
    assert (a.after[:, 2] < 0.6).all()
    assert (b.after[:, 1] >= 0.4).all()
    assert result.labels == ("cat", "dog", "hen", "cow")
    assert torch.equal(result.after[:, 1], a.after[:, 1])
    assert torch.equal(result.after[:, 3], b.after[:, 1])


def test_any_flips_one_label_of_all_that_have_it(pair):
    result = attack(pair, PHOTOS, flip="any", keep="rest")
    assert (result.flip.sum(1) == 1).all()
    assert not result.flip[:, 2:].any()  # hen and cow are of one classifier alone
    assert result.success.any()


@pytest.mark.parametrize("passes", [None, 60, 101])
def test_every_pass_of_every_network_is_counted_and_the_limit_is_on_their_sum(pair, passes):
    for row in range(2):
        for one in pair.values():
            try_network(one)  # once, and not counted
            one.network.passes = 0
        result = attack(pair, PHOTOS[row : row + 1], flip="dog", keep="rest", limits=Limits(passes=passes))
        assert int(result.passes) == sum(one.network.passes for one in pair.values())
        assert passes is None or int(result.passes) <= passes


def test_a_reader_that_is_named_is_that_of_every_classifier(pair):
    result = attack(pair, PHOTOS, flip="cat", reader="opencv")
    assert set(result.readers) == {"opencv"}
    assert result.success.any()


def test_what_cannot_be_attacked_is_refused(pair):
    with pytest.raises(UsageError, match="expected a Classifier"):
        attack([pair["a"], "b"], PHOTOS, flip="cat")
    with pytest.raises(UsageError, match="expected a Classifier"):
        attack([], PHOTOS, flip="cat")
    with pytest.raises(UsageError, match="ranks the labels of one classifier"):
        attack(pair, PHOTOS, flip="cat", method="rank-1")
    with pytest.raises(UsageError, match="at least 20 `passes`"):
        attack(pair, PHOTOS, flip="cat", limits=Limits(passes=19))
    with pytest.raises(LabelError, match="unknown label 'cew'"):
        attack(pair, PHOTOS, flip="cew")
    with pytest.raises(UsageError, match="at least two"):
        Ensemble({"a": pair["a"]})


def test_one_classifier_in_a_list_is_that_classifier(pair):
    one, alone = attack([pair["a"]], PHOTOS, flip="cat"), attack(pair["a"], PHOTOS, flip="cat")
    assert torch.equal(one.images, alone.images)
    assert one.classifiers == {}
