from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mlperturb.errors import DatasetError
from mlperturb.photos.datasets import VOC_LABELS, Dataset, read_coco, read_csv, read_voc


@pytest.fixture
def devkit(tmp_path) -> Path:
    """Make a VOCdevkit of three photos and two labels; the photos are empty files, which no test here opens."""
    sets = tmp_path / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main"
    photos = tmp_path / "VOCdevkit" / "VOC2007" / "JPEGImages"
    sets.mkdir(parents=True)
    photos.mkdir()
    for name in ("000005", "000007", "000009"):
        (photos / f"{name}.jpg").touch()
    (sets / "trainval.txt").write_text("000005\n000007\n000009\n\n")
    (sets / "dog_trainval.txt").write_text("000005  1\n000007 -1\n000009  0\n")
    (sets / "cat_trainval.txt").write_text("000009 -1\n000007  1\n000005 -1\n")  # in another order
    (sets / "val.txt").write_text("000007\n")
    (sets / "dog_val.txt").write_text("000007 -1\n")
    return tmp_path / "VOCdevkit"


def test_the_labels_of_voc_are_its_twenty_classes_in_order():
    assert len(set(VOC_LABELS)) == 20
    assert list(VOC_LABELS) == sorted(VOC_LABELS)


def test_a_split_is_read_with_difficult_labels_as_zero(devkit):
    dataset = read_voc(devkit, "2007", "trainval")
    assert dataset.labels == ("cat", "dog")
    assert [path.name for path in dataset.paths] == ["000005.jpg", "000007.jpg", "000009.jpg"]
    assert dataset.truth.tolist() == [[-1, 1], [1, -1], [-1, 0]]
    assert dataset.truth.dtype == np.int8
    assert all(path.is_file() for path in dataset.paths)


def test_the_folder_above_the_devkit_will_do(devkit):
    assert read_voc(devkit.parent, "2007", "trainval").paths == read_voc(devkit, "2007", "trainval").paths


def test_a_split_does_not_take_the_label_files_of_another(devkit):
    dataset = read_voc(devkit, "2007", "val")
    assert (dataset.labels, len(dataset)) == (("dog",), 1)


def test_a_missing_year_or_split_is_a_dataset_error(devkit):
    with pytest.raises(DatasetError, match="expected a folder VOC2012"):
        read_voc(devkit, "2012", "trainval")
    with pytest.raises(DatasetError, match=r"cannot read .*test\.txt"):
        read_voc(devkit, "2007", "test")
    with pytest.raises(DatasetError, match=r"expected a split of VOC2007: trainval, val$"):
        read_voc(devkit, "2007", "test")
    with pytest.raises(DatasetError, match=r"cannot read .*none\.csv: No such file or directory$"):
        read_csv(devkit, devkit / "none.csv")


@pytest.mark.parametrize("line", ["000005", "000005 2", "000005 yes", "000042 1", "000005 1 1"])
def test_a_line_that_is_not_a_known_name_and_a_sign_is_shown(devkit, line):
    path = devkit / "VOC2007" / "ImageSets" / "Main" / "dog_trainval.txt"
    path.write_text(f"000007 1\n{line}\n")
    with pytest.raises(DatasetError, match=rf"dog_trainval.txt: expected .*got '{line}'"):
        read_voc(devkit, "2007", "trainval")


def test_a_split_without_label_files_is_a_dataset_error(devkit):
    (devkit / "VOC2007" / "ImageSets" / "Main" / "dog_val.txt").unlink()
    with pytest.raises(DatasetError, match=r"expected files LABEL_val\.txt"):
        read_voc(devkit, "2007", "val")


def test_missing_photos_are_counted_and_the_first_is_named(devkit):
    for name in ("000007", "000009"):
        (devkit / "VOC2007" / "JPEGImages" / f"{name}.jpg").unlink()
    with pytest.raises(DatasetError, match=r"names 2 missing photos, the first .*000007\.jpg"):
        read_voc(devkit, "2007", "trainval")


