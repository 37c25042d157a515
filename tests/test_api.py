"""The front door: one call attacks images of every form, and its types are real."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.models import TINY_LABELS as LABELS

import mlperturb
from mlperturb import Classifier, Limits, Preprocess
from mlperturb.attacks.methods import METHODS
from mlperturb.errors import CheckpointError, ImageError, LabelError, UsageError
from mlperturb.targets import decide

PUBLIC = {"Classifier", "Limits", "MlperturbError", "Preprocess", "Result", "attack", "export", "load", "predict"}
FEW = {"budget": "fast", "limits": Limits(passes=40)}
SIDE = 40
PREPROCESS = Preprocess((SIDE, SIDE))


@pytest.fixture
def classifier():
    """A small network with random weights."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 5, stride=3), torch.nn.SiLU(), torch.nn.Flatten(), torch.nn.LazyLinear(len(LABELS))
    )
    module(torch.zeros(1, 3, SIDE, SIDE))
    return Classifier(module, LABELS, preprocess=PREPROCESS)


def photos(count=3):
    rng = np.random.default_rng(0)
    sizes = [(21, 34), (16, 40), (30, 18)]
    return [rng.integers(0, 256, (*sizes[number % 3], 3), dtype=np.uint8) for number in range(count)]


def check(classifier, result, arrays, flip, clean):
    """The result's claims, decided anew on its own pixels."""
    assert result.after.shape == result.before.shape == (len(arrays), len(LABELS))
    for row, (pixels, photo) in enumerate(zip(arrays, clean, strict=True)):
        assert pixels.dtype == np.uint8
        assert pixels.shape == photo.shape
        logits = classifier([torch.from_numpy(pixels).permute(2, 0, 1).float() / 255])
        was = classifier([torch.from_numpy(photo).permute(2, 0, 1).float() / 255])
        torch.testing.assert_close(result.after[row], torch.sigmoid(logits[0]))
        torch.testing.assert_close(result.before[row], torch.sigmoid(was[0]), atol=1e-5, rtol=1e-5)
        turned = (decide(logits, classifier.boundary) != decide(was, classifier.boundary))[0].tolist()
        asked = [label in flip for label in LABELS]
        assert bool(result.success[row]) == (turned == asked)
        moved = pixels.astype(float) - photo
        assert float(result.rmsd[row]) == pytest.approx(float(np.sqrt((moved**2).mean())), rel=1e-6)
        assert float(result.linf[row]) == np.abs(moved).max()
        assert 1 < int(result.passes[row]) <= 40


def test_arrays_come_back_as_arrays(classifier):
    clean = photos()
    result = mlperturb.attack(classifier, clean, flip=[LABELS[0]], keep="rest", **FEW)
    check(classifier, result, result.images, {LABELS[0]}, clean)
    assert bool(result.success.all())
    assert result.status == ("success",) * 3
    assert result.flip.sum(1).tolist() == [1, 1, 1]
    assert bool((result.flip | result.keep).all())
    assert result.labels == LABELS
    assert len(result) == 3


def test_a_result_says_reader_by_reader_where_it_holds(classifier):
    wish = {"flip": [LABELS[0]], "keep": "rest", "budget": "fast"}
    result = mlperturb.attack(classifier, photos(), **wish)
    assert list(result.readers) == ["float", "pillow", "torchvision"]
    assert result.success.tolist() == torch.stack(list(result.readers.values())).all(0).tolist() == [True] * 3
    alone = mlperturb.attack(classifier, photos(), reader="float", **wish)
    assert list(alone.readers) == ["float"]
    other = Classifier(classifier.network, LABELS, preprocess=Preprocess((SIDE, SIDE), readers=("pillow:bicubic",)))
    assert list(mlperturb.attack(other, photos(1), **wish).readers) == ["pillow:bicubic"]
    with pytest.raises(UsageError, match="unknown reader 'skimage'"):
        mlperturb.attack(classifier, photos(1), reader=["float", "skimage"], **wish)


