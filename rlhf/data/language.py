"""A guess at the language of a text: by its writing system, and for Latin letters by its commonest words."""

import re
from collections import Counter
from collections.abc import Iterable

_SCRIPTS = {
    "Japanese": r"[\u3040-\u30ff]",
    "Korean": r"[\uac00-\ud7af\u1100-\u11ff]",
    "Chinese": r"[\u4e00-\u9fff\u3400-\u4dbf]",
    "Cyrillic": r"[\u0400-\u04ff]",
    "Arabic": r"[\u0600-\u06ff]",
    "Hebrew": r"[\u0590-\u05ff]",
    "Greek": r"[\u0370-\u03ff]",
    "Devanagari": r"[\u0900-\u097f]",
    "Thai": r"[\u0e00-\u0e7f]",
}
_WORDS = {
    "English": "the of and to in is that it for you with this was are not be on as have what how",
    "German": "der die das und ist nicht ein eine zu mit den von ich auf es wie für im sich auch",
    "French": "le la les des et est un une que pas pour dans qui ce sur au avec vous je il",
    "Spanish": "el la los que de y en un una es por con para no se lo como más las del",
    "Portuguese": "o os que de e em um uma não para com se do da no na por mais como você",
    "Italian": "il che di e la un una non per con è sono del della le gli in si come più",
    "Dutch": "de het een en van is niet dat op te voor met zijn ik je er aan ook maar bij",
}
_LETTER = re.compile(r"[^\W\d_]")
_LATIN_WORD = re.compile(r"[a-zà-ÿ]+")
_COMMON = {language: frozenset(words.split()) for language, words in _WORDS.items()}


def language_of(text: str) -> str:
    """The likeliest language, the writing system where it has many, or "other"; "none" without letters.

    Kana make a text Japanese and Hangul Korean even among Chinese characters, which all three share.
    """
    text = text[:2000].lower()
    letters = len(_LETTER.findall(text))
    if not letters:
        return "none"
    for name, pattern in _SCRIPTS.items():
        share = len(re.findall(pattern, text)) / letters
        if share > (0.1 if name in ("Japanese", "Korean") else 0.3):
            return name
    words = Counter(_LATIN_WORD.findall(text))
    hits = {name: sum(words[word] for word in common) for name, common in _COMMON.items()}
    best = max(hits, key=lambda name: hits[name])
    return best if hits[best] else "other"


def language_shares(texts: Iterable[str]) -> dict[str, float]:
    """The share of each language among the texts, the commonest first."""
    counted = Counter(language_of(text) for text in texts)
    total = sum(counted.values())
    return {name: number / total for name, number in counted.most_common()}
