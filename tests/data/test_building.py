"""Building a mix: limits to stages, fractions, repetition, plain texts, the same from any number of workers."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf.config.errors import DataError
from rlhf.config.schema import (
    DataConfig,
    Exhausted,
    LossOn,
    ModelConfig,
    OnProblem,
    ScratchConfig,
    SourceConfig,
    SplitConfig,
    Unread,
    WeightSource,
)
from rlhf.data.conversation import Conversation, Message
from rlhf.data.encode import REWRITTEN
from rlhf.data.inspector import examples, overlaps, part_facts
from rlhf.data.loader import GlobalLoader, row_lengths
from rlhf.data.prepare import PreparedData, prepare_data
from rlhf.data.split import ALL_PARTS, STAGES, part_of
from rlhf.models.tokenizer import load_tokenizer, prepare_tokenizer

MODEL = ModelConfig(name="mini", source=WeightSource.scratch, scratch=ScratchConfig(vocab_size=300))


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache_dir = tmp_path_factory.mktemp("tokenizer")
    return prepare_tokenizer(MODEL, texts=lambda: iter(["answer one two"] * 5), fingerprint="x", cache_dir=cache_dir)


def pairs(path: Path, numbers: range, *, tag: str = "") -> str:
    """Write pairs with the prompts of these numbers and return the path."""
    rows = [{"prompt": f"prompt {n}", "chosen": f"good {n} {tag}", "rejected": f"bad {n}"} for n in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepared(data: DataConfig, tokenizer_dir: Path, cache_dir: Path) -> PreparedData:
    return prepare_data(data, tokenizer_dir=tokenizer_dir, cache_dir=cache_dir)


def columns(data: PreparedData) -> dict[str, dict[str, list[Any]]]:
    """All rows of all parts."""
    return {
        part.label: data.part(part.stage, part.held_out).to_dict()
        for part in ALL_PARTS
        if data.has_part(part.stage, part.held_out)
    }


@pytest.mark.processes
def test_other_processes_build_the_same(tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {
        "a": SourceConfig(path=pairs(tmp_path / "a.jsonl", range(300)), weight=2.0),
        "b": SourceConfig(path=pairs(tmp_path / "b.jsonl", range(200, 500), tag="b"), weight=1.0),
    }
    monkeypatch.setattr("rlhf.data.build.CHUNK", 50)
    monkeypatch.setattr("rlhf.data.build.ALONE", 1)
    split = SplitConfig(sft=1, rm=1, ppo=1, held_out=0.2)
    found = [
        prepared(DataConfig(sources=sources, split=split, workers=workers), tokenizer_dir, tmp_path / f"cache{workers}")
        for workers in (1, 2)
    ]
    assert columns(found[0]) == columns(found[1])
    assert found[0].counts == found[1].counts
    assert found[0].fingerprint == found[1].fingerprint


def test_no_prompt_is_in_two_parts_even_if_a_source_is_for_some_stages_only(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    sources = {
        "free": SourceConfig(path=pairs(tmp_path / "free.jsonl", range(300))),
        "sft": SourceConfig(path=pairs(tmp_path / "sft.jsonl", range(200, 500), tag="s"), stages=["sft"]),
        "rm": SourceConfig(path=pairs(tmp_path / "rm.jsonl", range(400, 600), tag="r"), stages=["rm"]),
    }
    split = SplitConfig(sft=1, rm=1, ppo=1, held_out=0.1)
    seen = {}
    for order in (list(sources), list(reversed(sources))):
        data = DataConfig(sources={name: sources[name] for name in order}, split=split)
        done = prepared(data, tokenizer_dir, tmp_path / "-".join(order))
        rows = columns(done)
        prompts = {label: set(part["prompt_text"]) for label, part in rows.items() if label.endswith("_train")}
        prompts["held_out"] = set().union(*(rows[f"{stage}_held_out"]["prompt_text"] for stage in STAGES))
        assert sum(map(len, prompts.values())) == len(set().union(*prompts.values())) == 600
        assert overlaps(done) == {}
        by_stage = {stage: Counter(rows[f"{stage}_train"]["source"]) for stage in STAGES}
        assert set(by_stage["ppo"]) == {"free"}
        assert by_stage["rm"]["sft"] == by_stage["sft"]["rm"] == 0
        lost = done.counts["dropped"]["prompt belongs to another stage"]
        # Of 200..299 in `sft` about two thirds are elsewhere in `free`; all of 400..499 in `rm` are in `sft`.
        assert 140 <= lost <= 195
        listed = [json.loads(line) for line in done.problems_file.read_text().splitlines()]
        assert sum(entry["problem"] == "prompt belongs to another stage" for entry in listed) == lost
        seen[tuple(order)] = {label: sorted(found) for label, found in prompts.items()}
    first, second = seen.values()
    assert first == second


def test_a_fraction_takes_whole_prompts(tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    pairs(tmp_path / "rows" / "a.jsonl", range(2000))
    pairs(tmp_path / "rows" / "b.jsonl", range(2000), tag="b")
    source = SourceConfig(path=str(tmp_path / "rows"), fraction=0.4)
    done = prepared(
        DataConfig(sources={"main": source}, split=SplitConfig(sft=1, rm=0, ppo=0)), tokenizer_dir, tmp_path
    )
    rows = done.part("sft", False)["prompt_text"][:]
    assert set(Counter(rows).values()) == {2}
    assert 0.36 < len(set(rows)) / (2000 * 0.95) < 0.44
    used = len(rows) + len(done.part("sft", True))
    assert done.counts["dropped"]["beyond the source's fraction"] == 4000 - used


def test_the_same_answer_to_a_prompt_is_learnt_once(tokenizer_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"p{n}", "chosen": "same", "rejected": f"other {k}"} for n in range(50) for k in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(sources={"main": SourceConfig(path=str(path))}, split=SplitConfig(sft=1, rm=0, ppo=0))
    done = prepared(data, tokenizer_dir, tmp_path)
    learnt = done.part("sft", False)["prompt_text"][:]
    assert len(learnt) == len(set(learnt))
    held_out = 50 - len(learnt)
    assert done.counts["dropped"] == {"sft: answer seen before": 100, "ppo: prompt seen before": 2 * held_out}
    assert len(done.part("rm", True)) == 3 * held_out


@pytest.mark.parametrize(("exhausted", "expected"), [(Exhausted.stop, (60, 20)), (Exhausted.repeat, (300, 100))])
def test_a_source_that_is_used_up_stops_or_repeats(
    exhausted: Exhausted, expected: tuple[int, int], tokenizer_dir: Path, tmp_path: Path
) -> None:
    sources = {
        "large": SourceConfig(path=pairs(tmp_path / "a.jsonl", range(300)), weight=3.0),
        "small": SourceConfig(path=pairs(tmp_path / "b.jsonl", range(1000, 1020)), weight=1.0),
    }
    split = SplitConfig(sft=0, rm=1, ppo=0, held_out=0.0)
    data = DataConfig(sources=sources, split=split, exhausted=exhausted)
    done = prepared(data, tokenizer_dir, tmp_path)
    rows = done.part("rm", False)
    assert done.counts["parts"]["rm_train"]["sources"] == dict(zip(sources, expected, strict=True))
    counted = Counter(rows["prompt_text"][:])
    most, least = max(counted.values()), min(counted.values())
    assert (most, least) == ((1, 1) if exhausted is Exhausted.stop else (5, 1))
    # The order is shuffled: the repetitions do not stand together.
    small = np.array([source == "small" for source in rows["source"][:]])
    assert 0 < small[: len(small) // 4].sum() < small.sum() * 0.6
    loader = GlobalLoader(rows, batch_size=8, collate=len, seed=1, rank=0, ranks=2, epochs=1.0)
    per_batch = [dict(loader.source_counts) for _ in loader]
    assert all(sum(counts.values()) == 8 for counts in per_batch)
    mean = sum(counts["small"] for counts in per_batch) / len(per_batch)
    assert mean == pytest.approx(2, abs=0.5)


def test_plain_text_becomes_pieces_of_the_pretraining_part(tokenizer_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    texts = [f"number {n} " + "word " * n for n in range(40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = DataConfig(
        sources={"main": SourceConfig(path=str(path), format="text")}, max_prompt_length=20, max_response_length=12
    )
    done = prepared(data, tokenizer_dir, tmp_path)
    tokenizer = load_tokenizer(tokenizer_dir)
    rows = [*done.part("ptx", False), *done.part("ptx", True)]
    assert max(len(row["chosen_ids"]) for row in rows) == 32
    assert all(row["prompt_ids"] == [] and row["rejected_ids"] is None for row in rows)
    ids = [token for row in rows for token in row["chosen_ids"]]
    assert ids.count(tokenizer.eos_token_id) == 40
    assert ids.count(tokenizer.bos_token_id) == 0  # This tokenizer adds none itself: its chat template does.
    whole = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in texts)
    assert len(ids) == whole
    for stage in STAGES:
        assert not done.has_part(stage, False)
    with pytest.raises(DataError, match="training part of stage sft has no rows"):
        done.part("sft", False)


def test_rows_that_are_lost_are_listed_with_their_reason(tokenizer_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"p{n}", "answer_0": "a", "answer_1": "b", "score_0": n % 3, "score_1": 1} for n in range(30)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n")
    source = SourceConfig(path=str(path), format="scored_pair")
    data = DataConfig(sources={"main": source}, split=SplitConfig(sft=0, rm=1, ppo=0), on_bad_row=OnProblem.skip)
    done = prepared(data, tokenizer_dir, tmp_path)
    assert done.counts["read"] == {"main": 31}
    assert done.counts["dropped"] == {"the scores tie": 10, "bad row": 1}
    listed = [json.loads(line) for line in done.problems_file.read_text().splitlines()]
    assert Counter(entry["problem"] for entry in listed) == done.counts["dropped"]
    (bad,) = (entry for entry in listed if entry["problem"] == "bad row")
    assert bad["where"] == f"{path}:31" and bad["detail"].startswith("not valid JSON")
    rows = done.counts["parts"]["rm_train"]["rows"] + done.counts["parts"]["rm_held_out"]["rows"]
    assert rows + sum(done.counts["dropped"].values()) == 31


def test_identical_pairs_only_are_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{n}", "chosen": "a", "rejected": "a"}) + "\n" for n in range(9)))
    for on_bad_row, said in ((OnProblem.error, "9 rows cannot be used"), (OnProblem.skip, "has no usable row")):
        data = DataConfig(sources={"main": SourceConfig(path=str(path))}, on_bad_row=on_bad_row)
        with pytest.raises(DataError, match=said) as raised:
            prepared(data, tokenizer_dir, tmp_path)
        assert f"{path}:1: chosen and rejected are equal" in str(raised.value)
    assert [entry for entry in (tmp_path / "data").iterdir() if entry.is_dir()] == []


def test_a_file_that_changes_while_it_is_read_is_noticed(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(pairs(tmp_path / "rows.jsonl", range(100)))
    from rlhf.data import build as module

    plain = module._ordered

    def and_shrink(*arguments: Any) -> Any:
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:50]))
        return plain(*arguments)

    monkeypatch.setattr(module, "_ordered", and_shrink)
    with pytest.raises(DataError, match="its files changed while they were read"):
        prepared(DataConfig(name="m", sources={"main": SourceConfig(path=str(path))}), tokenizer_dir, tmp_path)
    assert [entry for entry in (tmp_path / "data").iterdir() if entry.is_dir()] == []


def test_facts_are_those_of_the_rows(tokenizer_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"p {n}", "chosen": "a long answer " * (n % 4), "rejected": "short"} for n in range(1, 200)]
    path.write_text("".join(json.dumps({**row, "chosen": row["chosen"] or "x"}) + "\n" for row in [*rows, rows[0]]))
    data = DataConfig(sources={"main": SourceConfig(path=str(path))}, max_response_length=40)
    done = prepared(data, tokenizer_dir, tmp_path)
    tokenizer = load_tokenizer(tokenizer_dir)
    for fact in part_facts(done):
        stage, _, kind = fact.part.partition("_")
        mine = done.part(stage, kind == "held_out").to_list()
        assert fact.rows == len(mine)
        answers = [row[f"{side}_ids"] for row in mine for side in ("chosen", "rejected") if row[f"{side}_ids"]]
        assert fact.response_tokens[-1] == max(map(len, answers))
        cut = sum(ids[-1] != tokenizer.eos_token_id for ids in answers)
        assert fact.truncated == pytest.approx(cut / len(answers))
        if stage == "sft":
            share = sum(len(row["chosen_ids"]) for row in mine) / int(
                row_lengths(done.part(stage, kind == "held_out")).sum()
            )
            assert fact.loss_share == pytest.approx(share)
        pairs_of = [row for row in mine if row["rejected_ids"] and len(row["rejected_ids"]) != len(row["chosen_ids"])]
        if pairs_of:
            longer = sum(len(row["chosen_ids"]) > len(row["rejected_ids"]) for row in pairs_of)
            assert fact.longer_chosen == pytest.approx(longer / len(pairs_of))
        assert fact.languages
    duplicates = {fact.part: fact.duplicates for fact in part_facts(done)}
    home = part_of(
        Conversation(messages=(Message("user", "p 1"),), chosen="", rejected="", source="main", where=""), data.split
    )
    assert sum(duplicates.values()) == (0 if home.stage == "ppo" else 1)
    shown = list(examples(done, tokenizer, count=2))
    for example in shown:
        marked = "".join(text for text, target in example.pieces if target)
        if example.part == "sft_train":
            assert marked and "<|user|>" not in marked
        elif example.part == "rm_train":
            assert marked == "</s>"
        else:
            assert marked == ""


def rows_file(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_prompts_that_differ_in_white_space_are_one_prompt(tokenizer_dir: Path, tmp_path: Path) -> None:
    plain = [{"prompt": f"prompt é {n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(200)]
    spaced = [{**row, "prompt": f"\n{row['prompt']} ".replace("é", "e\u0301")} for row in plain]
    sources = {
        "plain": SourceConfig(path=rows_file(tmp_path / "plain.jsonl", plain)),
        "spaced": SourceConfig(path=rows_file(tmp_path / "spaced.jsonl", spaced)),
    }
    data = prepared(DataConfig(sources=sources), tokenizer_dir, tmp_path)
    texts = {
        label: {text.strip().replace("e\u0301", "é") for text in part["prompt_text"]}
        for label, part in columns(data).items()
    }
    for one in STAGES:
        for other in STAGES:
            assert one == other or not texts[f"{one}_train"] & texts[f"{other}_train"]
        assert not texts[f"{one}_train"] & texts["sft_held_out"]
    # What both sources have is learnt once.
    assert len(texts["sft_train"]) == len(columns(data)["sft_train"]["prompt_text"])


def test_who_speaks_tells_prompts_apart(tokenizer_dir: Path, tmp_path: Path) -> None:
    rows = []
    for number in range(100):
        system = [{"role": "system", "content": f"a {number}"}, {"role": "user", "content": "b"}]
        rows += [{"prompt": turns, "completion": "x"} for turns in (system, f"a {number}\n\nb")]
    source = SourceConfig(path=rows_file(tmp_path / "rows.jsonl", rows), format="completion", stages=["sft"])
    data = prepared(DataConfig(sources={"main": source}), tokenizer_dir, tmp_path)
    assert sum(data.counts["parts"][f"sft_{part}"]["rows"] for part in ("train", "held_out")) == 200


def test_a_long_text_is_kept_once(tokenizer_dir: Path, tmp_path: Path) -> None:
    words = " ".join(f"word{n}" for n in range(3000))
    source = SourceConfig(path=rows_file(tmp_path / "text.jsonl", [{"text": words}, {"text": "short"}]), format="text")
    data = DataConfig(sources={"main": source}, max_prompt_length=64, max_response_length=64)
    done = prepared(replace(data, split=SplitConfig(held_out=1e-9)), tokenizer_dir, tmp_path)
    part = done.part("ptx", held_out=False)
    texts = [row["chosen_text"] for row in part]
    assert len(texts) > 50 and sum(len(text) for text in texts) < 1.2 * (len(words) + 5)
    assert len({row["where"] for row in part}) == len(texts)
    (fact,) = part_facts(done)
    assert fact.duplicates == 0


def test_what_weights_and_fractions_leave_out_is_counted_and_listed(tokenizer_dir: Path, tmp_path: Path) -> None:
    sources = {
        "many": SourceConfig(path=pairs(tmp_path / "many.jsonl", range(300)), weight=1.0),
        "few": SourceConfig(path=pairs(tmp_path / "few.jsonl", range(300, 360)), weight=1.0, fraction=0.5),
    }
    data = prepared(DataConfig(sources=sources), tokenizer_dir, tmp_path)
    listed = Counter(json.loads(line)["problem"] for line in data.problems_file.read_text().splitlines())
    dropped = data.counts["dropped"]
    assert dropped["beyond the source's weight"] > 100 and dropped["beyond the source's fraction"] > 10
    assert {reason: listed[reason] for reason in dropped} == dropped
    kept = sum(part["rows"] for label, part in data.counts["parts"].items() if label.endswith("_train"))
    held_out = data.counts["parts"]["sft_held_out"]["rows"]
    assert kept + held_out + sum(dropped.values()) == 360


def test_facts_follow_the_sources_not_their_order(tokenizer_dir: Path, tmp_path: Path) -> None:
    one = SourceConfig(path=pairs(tmp_path / "one.jsonl", range(200)))
    other = SourceConfig(path=pairs(tmp_path / "other.jsonl", range(200, 230)))
    rows = []
    for sources in ({"one": one, "other": other}, {"other": other, "one": one}):
        facts = part_facts(prepared(DataConfig(sources=sources), tokenizer_dir, tmp_path))
        rows.append({(fact.source, fact.part): fact.rows for fact in facts})
    assert rows[0] == rows[1]
    assert rows[0]["one", "rm_train"] > rows[0]["other", "rm_train"]


def test_half_a_surrogate_pair_anywhere_ends_in_no_traceback(tokenizer_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"prompt": "p", "chosen": "c", "rejected": "r", "note": "\ud800"})
    path.write_text(good + "\n" + '{"\\ud800": 1}\n')
    source = SourceConfig(path=str(path), keep=["note"])
    data = DataConfig(sources={"main": source}, on_bad_row=OnProblem.skip)
    done = prepared(data, tokenizer_dir, tmp_path)
    assert done.counts["dropped"]["bad row"] == 1 and "ud800" in done.problems_file.read_text()


def test_a_row_that_the_template_refuses_is_a_bad_row(tokenizer_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    strict = tmp_path / "strict"
    tokenizer.save_pretrained(str(strict))
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    rows: list[dict[str, Any]] = [{"prompt": f"p {n}", "completion": "c"} for n in range(60)]
    path = rows_file(tmp_path / "rows.jsonl", [*rows, {"prompt": turns, "completion": "c"}])
    data = DataConfig(sources={"main": SourceConfig(path=path, format="completion")})
    with pytest.raises(DataError, match=r"1 row cannot be used:\n  .*rows\.jsonl:61: .*no system turns"):
        prepared(data, strict, tmp_path)
    done = prepared(replace(data, on_bad_row=OnProblem.skip), strict, tmp_path)
    assert done.counts["dropped"]["bad row"] == 1
    path = rows_file(tmp_path / "first.jsonl", [{"prompt": turns, "completion": "c"}, *rows])
    first = DataConfig(sources={"main": SourceConfig(path=path, format="completion")}, on_bad_row=OnProblem.skip)
    assert prepared(first, strict, tmp_path).counts["dropped"]["bad row"] == 1


NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "{{ m['content'] }}{% endfor %}"
)


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_what_the_template_refuses_is_a_bad_row_whatever_the_chunk(
    chunk: int, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.data.build.CHUNK", chunk)
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.chat_template = NO_SYSTEM
    tokenizer.save_pretrained(str(strict := tmp_path / "strict"))
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    refused, usable = {"prompt": turns, "completion": "c"}, [{"prompt": f"p {n}", "completion": "c"} for n in range(9)]
    sources = {
        "mixed": SourceConfig(path=rows_file(tmp_path / "mixed.jsonl", [*[refused] * 6, *usable])),
        "other": SourceConfig(path=rows_file(tmp_path / "other.jsonl", [refused] * 6)),
    }
    skipped = DataConfig(sources={"mixed": sources["mixed"]}, on_bad_row=OnProblem.skip)
    assert prepared(skipped, strict, tmp_path).counts["dropped"]["bad row"] == 6
    # Bad rows may be skipped, but not all of a source; that is told once.
    with pytest.raises(DataError) as raised:
        prepared(replace(skipped, sources=sources), strict, tmp_path)
    (first, second) = str(raised.value).split("\n")
    assert first == f"data.sources.other ({tmp_path}/other.jsonl) has no usable row:"
    assert "no system turns" in second and second.endswith("(and 5 more rows: 2, 3, 4, …)")
    # What is wrong with the sources is told together.
    sources["broken"] = SourceConfig(path=rows_file(tmp_path / "broken.jsonl", [{"prompt": 1, "completion": "c"}]))
    with pytest.raises(DataError) as raised:
        prepared(DataConfig(sources=sources), strict, tmp_path)
    lines = str(raised.value).split("\n")
    assert [line for line in lines if line.startswith("data.sources.")] == [
        "data.sources.broken: 1 row cannot be used:",
        "data.sources.mixed: 6 rows cannot be used:",
        "data.sources.other: all 6 rows cannot be used:",
    ]
    assert lines[-1].startswith("Repair them") and str(raised.value).count("Repair them") == 1


def test_what_is_taken_and_left_out_is_told(tokenizer_dir: Path, tmp_path: Path) -> None:
    (folder := tmp_path / "own").mkdir()
    rows_file(folder / "train.jsonl", [{"prompt": f"p {n}", "completion": "c"} for n in range(9)])
    rows_file(folder / "test.jsonl", [{"prompt": "q", "completion": "c"}])
    done = prepared(DataConfig(sources={"own": SourceConfig(path=str(folder))}), tokenizer_dir, tmp_path)
    assert done.counts["choices"] == [
        "own: 1 file read, left out: 1 of split test",
        "own: format=completion, for the columns prompt, completion",
    ]
    with pytest.raises(
        DataError, match=r"no pairs .*\(read: 9 of own; dropped: .*\n  own: 1 file read.*\n  own: format="
    ):
        done.part("rm", False)


def test_long_rows_are_chunked_by_their_length(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.data.build.CHUNK_TEXT", 100)
    path = rows_file(tmp_path / "rows.jsonl", [{"text": f"{n} " * 200} for n in range(5)])
    whole = DataConfig(sources={"a": SourceConfig(path=path)}, max_prompt_length=8, max_response_length=8)
    done = prepared(whole, tokenizer_dir, tmp_path)
    assert done.counts["read"] == {"a": 5}
    rows = [row for held_out in (False, True) if done.has_part("ptx", held_out) for row in done.part("ptx", held_out)]
    assert "".join(sorted(row["chosen_text"] for row in rows if row["chosen_text"])).count("3") == 200


def test_what_nobody_reads_is_counted_and_may_stop_the_run(tokenizer_dir: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"p {n}", "completion": "c", "topic": "t", **({"note": "n"} if n < 7 else {})} for n in range(50)
    ]
    source = SourceConfig(path=rows_file(tmp_path / "rows.jsonl", rows), format="completion")
    data = DataConfig(sources={"main": source})
    done = prepared(data, tokenizer_dir, tmp_path)
    assert done.counts["unread_by_source"] == {"main": {"topic": 50, "note": 7}}
    # Also where the same rows were prepared before.
    with pytest.raises(
        DataError, match=r"data\.sources\.main: topic \(50 rows\), note \(7 rows\)\n.*data\.unread=list"
    ):
        prepared(replace(data, unread=Unread.error), tokenizer_dir, tmp_path)
    kept = replace(data, sources={"main": replace(source, keep=["topic"])}, unread=Unread.error)
    with pytest.raises(DataError, match=r"main: note \(7 rows\)\n"):
        prepared(kept, tokenizer_dir, tmp_path)
    many = [{"prompt": f"p {n}", "completion": "c", f"key {n}": 1} for n in range(300)]
    source = SourceConfig(path=rows_file(tmp_path / "many.jsonl", many), format="completion")
    unread = prepared(DataConfig(sources={"main": source}), tokenizer_dir, tmp_path).counts["unread_by_source"]["main"]
    assert len(unread) == 201 and unread["(others)"] == 100


def test_several_answers_of_a_conversation_are_counted_and_shown(tokenizer_dir: Path, tmp_path: Path) -> None:
    turns = [{"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "x|one"), ("user", "r"))]
    rows = [{"messages": [*turns, {"role": "assistant", "content": f"two {n}"}]} for n in range(40)]
    source = SourceConfig(path=rows_file(tmp_path / "rows.jsonl", rows), format="conversational", stages=["sft"])
    data = DataConfig(sources={"main": source}, split=SplitConfig(held_out=0.0))
    whole = prepared(data, tokenizer_dir, tmp_path)
    (fact,) = part_facts(whole)
    part = whole.part("sft", False)
    targets = [len(row["chosen_ids"]) + row["prompt_targets"][1] - row["prompt_targets"][0] for row in part]
    assert fact.rows == 40 and fact.loss_share == pytest.approx(sum(targets) / int(row_lengths(part).sum()))
    (shown,) = examples(whole, load_tokenizer(tokenizer_dir), count=1)
    assert next(text for text, target in shown.pieces if target) == "x|one</s>" and len(shown.pieces) == 4
    assert prepared(replace(data, loss_on=LossOn.last), tokenizer_dir, tmp_path).fingerprint != whole.fingerprint
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.chat_template = (
        "{% for m in messages %}<|user|>{{ m.content if loop.last else m.content.split('|')[-1] }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}<|user|>{% endif %}"
    )
    tokenizer.save_pretrained(str(tmp_path / "forgets"))
    each = prepared(data, tmp_path / "forgets", tmp_path)
    assert each.counts["notes"] == {REWRITTEN: 40}
    # The first answer is the same in all of them, and is learnt once.
    assert each.counts["parts"]["sft_train"]["rows"] == 41
    assert each.counts["dropped"] == {"sft: answer seen before": 39}