def test_the_margin_is_that_of_every_logit(classifier):
    wide = mlperturb.attack(classifier, photos(), flip=[LABELS[0]], keep="rest", margin=0.05)
    assert bool(wide.success.all())
    assert float(torch.logit(wide.after.double()).abs().min()) >= 0.05 - 1e-4
    for margin in (-0.1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="expected a `margin` of at least 0"):
            mlperturb.attack(classifier, photos(1), flip=[LABELS[0]], margin=margin)


def test_an_image_that_is_as_asked_is_unchanged_and_a_success(classifier):
    clean = photos(1)
    there = mlperturb.predict(classifier, clean)[0] >= 0.5
    wish = {"add": [label for label, is_there in zip(LABELS, there.tolist(), strict=True) if is_there]}
    wish["remove"] = [label for label in LABELS if label not in wish["add"]]
    result = mlperturb.attack(classifier, clean, **wish)
    assert result.status == ("unchanged",)
    assert result.success.tolist() == [True]
    assert np.array_equal(result.images[0], clean[0])
    assert (result.rmsd.tolist(), result.linf.tolist(), result.passes.tolist()) == ([0.0], [0.0], [6])


def test_every_form_of_an_image_comes_back_in_its_form(classifier, tmp_path):
    array = photos(1)[0]
    path = tmp_path / "photo.png"
    Image.fromarray(array).save(path)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    forms = [
        array,
        np.asarray(Image.fromarray(array)),  # read-only
        array.astype(np.float32) / np.float32(255),
        tensor,
        tensor.float() / 255,
        tensor.double() / 255,
        Image.fromarray(array),
        path,
        str(path),
    ]
    result = mlperturb.attack(classifier, forms, flip=LABELS[1], keep="rest", **FEW)
    wanted = result.images[0]
    assert not np.array_equal(wanted, array)
    for form, image in zip(forms, result.images, strict=True):
        kind = Image.Image if isinstance(form, str | Path) else type(form)
        assert isinstance(image, kind)
        if isinstance(image, torch.Tensor):
            assert image.dtype == form.dtype
            assert image.shape == form.shape
            scale = 255 if image.is_floating_point() else 1
            image = (image * scale).permute(1, 2, 0).numpy()
        if isinstance(image, np.ndarray):
            scale = 255 if image.dtype.kind == "f" and image.max() <= 1 else 1
            np.testing.assert_allclose(image * scale, wanted, atol=1e-4)
        else:
            np.testing.assert_array_equal(np.asarray(image), wanted)


def test_a_batch_comes_back_as_a_batch_of_multiples_of_a_grey_level(classifier):
    batch = torch.rand(4, 3, 24, 31, generator=torch.Generator().manual_seed(1))
    result = mlperturb.attack(classifier, batch, flip=[LABELS[2]], keep="rest", **FEW)
    assert isinstance(result.images, torch.Tensor)
    assert result.images.shape == batch.shape
    torch.testing.assert_close(result.images * 255, (result.images * 255).round(), atol=1e-4, rtol=0)
    torch.testing.assert_close(mlperturb.predict(classifier, result.images), result.after, atol=1e-6, rtol=1e-5)


def test_an_image_does_not_depend_on_its_neighbours(classifier):
    clean = photos()
    together = mlperturb.attack(classifier, clean, flip=[LABELS[0]], keep="rest", **FEW)
    for row, photo in enumerate(clean):
        alone = mlperturb.attack(classifier, [photo], flip=[LABELS[0]], keep="rest", **FEW)
        assert abs(float(alone.rmsd[0] - together.rmsd[row])) < 0.02


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_is_called_alike(classifier, method):
    result = mlperturb.attack(classifier, photos(), flip=[LABELS[0]], keep="rest", method=method, **FEW)
    check(classifier, result, result.images, {LABELS[0]}, photos())


def test_the_command_line_writes_what_the_front_door_finds(cli, tiny, tmp_path):
    array = photos(1)[0]
    Image.fromarray(array).save(tmp_path / "photo.png")
    out = tmp_path / "out"
    arguments = ["--flip", LABELS[0], "--keep", "rest", "--budget", "fast", "--passes", 40, "--out", out]
    assert cli("attack", tmp_path / "photo.png", "--checkpoint", tiny, *arguments)[0] == 0
    result = mlperturb.attack(mlperturb.load(tiny), [array], flip=LABELS[0], keep="rest", **FEW)
    with Image.open(out / "photo.adv.png") as written:
        np.testing.assert_array_equal(np.asarray(written), result.images[0])


