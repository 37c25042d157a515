"""Reports of the earlier schema, `mlperturb.report/1`, are read by every command that reads reports."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from PIL import Image
from support.models import TINY_LABELS, TINY_PIXELS

from mlperturb.errors import UsageError
from mlperturb.run.report import SCHEMA, read_report, read_schema


def distortion(rmsd: float) -> dict[str, float]:
    return {"rmsd": rmsd, "l2": 57 * rmsd, "linf": 7.0}


def record(source: Path, **more: object) -> dict[str, object]:
    """Return an image as version 0.1.0 wrote it: there are no readers, and nothing is unchanged."""
    nothing: dict[str, object] = {
        "source": str(source), "sha256": sha256(source.read_bytes()).hexdigest(), "width": 36, "height": 30,
        "status": "unreadable", "truth": None, "flip": [], "keep": [], "probabilities": None, "constraints": None,
        "distortion": None, "distortion_float": None, "success_float": None, "survival": None, "ranking": None,
        "cost": {"forward": 0, "backward": 0, "seconds": 0.0}, "files": {"adversarial": None, "map": None},
        "notes": [], "error": None,
    }  # fmt: skip
    return nothing | more


@pytest.fixture
def earlier(tiny, tmp_path) -> Path:
    """Return the folder of a report of the earlier schema, made by hand: a success and an unreadable file."""
    photo, broken, out = tmp_path / "a.png", tmp_path / "broken.png", tmp_path / "out"
    out.mkdir()
    Image.fromarray(TINY_PIXELS).save(photo)
    broken.write_bytes(b"nonsense")
    moved = np.clip(TINY_PIXELS.astype(int) + np.random.default_rng(0).integers(-7, 8, TINY_PIXELS.shape), 0, 255)
    Image.fromarray(moved.astype(np.uint8)).save(out / "a.adv.png")
    Image.fromarray(np.abs(moved - TINY_PIXELS).astype(np.uint8) * 36).save(out / "a.map.png")
    before = dict(zip(TINY_LABELS, (0.6, 0.4, 0.55, 0.45), strict=True))
    good = record(
        photo, status="success", flip=["cat"], keep=["dog", "potted plant", "hen"],
        truth={label: value >= 0.5 for label, value in before.items()},
        probabilities={"before": before, "float": before | {"cat": 0.49}, "after": before | {"cat": 0.48}},
        constraints={"held": 4, "total": 4, "violated": []}, distortion=distortion(4.3),
        distortion_float=distortion(4.2), success_float=True, cost={"forward": 30, "backward": 25, "seconds": 0.2},
        files={"adversarial": "a.adv.png", "map": "a.map.png"},
    )  # fmt: skip
    bad = record(broken, width=None, height=None, error={"type": "ImageError", "message": "not an image"})
    report = {
        "schema": "mlperturb.report/1",
        "version": "0.1.0",
        "settings": {
            "method": "ml-ddn", "budget": "fast", "flip": ["cat"], "keep": ["rest"], "add": [], "remove": [], "seed": 0,
            "device": "cpu", "passes": None, "max_rmsd": None, "max_linf": None, "survive": [], "region": None,
            "batch_size": "auto", "margin": 0.01,
        },
        "classifier": {
            "checkpoint": str(tiny), "sha256": sha256(tiny.read_bytes()).hexdigest(),
            "architecture": "shufflenet_v2_x0_5", "labels": list(TINY_LABELS), "thresholds": [0.5] * 4,
        },
        "images": [good, bad],
        "summary": {
            "images": 2, "success": 1, "partial": 0, "failed": 0, "unreadable": 1, "success_rate": 1.0,
            "rmsd": {"mean": 4.3, "median": 4.3}, "forward": 30, "backward": 25, "seconds": 0.5,
        },
    }  # fmt: skip
    (out / "report.json").write_text(json.dumps(report))
    return out


def test_the_report_made_by_hand_is_of_the_earlier_schema_and_not_of_this(earlier):
    report, folder = read_report(earlier)
    assert folder == earlier
    assert report["schema"] == "mlperturb.report/1"
    schema = json.loads((Path(__file__).parents[2] / "mlperturb" / "schemas" / "report-1.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(report)
    assert not jsonschema.Draft202012Validator(read_schema()).is_valid(report)
    assert not jsonschema.Draft202012Validator(read_schema()).is_valid({**report, "schema": SCHEMA})


def test_the_gallery_reads_the_earlier_schema(cli, earlier):
    code, _, err = cli("gallery", earlier, "--quiet")
    assert (code, err.count("\n")) == (1, 1)  # a picture is missing
    assert "broken.png" in err
    page = (earlier / "index.html").read_text()
    assert page.count("<article") == 2
    assert page.count("data:image/webp") == 3
    assert '<dd class="success">1</dd>' in page
    assert "unchanged" not in page.split("<main")[1]


def test_figures_reads_the_earlier_schema(cli, earlier):
    code, _, err = cli("figures", earlier)
    assert (code, err) == (0, "")
    names = sorted(path.name for path in (earlier / "figures").iterdir())
    assert names == ["case-a.png", "histogram-cat.png"]


def test_jpeg_defend_reads_the_earlier_schema(cli, earlier):
    code, text, err = cli("jpeg-defend", earlier, "--quality", "50,90", "--json", "--device", "cpu")
    assert (code, err) == (0, "")
    rows = json.loads(text)["qualities"]
    assert [(row["images"], row["clean_images"]) for row in rows] == [(1, 1), (1, 1)]


@pytest.mark.parametrize("schema", ["mlperturb.report/0", "mlperturb.report/3", "mlperturb.journal/1", None])
def test_reports_of_unknown_schemas_are_refused(cli, earlier, schema):
    path = earlier / "report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": schema}))
    with pytest.raises(UsageError, match=r"expected a file of schema mlperturb\.report/2"):
        read_report(earlier)
    for command in ("gallery", "figures", "jpeg-defend"):
        code, stdout, stderr = cli(command, earlier)
        assert (code, stdout, stderr.count("\n")) == (2, "", 1)


def test_a_journal_or_a_rerun_of_the_earlier_schema_is_replaced_when_asked(cli, earlier, tiny, tmp_path):
    arguments = ["attack", tmp_path / "a.png", "--flip", "cat", "--keep", "rest", "--budget", "fast", "--checkpoint",
                 tiny, "--out", earlier, "--device", "cpu", "--quiet"]  # fmt: skip
    code, _, err = cli(*arguments)
    assert code == 2
    assert "--overwrite" in err
    code, _, err = cli(*arguments, "--overwrite")
    assert (code, err) == (0, "")
    report, _ = read_report(earlier)
    assert report["schema"] == SCHEMA
    jsonschema.Draft202012Validator(read_schema()).validate(report)
