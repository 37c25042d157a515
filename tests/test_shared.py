"""Real photos with labels, where ../shared has them; skipped without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mlperturb.labels import Request
from mlperturb.model.checkpoints import BUNDLED, bundled_checkpoint, load_checkpoint, read_metadata
from mlperturb.photos.datasets import VOC_LABELS, read_voc
from mlperturb.photos.images import read_photo
from mlperturb.run.jobs import plan_outputs
from mlperturb.run.runner import run_attack
from mlperturb.run.settings import Settings

VOC = Path(__file__).resolve().parents[2] / "shared" / "voc"
INITIAL = VOC.parent / "init"
pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not VOC.is_dir(), reason="no photos in ../shared/voc"),
]


def test_the_shared_subset_is_read_as_its_readme_counts_it():
    dataset = read_voc(VOC, "2012", "val")
    assert len(dataset) == 3114
    assert dataset.labels == VOC_LABELS
    assert int((dataset.truth[:, VOC_LABELS.index("person")] == 1).sum()) == 1155


@pytest.mark.parametrize("name", BUNDLED)
def test_every_tensor_of_a_bundled_checkpoint_was_trained(name):
    """The licence of the initial weights is for those who train them: none of their tensors is in a file of ours."""
    ours = load_file(bundled_checkpoint(name))
    for initial in sorted(INITIAL.glob("*.safetensors")):
        theirs = load_file(initial)
        shared = [key for key in ours if key in theirs and ours[key].shape == theirs[key].shape]
        numbers = [key for key in shared if ours[key].is_floating_point()]
        assert not [key for key in numbers if torch.equal(ours[key], theirs[key].to(ours[key]))]


def test_the_bundled_classifier_decides_real_photos_as_its_metadata_says():
    dataset = read_voc(VOC, "2012", "val")
    sample = dataset.subset(list(range(0, len(dataset), 52)))
    classifier, metadata = load_checkpoint(bundled_checkpoint())
    photos = [torch.from_numpy(read_photo(path).rgb).permute(2, 0, 1) / 255 for path in sample.paths]
    with torch.inference_mode():
        decisions = torch.cat([classifier(photos[i : i + 10]) for i in range(0, len(photos), 10)]) >= 0
    truth = torch.from_numpy(sample.truth)
    wrong = (decisions != (truth > 0))[truth != 0].float().mean()
    assert float(wrong) < 2 * metadata.metrics["VOC2012 val"]["hamming"]


def test_removing_person_from_real_photos_holds_on_the_files(tmp_path):
    dataset = read_voc(VOC, "2012", "val")
    person = VOC_LABELS.index("person")
    paths = [path for path, y in zip(dataset.paths, dataset.truth, strict=True) if y[person] == 1][:6]
    classifier, metadata = load_checkpoint(bundled_checkpoint())
    assert read_metadata(bundled_checkpoint()) == metadata
    rest = tuple(label for label in range(20) if label != person)
    records = []
    settings = Settings("ml-cw", "fast", Request(remove=(person,), keep=rest))
    run_attack(classifier, plan_outputs(paths), tmp_path, settings, records.extend)
    statuses = [record.status for record in records]
    assert statuses.count("success") >= 4
    assert set(statuses) <= {"success", "unchanged"}  # on some photos no reader sees the person
    with torch.inference_mode():
        for record in (one for one in records if one.status == "success"):
            pixels = torch.from_numpy(read_photo(tmp_path / record.files["adversarial"]).rgb).permute(2, 0, 1)
            assert not bool(classifier([pixels / 255])[0, person] >= classifier.boundary[person])
