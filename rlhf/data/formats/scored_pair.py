"""Two answers with scores; the one with the higher score is the better one (WebGPT comparisons, SHP)."""

from rlhf.data.formats import SHARED, Cells, Draft, DroppedRow

COLUMNS = {
    "prompt": "a text, or messages",
    "answer_0": "the first answer",
    "answer_1": "the second answer",
    "score_0": "the first answer's score",
    "score_1": "the second answer's score",
    **SHARED,
}
TIE = "the scores tie"


def read(row: Cells) -> Draft:
    """Rows whose scores are equal prefer neither answer and are dropped."""
    row.need("answer_0", "answer_1", "score_0", "score_1")
    messages, answers = row.answered("answer_0", "answer_1")
    scores = row.number("score_0"), row.number("score_1")
    if scores[0] == scores[1]:
        raise DroppedRow(TIE)
    better = int(scores[1] > scores[0])
    return Draft(messages=messages, chosen=answers[better], rejected=answers[1 - better])