@pytest.fixture
def write_table(tmp_path):
    def write(text: str | bytes) -> Path:
        (tmp_path / "a.jpg").touch()
        (tmp_path / "b, c.jpg").touch()
        path = tmp_path / "labels.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_a_table_of_labels_is_read_with_minus_one_as_difficult(write_table, tmp_path):
    table = write_table('image,cat, big dog\r\na.jpg,1,0\r\n\r\n"b, c.jpg",-1, 1\r\n')
    dataset = read_csv(tmp_path, table)
    assert dataset.labels == ("cat", "big dog")
    assert dataset.paths == (tmp_path / "a.jpg", tmp_path / "b, c.jpg")
    assert dataset.truth.tolist() == [[1, -1], [0, 1]]


def test_a_table_may_start_with_a_byte_order_mark(write_table, tmp_path):
    assert read_csv(tmp_path, write_table(b"\xef\xbb\xbfimage,cat\na.jpg,1\n")).labels == ("cat",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("image\na.jpg\n", "expected a header"),
        ("image,cat,cat\na.jpg,1,0\n", "distinct labels"),
        ("image,cat\n", "names no photo"),
        ("image,cat\na.jpg\n", "expected a file name and 1 values"),
        ("image,cat\na.jpg,1,0\n", "expected a file name and 1 values"),
        ("image,cat\na.jpg,2\n", "expected a file name and 1 values"),
        ("image,cat\nnone.jpg,1\n", "1 missing photos, the first .*none.jpg"),
        (b"\xff\xfe\x00", "cannot read"),
    ],
)
def test_a_table_that_does_not_fit_its_header_is_a_dataset_error(write_table, tmp_path, text, message):
    with pytest.raises(DatasetError, match=message):
        read_csv(tmp_path, write_table(text))


def test_a_missing_table_is_a_dataset_error(tmp_path):
    with pytest.raises(DatasetError, match="cannot read"):
        read_csv(tmp_path, tmp_path / "none.csv")


COCO: dict = {
    "info": {"year": 2017},
    "categories": [{"id": 18, "name": "dog", "supercategory": "animal"}, {"id": 1, "name": "person"}],
    "images": [
        {"id": 139, "file_name": "a.jpg", "width": 4},
        {"id": 9, "file_name": "sub/b.jpg"},
        {"id": 25, "file_name": "c.jpg"},
    ],
    "annotations": [
        {"id": 3, "image_id": 9, "category_id": 18, "iscrowd": 0, "bbox": [0, 0, 1, 1]},
        {"id": 4, "image_id": 9, "category_id": 18, "iscrowd": 0},
        {"id": 5, "image_id": 139, "category_id": 1, "iscrowd": 1},
    ],
}


@pytest.fixture
def write_coco(tmp_path):
    def write(content: object) -> Path:
        (tmp_path / "sub").mkdir()
        for name in ("a.jpg", "sub/b.jpg", "c.jpg"):
            (tmp_path / name).touch()
        path = tmp_path / "instances_val2017.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return path

    return write


def test_cocos_instances_are_read_as_labels_in_the_order_of_their_numbers(write_coco, tmp_path):
    dataset = read_coco(tmp_path, write_coco(COCO))
    assert dataset.labels == ("person", "dog")
    assert dataset.paths == (tmp_path / "a.jpg", tmp_path / "sub" / "b.jpg", tmp_path / "c.jpg")
    assert dataset.truth.tolist() == [[1, -1], [-1, 1], [-1, -1]]  # a crowd counts; the last photo has no label
    assert dataset.truth.dtype == np.int8


