"""docs/config_reference.md is what the fields and files say now."""

import subprocess
import sys
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from test_compose import CONF

from rlhf.config.fields import option, option_factory
from rlhf.config.origins import fields_by_key
from rlhf.config.schema import Config
from rlhf.launcher.command import PROJECT
from rlhf.stages import stage_config_class, stage_names
from rlhf.stages.reference import comment, main, reference, rows, shown, type_words

COMMITTED = PROJECT / "docs" / "config_reference.md"


def test_the_committed_reference_is_up_to_date(tmp_path: Path) -> None:
    main([str(tmp_path / "reference.md")])
    written = (tmp_path / "reference.md").read_text(encoding="utf-8")
    assert COMMITTED.is_file() and COMMITTED.read_text(encoding="utf-8") == written, (
        f"{COMMITTED.relative_to(PROJECT)} is not what the fields and conf/ say: run  make reference"
    )


def test_every_option_and_choice_is_in_it() -> None:
    text = reference(CONF)
    for name in stage_names():
        config = replace(Config(), stage=stage_config_class(name)())
        section = text.split(f"### stage={name}\n")[1].split("\n#")[0]
        for key in fields_by_key(config):
            group, _, rest = key.partition(".")
            if group == "reward_model" or not rest or (name == "pipeline" and rest.count(".")):
                continue
            place = section if group == "stage" else text
            assert f"| `{key}` |" in place or f"| `{key}.*` |" in place or f"| `{key}.NAME.*` |" in place, key
    for folder in (path for path in CONF.iterdir() if path.is_dir() and path.name != "tuned"):
        for path in folder.glob("*.yaml"):
            assert f"| `{folder.name}={path.stem}` |" in text
    assert "None" not in text and "<class" not in text and "@package" not in text


class Colour(Enum):
    red = "red"
    blue = "blue"


@dataclass(kw_only=True)
class Inner:
    number: float | None = option(None, "A number.", above=0)


@dataclass(kw_only=True)
class Outer:
    colour: Colour = option(Colour.blue, "A colour.")
    inner: Inner = option_factory(Inner, "What is inside.")
    named: dict[str, Inner] = option_factory(dict, "By name.")
    words: list[str] | None = option_factory(lambda: ["a", "b"], "Words.")


def test_rows_of_every_kind_of_field() -> None:
    found = [(row.key, row.type, row.default, row.allowed, row.meaning) for row in rows(Outer(), "x.")]
    assert found == [
        ("x.colour", "`red`, `blue`", "`blue`", "", "A colour."),
        ("x.inner.*", "options", "", "", "What is inside."),
        ("x.inner.number", "number or `null`", "`null`", "above 0", "A number."),
        ("x.named.NAME.*", "options", "", "", "By name."),
        ("x.named.NAME.number", "number or `null`", "`null`", "above 0", "A number."),
        ("x.words", "list of texts or `null`", "`[a, b]`", "", "Words."),
    ]


@pytest.mark.parametrize(
    ("value", "expected"), [(True, "`true`"), (None, "`null`"), (1e-5, "`1e-05`"), ({}, "`{}`"), ("", '`""`')]
)
def test_defaults_are_shown_as_yaml(value: Any, expected: str) -> None:
    assert shown(value) == expected
    assert type_words(dict[str, str]) == "mapping of names to texts"


def test_the_comment_is_all_lines_at_the_top(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("# @package _global_\n# One,\n# two.\ndefaults: []\n# three\n")
    assert comment(path) == "One, two."
    path.write_text("name: x\n")
    assert comment(path) == ""


@pytest.mark.processes
def test_writing_it_imports_no_heavy_library() -> None:
    script = (
        "import sys, rlhf.stages.reference as r; r.main([]);"
        "heavy = {'torch', 'deepspeed', 'transformers', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("# Configuration reference\n")
