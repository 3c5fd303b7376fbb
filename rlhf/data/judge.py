"""An independent judge of answers: it is fitted on texts that no stage sees, and the policy never sees it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.config.errors import ConfigError
from rlhf.config.schema import DataConfig
from rlhf.data.sources import source_module

MIN_TEXTS = 2
INVERSE_PENALTY = 1.0
TOKEN = r"(?u)\b\w[\w']*\b|[!?]"


@dataclass(frozen=True, slots=True)
class Judge:
    """Says whether a text is positive. `accuracy` is its share of right answers on texts it was not fitted on."""

    model: Any
    accuracy: float

    def positive(self, texts: Sequence[str]) -> list[bool]:
        """Whether each text reads as positive."""
        if not texts:
            return []
        return [bool(label) for label in self.model.predict(list(texts))]


def fit_judge(data: DataConfig) -> Judge:
    """Fit TF-IDF of words and word pairs with logistic regression on the judge's texts of `data.judge`.

    The accuracy is measured on the source's held-out texts, which are not fitted on. Deterministic. Raises ConfigError
    if `data.judge` names no source that supplies such texts.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    if data.judge is None:
        raise ConfigError("data.judge is not set: name a source with texts for a judge: data.judge=film_reviews")
    module = source_module(data.judge, key="data.judge")
    if not hasattr(module, "judge_texts"):
        raise ConfigError(f"data.judge={data.judge}: this kind of source has no texts for a judge; set data.judge=null")
    texts, labels = module.judge_texts(held_out=False)
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=MIN_TEXTS, token_pattern=TOKEN)
    model = make_pipeline(words, LogisticRegression(C=INVERSE_PENALTY, max_iter=1000))
    model.fit(texts, labels)
    accuracy = float(model.score(*module.judge_texts(held_out=True)))
    return Judge(model=model, accuracy=accuracy)