def test_limits_region_survival_seed_and_progress_are_taken(classifier):
    clean, told = photos(), []
    result = mlperturb.attack(
        classifier,
        clean,
        flip=[LABELS[0]],
        limits=Limits(passes=60, rmsd=3.0, linf=4),
        region=(2, 3, 8, 9),
        survive="jpeg:90",
        seed=5,
        progress=lambda done, count: told.append((done, count)),
        rounding="inside",
    )
    assert told[-1] == (3, 3)
    assert bool((result.linf <= 4).all())
    assert bool((result.rmsd <= 3).all())
    assert bool((result.passes <= 60).all())
    for pixels, photo in zip(result.images, clean, strict=True):
        changed = (pixels != photo).any(axis=2)
        changed[3:12, 2:10] = False
        assert not changed.any()


def test_a_network_whose_outputs_are_not_finite_is_refused():
    class Broken(torch.nn.Module):
        def forward(self, images):
            return images.mean((1, 2, 3))[:, None] * torch.full((1, len(LABELS)), torch.nan)

    with pytest.raises(CheckpointError, match="logits are not finite"):
        mlperturb.attack(Classifier(Broken(), LABELS, preprocess=PREPROCESS), photos(1), flip=LABELS[0])


def test_the_global_random_state_is_left_alone(classifier):
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    mlperturb.attack(classifier, photos(1), flip=LABELS[0], **FEW)
    assert torch.equal(torch.rand(2), wanted)


def test_no_image_is_no_result(classifier):
    result = mlperturb.attack(classifier, [], flip=LABELS[0])
    assert len(result) == 0
    assert result.images == []
    assert result.before.shape == (0, len(LABELS))
    assert mlperturb.predict(classifier, []).shape == (0, len(LABELS))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ("photo.png", UsageError, "expected a batch .* or a list of images, got a str: put it in a list"),
        (torch.zeros(3, 8, 8), UsageError, r"expected a batch .*, got a Tensor of shape \(3, 8, 8\)"),
        (np.zeros((8, 8, 3)), UsageError, "put it in a list"),
        ([torch.zeros(8, 8, 3)], UsageError, r"expected an image tensor \(3, H, W\)"),
        ([np.zeros((8, 8))], UsageError, r"expected an image array \(H, W, 3\)"),
        ([torch.full((3, 8, 8), 1.5)], UsageError, r"expected floats in \[0, 1\], got values from 1.5 to 1.5"),
        ([torch.full((3, 8, 8), torch.nan)], UsageError, r"expected floats in \[0, 1\]"),
        ([np.zeros((8, 8, 3), dtype=np.int64)], UsageError, "expected pixels of uint8, or floats"),
        ([torch.zeros(3, 8, 8, dtype=torch.bfloat16)], UsageError, "got bfloat16, which cannot hold 255 grey levels"),
        ([7], UsageError, "expected a tensor, an array, a PIL image or a path, got a int"),
        (["nosuch.png"], ImageError, "nosuch.png"),
    ],
)
def test_images_of_another_form_are_refused(classifier, images, error, message):
    for call in (
        lambda: mlperturb.attack(classifier, images, flip=LABELS[0]),
        lambda: mlperturb.predict(classifier, images),
    ):
        with pytest.raises(error, match=message):
            call()


