from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlperturb.errors import LabelError, UsageError
from mlperturb.labels import Categories, Request, find_label, find_like, parse_request, split_names

LABELS = ("aeroplane", "Cat", "dog", "person", "potted plant", "sheep")


def test_names_are_split_at_commas_and_may_be_repeated():
    assert split_names(["cat, dog ,", " person", ",,", ""]) == ["cat", "dog", "person"]


@pytest.mark.parametrize("name", ["Cat", "cat", "CAT", "cAt"])
def test_a_name_is_found_in_any_case(name):
    assert find_label(name, LABELS) == 1


def test_the_exact_case_wins_over_a_label_that_differs_in_case_alone():
    assert [find_label(name, ("Cat", "cat")) for name in ("Cat", "cat")] == [0, 1]


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


TAGGED = Categories(("0", "0", "4", "0", "9", "4"), {"0": "general", "4": "character"})


def test_a_category_stands_for_its_labels_that_are_not_named_elsewhere():
    request = parse_request(
        LABELS,
        flip=["person"],
        keep=["category:GENERAL"],
        remove=["category:character, potted plant"],
        categories=TAGGED,
    )
    assert request == Request(flip=(3,), keep=(0, 1), remove=(4, 2, 5))


def test_a_category_goes_by_its_number_too_and_a_label_of_that_name_goes_first():
    assert parse_request(LABELS, flip=["category:9"], categories=TAGGED).flip == (4,)
    odd = (*LABELS[:5], "category:4")
    assert parse_request(odd, flip=["category:4"], categories=TAGGED).flip == (5,)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"flip": ["category:x"]}, r"unknown category 'x': expected 0 \(general\), 4 \(character\), 9"),
        ({"flip": ["category:0"], "keep": ["category:general"]}, "'aeroplane' in both `flip` and `keep`"),
    ],
)
def test_a_wrong_category_is_refused(sets, message):
    with pytest.raises(LabelError, match=message):
        parse_request(LABELS, **sets, categories=TAGGED)
    with pytest.raises(LabelError, match="expected none: the labels have no categories"):
        parse_request(LABELS, flip=["category:0"])


def test_present_keeps_the_labels_that_a_photo_has():
    request = parse_request(LABELS, flip=["dog"], keep=["present", "sheep"])
    assert request == Request(flip=(2,), keep=(5,), keep_present=True)
    with pytest.raises(UsageError, match="expected `flip` all or `keep` present, got both"):
        parse_request(LABELS, flip=["all"], keep=["present"])
    with pytest.raises(LabelError, match="'present' is not a label: expected it only in `keep`"):
        parse_request(LABELS, flip=["present"])
    assert parse_request(("present", "b"), flip=["b"], keep=["present"]) == Request(flip=(1,), keep=(0,))


def test_labels_are_found_by_a_part_of_their_name_or_like_it():
    labels = ("cat girl", "1girl", "girl", "boy", "girls")
    assert find_like("GIRL", labels, range(5)) == [2, 4, 0, 1]
    assert find_like("girl", labels, [0, 1]) == [0, 1]
    assert find_like("bouy", labels, range(5)) == [3]
    with pytest.raises(LabelError, match="no label is like 'zebra', among 5"):
        find_like("zebra", labels, range(5))


def test_a_name_that_several_labels_have_but_for_case_is_refused_and_an_exact_name_is_found():
    labels = ("a", "A", "ab")
    assert [find_label(name, labels) for name in ("a", "A", "AB")] == [0, 1, 2]
    with pytest.raises(LabelError, match="'SS' is several labels: expected ss or ß"):
        find_label("SS", ("ss", "ß"))
