"""Plots and reports of synthetic run directories, and of broken and unfinished ones."""

import base64
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from synthetic import write_pipeline, write_ppo, write_rm, write_sft

from rlhf.config.terminal import shown
from rlhf.tracking.plots import plot_pipeline, plot_stage
from rlhf.tracking.records import append_row, read_rows
from rlhf.tracking.report import markdown_cell, markdown_code, merge_records, write_report

ROOT = Path(__file__).parents[2]
HOSTILE = "<script>alert(1)</script> | **bold** [x](javascript:alert(1)) `code`\nhttp://evil.example\u202e\x00"


class Page(HTMLParser):
    """The tags, links and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pipeline with its reports."""
    run_dir = tmp_path_factory.mktemp("runs") / "pipeline-tiny"
    write_pipeline(run_dir, text=HOSTILE)
    write_report(run_dir)
    return run_dir


def image_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.verify()
        return image.size


@pytest.mark.parametrize(("stage", "lines"), [("sft", 1), ("rm", 1), ("ppo", 3)])
def test_a_stage_is_drawn_as_small_multiples(pipeline: Path, stage: str, lines: int) -> None:
    width, height = image_size(pipeline / stage / "plots" / f"{stage}.png")
    assert width == 1500
    assert 382 * lines < height < 382 * lines + 120
    with Image.open(pipeline / stage / "plots" / f"{stage}.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or []}
    assert (0xD5, 0x5E, 0x00) in colours and (0x00, 0x72, 0xB2) in colours


def test_the_overview_has_one_line(pipeline: Path) -> None:
    assert image_size(pipeline / "plots" / "pipeline.png")[0] == 1500


def test_nothing_to_draw_is_no_plot(tmp_path: Path) -> None:
    assert plot_stage(tmp_path, "sft") is None
    append_row(tmp_path / "metrics.jsonl", {"stage": "sft", "step": 1, "train/loss": None})
    assert plot_stage(tmp_path, "sft") is None
    assert plot_pipeline(tmp_path) is None


def test_one_point_and_a_stage_without_panels_of_its_own_are_drawn(tmp_path: Path) -> None:
    append_row(tmp_path / "metrics.jsonl", {"stage": "sft", "step": 0, "eval/loss": 2.0, "eval/perplexity": 7.4})
    append_row(tmp_path / "metrics.jsonl", {"stage": "dpo", "step": 1, "train/loss": 2.0, "time/step": 1.0})
    for stage in ("sft", "dpo"):
        path = plot_stage(tmp_path, stage)
        assert path is not None and image_size(path)[0] == 1500


def test_merged_records_are_those_of_the_stages_in_order(pipeline: Path) -> None:
    stages = [row["stage"] for row in read_rows(pipeline / "metrics.jsonl")]
    assert sorted(set(stages), key=stages.index) == ["sft", "rm", "ppo"]
    assert len(stages) == sum(len(read_rows(pipeline / stage / "metrics.jsonl")) for stage in ("sft", "rm", "ppo"))
    assert len(read_rows(pipeline / "samples.jsonl")) == 3 + 12
    assert (pipeline / "command.txt").read_text().count("deepspeed") == 3


def test_merging_again_changes_nothing(pipeline: Path) -> None:
    before = (pipeline / "metrics.jsonl").read_bytes()
    merge_records(pipeline)
    assert (pipeline / "metrics.jsonl").read_bytes() == before


def test_html_is_self_contained_and_says_what_happened(pipeline: Path) -> None:
    page = Page((pipeline / "report.html").read_text())
    assert "script" not in page.tags and "link" not in page.tags
    images = [reference for reference in page.references if reference.startswith("data:image/png;base64,")]
    assert len(images) == len(page.references) == 4
    assert base64.b64decode(images[0].split(",")[1]) == (pipeline / "plots" / "pipeline.png").read_bytes()
    for fact in (
        "71.2 %",
        "+21.5 points",
        "73 times lower",
        "+1.40 (+1.4 \N{GREEK SMALL LETTER SIGMA})",
        "5f0c1b2a9d3e",
        "793f84d9f0",
        "torch 2.13.0",
        "Finished in 6m04s",
        "data.max_prompt_length",
        "ppo/model",
        f"python -m rlhf.chat {pipeline}",
        "deepspeed --module rlhf --config ppo/config.yaml",
        "generation",
    ):
        assert fact in page.text, fact


def test_ten_prompts_are_answered_side_by_side(pipeline: Path) -> None:
    text = (pipeline / "report.html").read_text()
    ppo = text.split("<h3>PPO</h3>")[-1].split("<details>")[0]
    assert ppo.count('class="question"') == 10
    assert ppo.count("<b>SFT</b>") == ppo.count("<b>PPO</b>") == 10
    assert ppo.count("cut off") == 2
    assert "score \N{MINUS SIGN}0.40" in ppo and "score 1.30" in ppo
    assert "a joyless thing that never lands ." in ppo


def test_generated_text_is_never_markup(pipeline: Path) -> None:
    page = (pipeline / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "\u202e" not in page and "\x00" not in page and r"http://evil.example\u202e\x00" in page
    markdown = (pipeline / "report.md").read_text()
    (row,) = [line for line in markdown.splitlines() if "alert" in line]
    assert shown(page) == page and shown(markdown) == markdown
    assert "<script" not in row and "http://" not in row and not re.search(r"(?<!\\)\]\(", row)
    assert len(re.findall(r"(?<!\\)\|", row)) == 6


def test_markdown_tables_are_whole(pipeline: Path) -> None:
    lines = (pipeline / "report.md").read_text().splitlines()
    tables = [index for index, line in enumerate(lines) if line.startswith("|---")]
    assert len(tables) == 5  # before and after, two with samples, time, options
    for index in tables:
        columns = lines[index].count("|")
        row = index - 1
        while row < len(lines) and lines[row].startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", lines[row])) == columns, lines[row]
            row += 1
        assert row > index + 1


def test_markdown_images_exist(pipeline: Path) -> None:
    targets = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (pipeline / "report.md").read_text())
    assert targets == ["plots/pipeline.png", "sft/plots/sft.png", "rm/plots/rm.png", "ppo/plots/ppo.png"]
    assert all((pipeline / target).exists() for target in targets)


def test_every_stage_has_a_report_of_its_own(pipeline: Path) -> None:
    page = Page((pipeline / "rm" / "report.html").read_text())
    assert "pipeline-tiny/rm" in page.text and "71.2 %" in page.text
    assert "rlhf.chat" not in page.text  # a reward model can't be talked to


def test_a_pipeline_that_failed_says_where_and_why(tmp_path: Path) -> None:
    run_dir = tmp_path / "pipeline"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("stage: {name: pipeline}\n")
    write_sft(run_dir / "sft")
    write_rm(run_dir / "rm")
    (run_dir / "rm" / "summary.json").unlink()
    (run_dir / "rm" / "errors").mkdir()
    error = {"type": "RuntimeError", "message": "no <memory>", "traceback": "Traceback: <x>", "user_error": False}
    (run_dir / "rm" / "errors" / "rank1.json").write_text(json.dumps(error))
    markdown, page = (path.read_text() for path in write_report(run_dir))
    text = Page(page).text
    assert "This run is not complete" in text and "Reward model: failed — rank1: RuntimeError: no <memory>" in text
    assert "Not there yet: PPO." in text and "Traceback: <x>" in text
    assert "not complete" in markdown and "Not there yet: PPO." in markdown and "no &lt;memory&gt;" in markdown


def test_an_empty_directory_gets_a_report(tmp_path: Path) -> None:
    markdown, page = write_report(tmp_path)
    assert "not complete" in markdown.read_text()
    assert "No model has been written." in Page(page.read_text()).text


def test_a_single_stage_is_reported(tmp_path: Path) -> None:
    run_dir = tmp_path / "ppo-tiny-film_reviews-seed1"
    write_ppo(run_dir)
    _, page = write_report(run_dir)
    text = Page(page.read_text()).text
    assert "ppo-tiny-film_reviews-seed1" in text and "76.3 %" in text and "not complete" not in text


def test_an_earlier_answer_is_kept_where_a_later_row_lacks_it(tmp_path: Path) -> None:
    answer = {"text": "early sft", "tokens": 2, "ended": True}
    later = {"text": "late ppo", "score": 1.0, "tokens": 2, "ended": True}
    append_row(tmp_path / "samples.jsonl", {"stage": "ppo", "step": 0, "prompt": "p", "responses": {"sft": answer}})
    append_row(tmp_path / "samples.jsonl", {"stage": "ppo", "step": 5, "prompt": "p", "responses": {"ppo": later}})
    (tmp_path / "config.yaml").write_text("stage: {name: ppo}\n")
    text = Page(write_report(tmp_path)[1].read_text()).text
    assert "early sft" in text and "late ppo" in text


def test_two_pairs_of_one_prompt_are_both_shown(tmp_path: Path) -> None:
    for text in ("first pair", "second pair"):
        responses = {"chosen": {"text": text, "ended": True}}
        append_row(tmp_path / "samples.jsonl", {"stage": "rm", "step": 5, "prompt": "p", "responses": responses})
    (tmp_path / "config.yaml").write_text("stage: {name: rm}\n")
    text = Page(write_report(tmp_path)[1].read_text()).text
    assert "first pair" in text and "second pair" in text


@pytest.mark.processes
def test_a_report_needs_no_torch() -> None:
    code = "import sys, rlhf.tracking.report; print([name in sys.modules for name in ('torch', 'matplotlib')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[False, False]\n"


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("a|b", r"a\|b"),
        ("two\nlines", "two<br>lines"),
        ("<b> & *x* _y_ #1", r"&lt;b&gt; &amp; \*x\* \_y\_ \#1"),
        ("back\\slash", r"back\\slash"),
        ("see https://x.example @me", "see https&#58;//x.example &#64;me"),
    ],
)
def test_a_markdown_cell_is_plain_text(text: str, cell: str) -> None:
    assert markdown_cell(text) == cell


def test_a_code_block_cannot_be_closed_from_inside() -> None:
    assert markdown_code("a\n```\nb") == "````\na\n```\nb\n````"