def test_bad_words_are_refused_before_any_pass(classifier):
    with pytest.raises(LabelError, match="unknown label 'nosuch'"):
        mlperturb.attack(classifier, photos(1), flip="nosuch")
    with pytest.raises(UsageError, match="nothing to change"):
        mlperturb.attack(classifier, photos(1))
    with pytest.raises(UsageError, match="unknown method 'cw'"):
        mlperturb.attack(classifier, photos(1), flip=LABELS[0], method="cw")
    with pytest.raises(UsageError, match="unknown option `margn`: expected one of rounding"):
        mlperturb.attack(classifier, photos(1), flip=LABELS[0], margn="3")
    for name, limit in (("passes", "passes"), ("max_rmsd", "rmsd"), ("linf", "linf")):
        with pytest.raises(UsageError, match=rf"`{name}` is not an option: expected `limits`.*\({limit}=3\)"):
            mlperturb.attack(classifier, photos(1), flip=LABELS[0], **{name: 3})
    with pytest.raises(UsageError, match="is an option of ml-dp"):
        mlperturb.attack(classifier, photos(1), flip=LABELS[0], solver="nnls")
    with pytest.raises(UsageError, match="passes"):
        mlperturb.attack(classifier, photos(1), flip=LABELS[0], limits=Limits(passes=3))
    with pytest.raises(ImageError, match="outside the photo"):
        mlperturb.attack(classifier, photos(1), flip=LABELS[0], region=(900, 0, 4, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limits": {"passes": 40}}, "expected `limits` such as Limits(passes=100, rmsd=2.0), got a dict"),
        ({"flip": [14]}, "expected label names for `flip`, such as labels[14], got 14 (int)"),
        ({"flip": 14}, "expected label names for `flip`, such as labels[14], got 14 (int)"),
        ({"keep": [LABELS[1], 2.5]}, "expected label names for `keep`, got 2.5 (float)"),
        ({"remove": None}, "expected label names for `remove`, got None (NoneType)"),
        ({"add": torch.tensor([[1], [2]])}, "expected label names for `add`, got tensor([1]) (Tensor)"),
        ({"flip": b"cat"}, "expected label names for `flip`, got b'cat' (bytes)"),
        ({"survive": 75}, "expected names for `survive`, got 75 (int)"),
        ({"reader": [1]}, "expected names for `reader`, got 1 (int)"),
        ({"margin": "x"}, "expected a `margin` of at least 0, got 'x'"),
        ({"margin": True}, "expected a `margin` of at least 0, got True"),
        ({"seed": -1}, "expected a whole number from 0 to 2**32 - 1 for `seed`, got -1"),
        ({"seed": 2**32}, "expected a whole number from 0 to 2**32 - 1 for `seed`, got 4294967296"),
        ({"seed": "x"}, "expected a whole number from 0 to 2**32 - 1 for `seed`, got 'x'"),
        ({"region": 5}, "expected (left, top, width, height) or the path of a mask for `region`, got int"),
        ({"method": []}, "unknown method []"),
        ({"budget": []}, "unknown budget []"),
        ({"classifier": torch.nn.ReLU()}, "expected a Classifier, such as Classifier(network, labels), got a ReLU"),
    ],
)
def test_an_argument_of_another_type_is_refused_in_a_line(classifier, arguments, message):
    with pytest.raises(UsageError) as told:
        mlperturb.attack(**{"classifier": classifier, "images": photos(1), "flip": LABELS[0], **arguments})
    assert str(told.value).startswith(message)
    assert "\n" not in str(told.value)


def test_names_and_numbers_of_numpy_are_taken(classifier):
    limits = Limits(passes=np.int64(40), rmsd=np.float32(9), linf=np.int32(200))
    same = [
        mlperturb.attack(classifier, photos(1), flip=flip, limits=limits, margin=margin, seed=seed, region=region)
        for flip, margin, seed, region in (
            (LABELS[0], 0.25, 5, (1, 2, 9, 9)),
            (np.array([LABELS[0]]), np.float32(0.25), np.int64(5), [1, 2, 9, 9]),
            ({LABELS[0]}, 0.25, 5, "1,2,9,9"),
        )
    ]
    for result in same[1:]:
        np.testing.assert_array_equal(result.images[0], same[0].images[0])


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"passes": "x"}, "expected a whole number for `passes`, got 'x'"),
        ({"passes": 40.5}, "expected a whole number for `passes`, got 40.5"),
        ({"rmsd": "x"}, "expected a number for `rmsd`, got 'x'"),
        ({"linf": 1.5}, "expected a whole number for `linf`, got 1.5"),
        ({"linf": True}, "expected a whole number for `linf`, got True"),
    ],
)
def test_a_limit_that_is_not_a_number_is_refused(limits, message):
    with pytest.raises(UsageError) as told:
        Limits(**limits)
    assert str(told.value) == message


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("abc", "expected a list of names for `labels`, got the text 'abc'"),
        ([1, 2, 3], "expected names for `labels`, got 1 (int)"),
        (5, "expected names for `labels`, got 5 (int)"),
    ],
)
def test_labels_are_a_list_of_names(classifier, tmp_path, labels, message):
    weights = tmp_path / "plain.pt"
    torch.save({"weight": torch.zeros(3)}, weights)
    for make in (
        lambda: mlperturb.load(weights, arch="resnet18", labels=labels),
        lambda: Classifier(classifier.network, labels),
    ):
        with pytest.raises(UsageError) as told:
            make()
        assert str(told.value) == message


