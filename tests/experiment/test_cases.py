from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlperturb.attacks.methods import METHODS
from mlperturb.errors import LabelError, UsageError
from mlperturb.experiment.cases import Case, Protocol, align, choose, parse_cases, parse_variants
from mlperturb.photos.datasets import Dataset

LABELS = ("person", "sheep", "cat", "dog")
TRUTH = np.random.default_rng(0).choice(np.array([-1, -1, 0, 1], dtype=np.int8), (200, 4))
DATA = Dataset(tuple(Path(f"{number}.png") for number in range(200)), LABELS, TRUTH)


def protocol(*cases: Case, images: int = 1000, seed: int = 0) -> Protocol:
    return Protocol(cases, parse_variants(["all"], "fast"), images=images, seed=seed)


def cases(*names: str, reduce=(), augment=()):
    return parse_cases(names, reduce, augment, LABELS)


def test_random_flips_one_positive_and_one_negative_label_and_keeps_the_rest():
    (case,) = cases("random")
    chosen = choose(case, DATA, range(200), protocol(case))
    assert set(chosen) == {row for row in range(200) if (TRUTH[row] > 0).any() and (TRUTH[row] < 0).any()}
    for row, request in chosen.items():
        assert sorted(TRUTH[row, list(request.flip)]) == [-1, 1]
        assert sorted(request.flip + request.keep) == [0, 1, 2, 3]
    assert len({request.flip for request in chosen.values()}) == 12  # every pair comes up


def test_extreme_flips_all_labels_of_any_photo():
    (case,) = cases("extreme")
    chosen = choose(case, DATA, [3, 5, 8], protocol(case))
    assert set(chosen) == {3, 5, 8}
    assert all(request.flip == (0, 1, 2, 3) and request.keep == () for request in chosen.values())


@pytest.mark.parametrize(("name", "options"), [("person", {}), ("reduce person", {"reduce": ["Person"]})])
def test_person_takes_photos_with_a_person_and_something_else(name, options):
    (case,) = cases(name) if not options else cases(**options)
    assert replace(case, name="x") == Case("x", "reduce", 0)
    chosen = choose(case, DATA, range(200), protocol(case))
    assert set(chosen) == {row for row in range(200) if TRUTH[row, 0] > 0 and (TRUTH[row] > 0).sum() >= 2}
    assert {(request.flip, request.keep) for request in chosen.values()} == {((0,), (1, 2, 3))}


def test_sheep_takes_photos_that_are_known_to_have_none():
    (sheep,), (augmented,) = cases("sheep"), cases(augment=["sheep"])
    assert (sheep.kind, sheep.label) == (augmented.kind, augmented.label) == ("augment", 1)
    assert set(choose(sheep, DATA, range(200), protocol(sheep))) == set(np.flatnonzero(TRUTH[:, 1] < 0))


def test_the_draw_depends_on_the_seed_and_the_case_alone():
    one, other = cases("random", "person")
    rows = list(range(200))
    drawn = choose(one, DATA, rows, protocol(one, images=9))
    assert drawn == choose(one, DATA, rows, protocol(other, one, images=9))
    assert list(drawn) == list(choose(one, DATA, rows, protocol(one, images=40)))[:9]
    assert list(drawn) != list(choose(one, DATA, rows, protocol(one, images=9, seed=1)))
    assert set(drawn) <= set(rows)
    assert len(drawn) == 9


def test_only_photos_that_the_classifier_gets_right_are_drawn():
    (case,) = cases("extreme")
    assert set(choose(case, DATA, [4, 9], protocol(case))) == {4, 9}
    assert choose(case, DATA, [], protocol(case)) == {}


def test_cases_are_read_once_each_and_wrong_ones_are_told():
    assert [case.name for case in cases("random,extreme", "random", reduce=["cat,dog"])] == [
        "random",
        "extreme",
        "reduce cat",
        "reduce dog",
    ]
    with pytest.raises(UsageError, match="unknown case 'rnd'"):
        cases("rnd")
    with pytest.raises(LabelError, match="shep"):
        cases(augment=["shep"])
    with pytest.raises(UsageError, match="at least one case"):
        cases()


def test_methods_are_read_with_their_options():
    assert [variant.name for variant in parse_variants(["all"], "fast")] == list(METHODS)
    _, pinv = parse_variants(["ml-dp,ml-dp:solver=pinv:space=logit"], "fast")
    assert (pinv.method, pinv.options) == ("ml-dp", {"solver": "pinv", "space": "logit"})
    for wrong, message in (
        ("nope", "unknown method"),
        ("ml-cw:solver=pinv", "option of ml-dp"),
        ("ml-dp:solver=x", "unknown `solver`"),
        ("ml-dp:solver", "METHOD:OPTION=VALUE"),
        ("", "at least one method"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_variants([wrong], "fast")
    with pytest.raises(UsageError, match="unknown budget"):
        parse_variants(["all"], "slow")


def test_a_data_set_is_put_in_the_classifiers_order_of_labels():
    aligned = align(DATA, ("dog", "cat", "sheep", "person"))
    assert np.array_equal(aligned.truth, TRUTH[:, ::-1])
    assert aligned.labels == ("dog", "cat", "sheep", "person")
    with pytest.raises(UsageError, match="'hen' is not in both"):
        align(DATA, ("dog", "cat", "sheep", "hen"))
    with pytest.raises(UsageError, match="'dog' is not in both"):
        align(DATA, ("cat", "sheep", "person"))
