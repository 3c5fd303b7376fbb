"""format=auto: which format the rows of a source have, told by their columns and by what is in them.

The first rows of every file are read in every format. A format fits where most rows have its columns. Of those that
fit, the ones that make nothing of the values are left out, and those that would leave a column unread which another
one reads. What remains must be one.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, product
from typing import Any

from rlhf.config.errors import DataError
from rlhf.config.schema import SourceConfig
from rlhf.config.terminal import shown_name
from rlhf.data.bad_rows import BadRows
from rlhf.data.conversation import Refused
from rlhf.data.formats import BadRow, Cells, DroppedRow, Format, conversations, format_module, format_names, same_turns
from rlhf.data.text_files import Rows

# Rows of a file that are looked at, and those among which these are looked for where some cannot be read.
_ROWS, _TRIED = 50, 1000
# Formats without an answer: chosen where no other one fits.
_PLAIN = ("prompt", "text")
_TRANSCRIPT = "transcript"
_CONVERSATIONAL, _PREFERENCE = "conversational", "preference"
_MESSAGES = "messages"
# What others call the columns, for what is proposed and for what is not left unread without a word.
_PROMPTS = ("prompt", "question", "query", "instruction", "input", "problem", "post", "title")
_ANSWERS = (
    *("response", "answer", "output", "reply", "solution", "summary", "target", "completion", "completions"),
    *("chosen", "text"),
)
_ABOUT = ("input", "context")
_BETTER = ("chosen", "preferred_output", "preferred", "chosen_response", "accepted")
_WORSE = ("rejected", "non_preferred_output", "non_preferred", "dispreferred", "rejected_response")
_TURNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")
_BESIDE = {"system": ("system", "system_prompt"), "tools": ("tools", "functions")}
_PROPOSED = 20
_CONVERSATIONS = "conversations"


class _MissingError(BadRow):
    """A row without a column that a format needs."""


@dataclass(frozen=True, slots=True)
class _Probe(Cells):
    """Cells that tell a missing column from a bad value."""

    def value(self, name: str) -> Any:
        """A column that must be there."""
        if not self.has(name):
            raise _MissingError(name)
        return Cells.value(self, name)


@dataclass(frozen=True, slots=True)
class _Sample:
    """The first rows of a file, and what is wrong with those that cannot be read."""

    name: str
    rows: list[Mapping[str, Any]]
    bad: BadRows

    @property
    def columns(self) -> list[str]:
        """The columns of the rows that are not null in all of them, in their order."""
        return list(dict.fromkeys(str(key) for row in self.rows for key, value in row.items() if value is not None))


@dataclass(slots=True)
class _Tried:
    """By format: the rows that have its columns, those that can be read, and its columns that are there."""

    rows: int = 0
    there: Counter[str] = field(default_factory=Counter)
    read: Counter[str] = field(default_factory=Counter)
    used: dict[str, set[str]] = field(default_factory=dict)

    def most(self, counted: Counter[str], form: str) -> bool:
        """Whether that is so of half of the rows."""
        return 2 * counted[form] >= self.rows


def choose_format(files: Iterable[tuple[str, Rows]], source: SourceConfig, *, name: str) -> tuple[SourceConfig, str]:
    """The source with its format instead of auto, and a sentence that says why it is that one.

    `files` are the rows by file. Raises DataError where no format fits, or several do.
    """
    key = f"data.sources.{name}"
    samples = [_sample(file, rows) for file, rows in files]
    filled = [sample for sample in samples if sample.rows]
    if not filled:
        bad = next((sample.bad for sample in samples if sample.bad.number), None)
        told = f"none of the first rows can be read:\n  {bad.listed()}" if bad else "there are no rows"
        raise DataError(f"{key} ({shown_name(source.path or source.kind)}) has no usable row: {told}")
    found = _fitting(filled, source)
    if not found and _MESSAGES not in source.columns and all(_CONVERSATIONS in one.columns for one in filled):
        # As ShareGPT calls the messages.
        renamed = replace(source, columns={**source.columns, _MESSAGES: _CONVERSATIONS})
        source, found = renamed, _fitting(filled, renamed)
    if len(found) == 1:
        (form,) = found
        return replace(source, format=form), f"format={form}, for the columns {', '.join(found[form])}"
    raise DataError(_undecided(found, filled, source, key))


def _sample(name: str, rows: Rows) -> _Sample:
    found = _Sample(name, [], BadRows())
    for entry in islice(rows, _TRIED):
        if isinstance(entry, Refused):
            found.bad.add(entry.where, entry.reason)
        elif isinstance(entry[1], Mapping):
            found.rows.append(entry[1])
        else:
            found.bad.add(entry[0], f"must be an object with columns, not {type(entry[1]).__name__}")
        if len(found.rows) == _ROWS:
            break
    return found


def _fitting(samples: Sequence[_Sample], source: SourceConfig) -> dict[str, list[str]]:
    """The formats that may be meant, each with its columns in the rows, as they are called there."""
    forms = {form: format_module(form, key="format") for form in format_names()}
    forms = {form: module for form, module in forms.items() if source.columns.keys() <= module.COLUMNS.keys()}
    if source.markers:
        forms = {_TRANSCRIPT: forms[_TRANSCRIPT]} if _TRANSCRIPT in forms else {}
    every, fits = _Tried(), set(forms)
    for sample in samples:
        tried = _Tried()
        for row in sample.rows:
            for one in (tried, every):
                _try(row, forms, source, one)
        fits &= {form for form in forms if tried.most(tried.there, form)}
    left = _without_weaker(fits, every)
    if left == [_CONVERSATIONAL, _PREFERENCE] and _repeats(samples, forms, source):
        left = [_PREFERENCE]
    if set(left) <= set(_PLAIN) and _answers(samples, every, source, left):
        return {}
    return {
        form: [source.columns.get(column, column) for column in forms[form].COLUMNS if column in every.used[form]]
        for form in left
    }


def _try(row: Mapping[str, Any], forms: Mapping[str, Format], source: SourceConfig, tried: _Tried) -> None:
    tried.rows += 1
    for form, module in forms.items():
        cells = _Probe(row, source.columns, tuple(source.markers))
        tried.used.setdefault(form, set()).update(column for column in module.COLUMNS if cells.has(column))
        try:
            module.read(cells)
        except _MissingError:
            continue
        except DroppedRow:
            pass
        except BadRow:
            tried.there[form] += 1
            continue
        tried.there[form] += 1
        tried.read[form] += 1


def _without_weaker(fits: set[str], tried: _Tried) -> list[str]:
    """The formats that remain if there are better ones for the same columns."""
    fits = {
        form
        for form in fits
        if tried.read[form] or not any(tried.read[other] and tried.used[form] <= tried.used[other] for other in fits)
    }
    # Whole transcripts are texts, too: the marks in them tell. Without marks nothing speaks for them.
    if not tried.most(tried.read, _TRANSCRIPT):
        fits.discard(_TRANSCRIPT)
    elif _TRANSCRIPT in fits:
        fits = {form for form in fits if form == _TRANSCRIPT or not tried.used[form] <= tried.used[_TRANSCRIPT]}
    left = sorted(fits - set(_PLAIN)) or sorted(fits)
    left = [form for form in left if tried.read[form]] or left
    return [form for form in left if not any(tried.used[form] < tried.used[other] for other in left)]


def _repeats(samples: Sequence[_Sample], forms: Mapping[str, Format], source: SourceConfig) -> bool:
    """Whether the messages of most rows are the prompt with one of its answers, as UltraFeedback has them."""
    rows = [row for sample in samples for row in sample.rows]
    found = 0
    for row in rows:
        try:
            pair, alone = (forms[form].read(Cells(row, source.columns)) for form in (_PREFERENCE, _CONVERSATIONAL))
        except (BadRow, DroppedRow):
            continue
        sides = [(*pair.messages, side) for side in (pair.chosen, pair.rejected) if side is not None]
        whole = [*alone.messages, *([alone.chosen] if alone.chosen is not None else [])]
        found += any(same_turns(side, whole, spacing=False) for side in sides)
    return 2 * found >= len(rows)


def _answers(samples: Sequence[_Sample], tried: _Tried, source: SourceConfig, forms: Sequence[str]) -> list[str]:
    """Columns that are called like answers, which formats without answers would leave unread."""
    used = {source.columns.get(column, column) for form in forms for column in tried.used[form]}
    columns = {column for sample in samples for column in sample.columns if column.lower() in _ANSWERS}
    return sorted(columns - used - set(source.keep))


def _undecided(found: Mapping[str, list[str]], samples: Sequence[_Sample], source: SourceConfig, key: str) -> str:
    if found:
        listed = "; ".join(f"{key}.format={form} reads {', '.join(columns)}" for form, columns in found.items())
        return f"{key}: its rows fit {len(found)} formats, so say which is meant: {listed}"
    by_columns: dict[tuple[str, ...], str] = {}
    for sample in samples:
        by_columns.setdefault(tuple(sample.columns), sample.name)
    alone = [
        (name, columns, _fitting([one], source))
        for columns, name in by_columns.items()
        for one in samples
        if one.name == name
    ]
    if len(alone) > 1 and any(fits for _, _, fits in alone):
        listed = "\n  ".join(
            f"{name}: {', '.join(fits) or 'no format'} ({_listed(columns)})" for name, columns, fits in alone[:5]
        )
        return f"{key}: its files differ, and no format fits them all: give each kind a source of its own:\n  {listed}"
    forms = "; ".join(f"{form} reads {', '.join(format_module(form, key=key).COLUMNS)}" for form in format_names())
    return (
        f"{key}: no format fits its rows, which have the columns {_listed(alone[0][1])}: set {key}.format, and where "
        f"columns are called otherwise {key}.columns{_proposal(samples[0], source, key)}\n  {forms}"
    )


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(shown_name(column) for column in columns[:12]) + (", …" if len(columns) > 12 else "") or "none"


def _proposal(sample: _Sample, source: SourceConfig, key: str) -> str:
    """Options that may be what is meant: the first ones with which the rows can be read."""
    for form, given in _candidates(sample.rows[0]):
        changed = {ours: theirs for ours, theirs in given.items() if ours != theirs}
        tried = replace(source, format=form, columns={**source.columns, **changed})
        if changed and _reads(sample, tried):
            options = "".join(f" +{key}.columns.{ours}={shown_name(theirs)}" for ours, theirs in changed.items())
            return f", as in  {key}.format={form}{options}"
    return ""


def _candidates(row: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, str]]]:
    """Formats with the columns that may be meant, told by their names; those that read more of a row come first."""
    paths = {str(column).lower(): str(column) for column in row}
    for column, value in row.items():
        inner = value if isinstance(value, Mapping) else {}
        paths.update({key: f"{column}.{key}" for key in map(str, inner) if key not in paths})
    beside = {ours: paths[name] for ours, names in _BESIDE.items() for name in names if name in paths}
    turns = [str(column) for column, value in row.items() if isinstance(value, list)]
    turns += [path for name, path in paths.items() if name in _TURNS and path not in turns]
    prompts, answers, abouts, better, worse = (
        [paths[name] for name in names if name in paths] for names in (_PROMPTS, _ANSWERS, _ABOUT, _BETTER, _WORSE)
    )
    for chosen, rejected in product(better, worse):
        for prompt in (*prompts, *turns):
            yield "preference", {"prompt": prompt, "chosen": chosen, "rejected": rejected, **beside}
        yield "preference", {"chosen": chosen, "rejected": rejected, **beside}
    for prompt, about, answer in product(prompts, abouts, answers):
        if len({prompt, about, answer}) == 3:
            yield "instruction", {"instruction": prompt, "input": about, "output": answer, **beside}
    if worse:
        return  # What only reads the better answers would lose the others.
    for column in turns:
        yield "conversational", {"messages": column, **beside}
    for prompt, answer in product(prompts, answers):
        if prompt != answer:
            yield "completion", {"prompt": prompt, "completion": answer, **beside}


def _reads(sample: _Sample, source: SourceConfig) -> bool:
    """Whether a source's options read most of the first rows."""
    rows = [(sample.name, row) for row in sample.rows[:_PROPOSED]]
    read = [not isinstance(entry, Refused) or not entry.bad for entry in conversations(rows, source, name="")]
    return 2 * sum(read) >= len(read)