def test_predict_wants_a_classifier_and_the_name_of_a_reader(classifier):
    with pytest.raises(UsageError, match=r"expected a Classifier, such as .*, got a Sequential"):
        mlperturb.predict(classifier.network, photos(1))
    with pytest.raises(UsageError, match=r"expected the name of a reader, got \['float'\]"):
        mlperturb.predict(classifier, photos(1), reader=["float"])


def test_load_takes_our_checkpoints_and_plain_weights(tiny, tmp_path):
    ours = mlperturb.load(tiny)
    assert ours.labels == LABELS
    bundled = mlperturb.load()
    assert "person" in bundled.labels
    assert len(bundled.labels) == 20
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        mlperturb.load(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="arch"):
        mlperturb.load(tiny, arch="resnet18")


# --- the names


def test_the_public_names_are_these_and_load():
    assert set(dir(mlperturb)) == PUBLIC | {"__version__"}
    for name in PUBLIC:
        assert getattr(mlperturb, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'no_such_thing'"):
        mlperturb.no_such_thing  # noqa: B018
    import mlperturb.attacks as attacks

    for name in dir(attacks):
        assert getattr(attacks, name) is not None


def type_check(tmp_path, program):
    (tmp_path / "program.py").write_text(program)
    package = Path(mlperturb.__file__).parent.parent
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", f"--cache-dir={tmp_path}", "program.py"],
        cwd=tmp_path, env={"MYPYPATH": str(package), "PATH": ""}, capture_output=True, text=True,
    )  # fmt: skip
    return checked.stdout


GOOD = """
import torch
import mlperturb
from mlperturb import Limits, Result
from mlperturb.attacks import ClassificationGoal, Outcome, Problem, ml_ddn

classifier = mlperturb.load()
result: Result = mlperturb.attack(classifier, ["a.png"], flip=["person"], keep="rest", limits=Limits(passes=40))
share: float = result.success.float().mean().item()
probabilities: torch.Tensor = mlperturb.predict(classifier, torch.rand(1, 3, 8, 8))

def own(problem: Problem) -> Outcome:
    return ml_ddn(problem.aim(ClassificationGoal(problem.targets)), iterations=9)
"""
BAD = """
import mlperturb
from mlperturb import no_such_thing
from mlperturb.attacks import no_such_attack

classifier = mlperturb.load(5)
result = mlperturb.attack(classifier, ["a.png"], flip=["person"], budget="long")
result.nothing
count: str = result.rmsd
"""


def test_a_user_program_is_checked_for_real(tmp_path):
    assert "Success" in type_check(tmp_path, GOOD)
    told = type_check(tmp_path, BAD)
    for line, word in [
        (3, "no_such_thing"),
        (4, "no_such_attack"),
        (6, "load"),
        (7, "budget"),
        (8, "nothing"),
        (9, "str"),
    ]:
        assert any(text.startswith(f"program.py:{line}:") and word in text for text in told.splitlines()), told


@pytest.mark.parametrize("wrong", [5, 2.5, ["x"], b"x"])
def test_what_is_not_a_path_a_list_of_numbers_or_a_function_is_refused_in_a_line(classifier, wrong):
    with pytest.raises(UsageError, match="expected a path for `checkpoint`, got a "):
        mlperturb.load(wrong)
    with pytest.raises(UsageError, match="expected a function for `progress`, got a "):
        mlperturb.attack(classifier, photos(1), flip=LABELS[0], progress=wrong)
    many = wrong if not isinstance(wrong, list) else wrong * len(LABELS)
    with pytest.raises((UsageError, CheckpointError), match=r"expected .*thresholds"):
        mlperturb.Classifier(classifier.network, LABELS, thresholds=many)
