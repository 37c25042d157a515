from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlperturb.errors import LabelError, UsageError
from mlperturb.labels import Request, find_label, parse_request, split_names

LABELS = ("aeroplane", "Cat", "dog", "person", "potted plant", "sheep")


def test_names_are_split_at_commas_and_may_be_repeated():
    assert split_names(["cat, dog ,", " person", ",,", ""]) == ["cat", "dog", "person"]


@pytest.mark.parametrize("name", ["Cat", "cat", "CAT", "cAt"])
def test_a_name_is_found_in_any_case(name):
    assert find_label(name, LABELS) == 1


def test_the_exact_case_wins_over_a_label_that_differs_in_case_alone():
    assert [find_label(name, ("Cat", "cat")) for name in ("Cat", "cat", "CAT")] == [0, 1, 0]


def test_an_unknown_name_lists_the_close_matches_as_the_model_spells_them():
    with pytest.raises(LabelError, match=r"unknown label 'catt': did you mean Cat\?"):
        find_label("catt", LABELS)


def test_an_unknown_name_without_close_matches_lists_labels():
    with pytest.raises(LabelError, match=r"expected one of aeroplane, Cat, dog, person, potted plant, sheep$"):
        find_label("zzzzzz", LABELS)


def test_a_long_list_of_labels_is_cut():
    with pytest.raises(LabelError, match=r"label0, .*label24, \.\.\.$"):
        find_label("zzzzzz", [f"label{number}" for number in range(80)])


def test_names_become_numbers_in_the_order_given():
    request = parse_request(
        LABELS, flip=["dog,cat"], keep=["PERSON"], add=["sheep", "potted plant"], remove=["aeroplane"]
    )
    assert request == Request(flip=(2, 1), keep=(3,), add=(5, 4), remove=(0,))


def test_a_label_repeated_in_one_set_counts_once():
    assert parse_request(LABELS, flip=["cat,dog", "Cat"]).flip == (1, 2)


@pytest.mark.parametrize(
    ("one", "other"), [("flip", "keep"), ("flip", "add"), ("keep", "remove"), ("add", "remove"), ("keep", "add")]
)
def test_a_label_in_two_sets_is_refused_with_both_named(one, other):
    with pytest.raises(LabelError, match=f"'dog' in both `{one}` and `{other}`"):
        parse_request(LABELS, **{one: ["dog"], other: ["cat", "DOG"]})


@pytest.mark.parametrize("sets", [{}, {"flip": [""]}, {"keep": ["cat"]}, {"keep": ["rest"]}, {"flip": [","]}])
def test_a_request_that_changes_nothing_is_refused(sets):
    with pytest.raises(UsageError, match="nothing to change"):
        parse_request(LABELS, **sets)


def test_all_is_every_label_not_named_elsewhere():
    assert parse_request(LABELS, flip=["ALL"]).flip == tuple(range(6))
    request = parse_request(LABELS, flip=["all"], keep=["cat"], add=["dog"])
    assert request == Request(flip=(0, 3, 4, 5), keep=(1,), add=(2,))
    assert parse_request(LABELS, flip=["sheep,all"]).flip == tuple(range(6))


def test_all_of_no_remaining_label_changes_nothing():
    with pytest.raises(UsageError, match="nothing to change"):
        parse_request(LABELS, flip=["all"], keep=list(LABELS))


def test_rest_is_every_label_not_named_elsewhere():
    request = parse_request(LABELS, flip=["cat"], keep=["Rest"], remove=["dog"])
    assert request == Request(flip=(1,), keep=(0, 3, 4, 5), remove=(2,), keep_rest=True)


def test_all_and_rest_contradict_each_other():
    with pytest.raises(UsageError, match="expected `flip` all or `keep` rest, got both"):
        parse_request(LABELS, flip=["all"], keep=["rest"])


def test_any_is_non_targeted_and_stands_alone():
    assert parse_request(LABELS, flip=["Any"], keep=["cat"]) == Request(keep=(1,), any_label=True)
    for flip in (["any,dog"], ["any", "all"]):
        with pytest.raises(UsageError, match="expected `flip` any alone"):
            parse_request(LABELS, flip=flip)


def test_any_leaves_the_rest_free_to_flip_and_says_that_it_is_to_be_kept():
    assert parse_request(LABELS, flip=["any"], keep=["rest"]) == Request(any_label=True, keep_rest=True)


def test_any_needs_a_label_that_may_flip():
    with pytest.raises(UsageError, match="expected a label left for `flip` any"):
        parse_request(LABELS, flip=["any"], keep=list(LABELS))


def test_a_label_called_like_a_key_word_is_that_label():
    labels = ("Any", "all", "rest", "cat")
    assert parse_request(labels, flip=["any"], keep=["rest"]) == Request(flip=(0,), keep=(2,))
    assert parse_request(labels, flip=["all"]).flip == (1,)


@given(
    st.lists(st.text(st.characters(exclude_characters=","), min_size=1), min_size=1, max_size=8, unique_by=str.casefold)
    .map(lambda names: [name for name in names if name.strip() == name and name])
    .filter(bool)
)
def test_every_label_is_found_by_its_own_name_whatever_its_characters(labels):
    for number, label in enumerate(labels):
        assert find_label(label, labels) == number
    request = parse_request(labels, add=[",".join(labels)])
    assert request.add == tuple(range(len(labels)))


@given(st.lists(st.text(max_size=12), max_size=4), st.lists(st.text(max_size=12), max_size=4))
def test_any_text_gives_disjoint_sets_or_an_error_of_ours(flip, keep):
    try:
        request = parse_request(LABELS, flip=[*flip, "dog"], keep=keep)
    except UsageError:
        return
    assert 2 in request.flip
    assert not set(request.flip) & set(request.keep)
