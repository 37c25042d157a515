"""The Python interface: load a classifier, predict labels, attack images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from mlperturb.errors import UsageError
from mlperturb.labels import list_names
from mlperturb.limits import MARGIN, Limits
from mlperturb.model.checkpoints import find_checkpoint, load_checkpoint
from mlperturb.model.classifier import Classifier
from mlperturb.model.ensemble import Ensemble, Victim, alpha_of, check_size, members_of
from mlperturb.model.hub import fetch, is_hub
from mlperturb.model.preprocess import Preprocess
from mlperturb.model.readers import parse_reader
from mlperturb.model.trial import try_network
from mlperturb.model.views import read_logits
from mlperturb.photos.forms import Images as Images
from mlperturb.photos.forms import form_of, open_images
from mlperturb.photos.images import Photo
from mlperturb.photos.regions import name_region
from mlperturb.run.results import Result as Result
from mlperturb.run.results import Row, build_result, judge_pixels
from mlperturb.run.search import Found, Searcher
from mlperturb.run.settings import Settings, Words, check_seed, read_settings
from mlperturb.system.devices import prepare

if TYPE_CHECKING:
    from mlperturb.labels import Request

Names: TypeAlias = "str | Iterable[str]"


def load(
    checkpoint: str | Path | None = None,
    *,
    arch: str | None = None,
    labels: Sequence[str] | Path | None = None,
    thresholds: float | str | Path | Mapping[str, float] | Sequence[float] | None = None,
    preprocess: Preprocess | Mapping[str, Any] | Path | None = None,
    activation: str | None = None,
    prompt: str | Sequence[str] | None = None,
    device: str = "cpu",
) -> Classifier:
    """Load a classifier.

    Args:
        checkpoint: a `.safetensors` file that `mlperturb train` wrote, or plain weights (`.pt`, `.pth`, `.safetensors`)
            with `arch` and `labels`; the folder of a timm or a transformers model (config.json, model.safetensors,
            and often selected_tags.csv or preprocessor_config.json), or `hf:OWNER/NAME`, with or without `@REVISION`,
            of the Hugging Face Hub; a program, `.pt2` of torch.export or `.onnx`, with a JSON file beside it; or the
            name of a bundled classifier of the 20 labels of PASCAL VOC (`efficientnet-lite2`, the
            default, `mobilenet-v2`, `robust` or `paper`).
        arch: the torchvision architecture of plain weights, such as `resnet50`.
        labels: the label names of plain weights, or of a folder without names, in the order of the network's outputs;
            or a file of them, a name a line or a CSV table with the columns `name` and, if you like, `category`.
        thresholds: the decision thresholds, inside (0, 1), where the checkpoint records none (0.5 is used then) or
            others are wanted: a number for all labels, numbers by label, a number for each label, or a CSV table with
            the columns `name` or `category`, and `threshold`.
        preprocess: how a photo becomes network input, where the checkpoint does not say it or says it wrongly: no
            timm folder records that its network wants BGR, or photos padded to a white square. A `Preprocess` takes
            the place of the checkpoint's own; fields by name, or a JSON file of them, take the place of those fields.
        activation: what makes probabilities of the network's scores, `sigmoid` or `softmax`, where the checkpoint does
            not say it: a network of ImageNet is a softmax network.
        prompt: of a model of images and texts, the folder of a CLIP or a SigLIP, whose labels are the names that you
            give: a text with `{}` in place of the name, by default `a photo of {}`, or several, whose embeddings are
            averaged.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.

    Raises:
        CheckpointError: if the file is missing, is not a checkpoint, or does not fit `arch` and `labels`.
        UsageError: if this machine does not have the device, `checkpoint` is not a path, `labels`, `thresholds` or
            `preprocess` cannot be read, or a `prompt` has no place for the label.
    """
    if not isinstance(checkpoint, str | Path | None):
        raise UsageError(f"expected a path for `checkpoint`, got a {form_of(checkpoint)}")
    path = fetch(str(checkpoint)).folder if is_hub(checkpoint) else find_checkpoint(checkpoint)
    place = device if device == "cpu" else prepare(device, 0)
    return load_checkpoint(
        path,
        architecture=arch,
        labels=labels,
        thresholds=thresholds,
        preprocess=preprocess,
        activation=activation,
        prompt=prompt,
        device=place,
    )[0]


@torch.no_grad()
def predict(classifier: Classifier, images: Images, *, reader: str | None = None) -> Tensor:
    """Return the probabilities of every label on every image, (N, L), on the CPU.

    Args:
        classifier: a classifier from `load`, or your own `Classifier`.
        images: see `attack`.
        reader: how the images are read, see `mlperturb.model.readers`; by default the first reader of the classifier's
            `Preprocess`.

    Raises:
        ImageError: if a path cannot be read.
        UsageError: if the images have none of the forms of `attack`, or the reader is unknown.
    """
    _check_classifier(classifier)
    chosen = parse_reader(reader or classifier.preprocess.readers[0])
    rows = [read_logits(classifier, photo.rgb, chosen) for photo, _ in open_images(images, classifier.preprocess.alpha)]
    return torch.sigmoid(torch.cat(rows)) if rows else torch.empty(0, len(classifier.labels))


def attack(
    classifier: Classifier | Sequence[Classifier] | Mapping[str, Classifier],
    images: Images,
    *,
    flip: Names = (),
    keep: Names = (),
    add: Names = (),
    remove: Names = (),
    method: str = "ml-ddn",
    budget: Literal["fast", "balanced", "paper"] = "balanced",
    limits: Limits = Limits(),
    survive: Names = (),
    reader: Names = (),
    margin: float = MARGIN,
    region: str | Path | tuple[int, int, int, int] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **options: str,
) -> Result:
    """Find the smallest perturbation of each image that flips the labels of A and keeps the labels of B.

    Args:
        classifier: the classifier to attack, from `load` or a `Classifier` of your own. Or several, in a list or by
            name, see `mlperturb.model.ensemble.Ensemble`: an image must fool all of them, each in its own readers.
        images: a float batch (N, 3, H, W) in [0, 1]; or a list of images of any sizes: tensors (3, H, W) and NumPy
            arrays (H, W, 3), of floats in [0, 1] or uint8, PIL images, and paths. Floats are rounded to 8 bits first.
        flip: names of labels to reverse, present or not; or `all`; or `any`, the label nearest to its threshold. In
            all four sets labels are named, not numbered, and `category:NAME` stands for the labels of a category.
        keep: names of labels whose decision is to stay; or `rest`, every label not named elsewhere; or `present`, those
            of them that the image has now.
        add: names of labels to be present: flipped where they are absent, kept elsewhere.
        remove: names of labels to be absent: flipped where they are present, kept elsewhere.
        method: a name of `mlperturb.attacks.METHODS`.
        budget: how long to search; `paper` is the paper's own setting.
        limits: the most passes, the largest RMSD and the largest change of a pixel; no limits by default.
        survive: compressions after which every constraint must still hold, such as `jpeg:75` or `jpeg:60-95`.
        reader: readers in which every constraint must hold, such as `pillow` or `pillow:bicubic`, see
            `mlperturb.model.readers`; by default the readers that the classifier's `Preprocess` names.
        margin: by how much each logit must clear its threshold during the search.
        region: the pixels that may change: a rectangle (left, top, width, height), or the path of a mask image, in
            which they are not black. None for all pixels.
        seed: of the random numbers, from 0 to 2**32 - 1.
        progress: called with the number of images done, and the number of images.
        options: the method's `space`, `rounding`, `solver`, `between`; see `mlperturb.attacks.methods.CHOICES`.

    Returns:
        The adversarial images in the form of the input, with the probabilities before and after.

    Raises:
        LabelError: for an unknown label, or a label in two sets.
        ImageError: if a path cannot be read, or the region lies outside an image.
        UsageError: if an argument is out of its range or does not fit the others.
        CheckpointError: if attacks cannot work on the classifier, see `mlperturb.model.trial.try_network`.
    """
    victim = _victim(classifier, list_names(reader, "reader"))
    given = {"flip": flip, "keep": keep, "add": add, "remove": remove, "survive": survive, "reader": reader}
    words = Words(**{name: list_names(names, name) for name, names in given.items()}, region=name_region(region))
    settings = _settings(victim, words, method, budget, limits, margin, options)
    return _run(victim, images, settings, check_seed(seed), progress)


def _victim(given: Classifier | Sequence[Classifier] | Mapping[str, Classifier], readers: Sequence[str]) -> Victim:
    """Return one classifier, or several as one.

    Raises:
        UsageError: if a value is not a `Classifier`, or no classifier is given.
        CheckpointError: if attacks cannot work on a network.
    """
    if isinstance(given, list | tuple) and given:
        given = {str(number): one for number, one in enumerate(given, 1)}
    members: dict[str, Classifier] = {}
    for name, one in (given if isinstance(given, Mapping) and given else {"": given}).items():
        _check_classifier(one)
        assert isinstance(one, Classifier)
        try_network(one)
        members[name] = one
    return Ensemble(members, readers) if len(members) > 1 else next(iter(members.values()))


def _settings(
    victim: Victim,
    words: Words,
    method: str,
    budget: str,
    limits: Limits,
    margin: float,
    options: Mapping[str, str],
) -> Settings:
    """Read the settings of `attack`, with the labels and the readers of the classifier, or of all of several.

    Raises:
        UsageError: if an option is a limit, as on the command line, or a setting cannot be carried out.
    """
    for name, value in options.items():
        if (limit := name.removeprefix("max_")) in Limits.__dataclass_fields__:
            raise UsageError(f"`{name}` is not an option: expected `limits`, such as Limits({limit}={value!r:.30})")
    return read_settings(
        words,
        victim.labels,
        method=method,
        budget=budget,
        limits=limits,
        margin=margin,
        readers=victim.preprocess.readers if isinstance(victim, Classifier) else victim.every_reader,
        options=dict(options),
        categories=victim.categories,
        networks=len(members_of(victim)),
    )


def _run(
    classifier: Victim,
    images: Images,
    settings: Settings,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> Result:
    """Attack the images, and give the results the images' own form.

    Raises:
        UsageError: if `progress` cannot be called.
    """
    if not (progress is None or callable(progress)):
        raise UsageError(f"expected a function for `progress`, got a {form_of(progress)}")
    opened = open_images(images, alpha_of(classifier))
    photos = [photo for photo, _ in opened]
    with torch.random.fork_rng(enabled=bool(photos)):
        torch.manual_seed(seed)
        rows = _attack_photos(classifier, photos, settings, progress)
    adversarial = [restore(row.pixels) for (_, restore), row in zip(opened, rows, strict=True)]
    names = [reader.name for reader in settings.readers]
    return build_result(classifier, adversarial, rows, readers=names, batch=isinstance(images, Tensor))


def _attack_photos(
    classifier: Victim,
    photos: Sequence[Photo],
    settings: Settings,
    progress: Callable[[int, int], None] | None,
) -> list[Row]:
    """Attack the photos, and decide on each result."""
    for photo in photos:
        check_size(classifier, photo.rgb.shape[:2])
        if settings.region is not None:
            settings.region.inside(*photo.rgb.shape[:2])
    rows: list[Row] = []
    for part in _parts(classifier, photos, settings.request, settings):
        for found in part:
            photo = photos[len(rows)]
            rows.append(judge_pixels(classifier, photo, found, settings))
        if progress is not None:
            progress(len(rows), len(photos))
    return rows


def _parts(
    classifier: Victim, photos: Sequence[Photo], request: Request, settings: Settings
) -> Iterator[list[Found | None]]:
    """Attack the photos, as many at a time as fit the device's memory."""
    searcher = Searcher(classifier, settings)
    for start, stop in searcher.group([photo.rgb.shape[:2] for photo in photos]):
        for first, last, found in searcher.parts(photos[start:stop], [request] * (stop - start)):
            if found is None:
                height, width = photos[start + first].rgb.shape[:2]
                raise UsageError(f"an image of {width} x {height} pixels is too large for the device's memory")
            assert last - first == len(found)
            yield found


def _check_classifier(classifier: object) -> None:
    if not isinstance(classifier, Classifier):
        raise UsageError(f"expected a Classifier, such as Classifier(network, labels), got a {form_of(classifier)}")