def test_cocos_photos_without_a_single_annotation_have_no_labels(write_coco, tmp_path):
    assert (read_coco(tmp_path, write_coco(COCO | {"annotations": []})).truth == -1).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot read"),
        (b"{", "cannot read"),
        (b"\xff\xfe\x00{", "cannot read"),
        (b"[" * 100_000, "cannot read"),
        (b'{"images": ' + b"9" * 5000 + b"}", "cannot read"),
        ([], "expected an object with a list `categories`"),
        ({}, "expected an object with a list `categories`"),
        (COCO | {"images": {}}, "expected an object with a list `images`"),
        (COCO | {"annotations": None}, "expected an object with a list `annotations`"),
        (COCO | {"categories": []}, "expected distinct names in `categories`, got 0"),
        (COCO | {"categories": [{"id": 1, "name": "x"}, {"id": 18, "name": "x"}]}, "expected distinct names"),
        (COCO | {"categories": [{"id": 1, "name": "x"}, {"id": 1, "name": "y"}]}, "expected each `id` once"),
        (COCO | {"categories": [{"id": 1, "name": 5}]}, r"`name` \(str\) in entry 0 of `categories`"),
        (COCO | {"categories": [5]}, "in entry 0 of `categories`"),
        (COCO | {"images": [{"id": True, "file_name": "a.jpg"}]}, r"expected `id` \(int\)"),
        (COCO | {"images": [{"id": [], "file_name": "a.jpg"}]}, r"expected `id` \(int\)"),
        (COCO | {"images": [*COCO["images"], COCO["images"][0]]}, "expected each `id` once"),
        (COCO | {"images": [{"id": 9, "file_name": "../a.jpg"}]}, "expected `file_name` relative to"),
        (COCO | {"images": [{"id": 9, "file_name": "/etc/passwd"}]}, "expected `file_name` relative to"),
        (COCO | {"images": [], "annotations": []}, "names no photo"),
        (COCO | {"images": [{"id": 9, "file_name": "n\x00.jpg"}], "annotations": []}, "1 missing photos"),
        (COCO | {"images": [{"id": n, "file_name": "a.jpg"} for n in (9, 139)]}, r"names a\.jpg twice"),
        (COCO | {"annotations": [{"image_id": 9}]}, "in entry 0 of `annotations`"),
        (COCO | {"annotations": [{"image_id": 8, "category_id": 1}]}, "photo 8 and category 1, not both known"),
        (COCO | {"annotations": [{"image_id": 9, "category_id": 2}]}, "photo 9 and category 2, not both known"),
    ],
)
def test_instances_that_are_not_as_coco_has_them_are_a_dataset_error(write_coco, tmp_path, content, message):
    with pytest.raises(DatasetError, match=message) as caught:
        read_coco(tmp_path, write_coco(content))
    assert len(str(caught.value).splitlines()) == 1


def _dataset(names: str, labels: tuple[str, ...] = ("x",)) -> Dataset:
    truth = np.arange(len(names), dtype=np.int8)[:, None].repeat(len(labels), 1)
    return Dataset(tuple(Path(name) for name in names), labels, truth)


@pytest.mark.parametrize("rows", [[2, 0], np.array([2, 0]), []])
def test_a_subset_keeps_photos_and_labels_together(rows):
    subset = _dataset("abc").subset(rows)
    assert [path.name for path in subset.paths] == ["c", "a"][: len(rows)]
    assert subset.truth.tolist() == [[2], [0]][: len(rows)]
    assert subset.truth.shape == (len(rows), 1)


def test_data_sets_of_the_same_labels_can_be_joined():
    both = _dataset("ab") + _dataset("c")
    assert [path.name for path in both.paths] == ["a", "b", "c"]
    assert both.truth[:, 0].tolist() == [0, 1, 0]


def test_data_sets_of_other_labels_cannot_be_joined():
    with pytest.raises(DatasetError, match="same labels"):
        _dataset("a") + _dataset("b", ("y",))


def test_a_photo_named_twice_is_refused(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "table.csv").write_text("image,cat\na.jpg,1\na.jpg,0\n")
    with pytest.raises(DatasetError, match=r"names a\.jpg twice"):
        read_csv(tmp_path, tmp_path / "table.csv")


def test_a_table_that_is_none_is_refused(tmp_path):
    (tmp_path / "table.csv").write_text('image,cat\n"' + "x\n" * 200_000)
    with pytest.raises(DatasetError, match="not a table of comma-separated values"):
        read_csv(tmp_path, tmp_path / "table.csv")
