"""docs/next_steps.md: the snippets that need nothing but what is installed here run as they stand."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from miniature import ROOT, small_model
from one_rank import one_rank
from test_adapters_and_dropout import configured
from transformers import AutoModelForCausalLM

from rlhf.stages.preflight import prepare
from rlhf.stages.sft.train import run as train_sft

pytestmark = pytest.mark.processes

PAGE = (ROOT / "docs" / "next_steps.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
HERE = [snippet for snippet in SNIPPETS if "from trl" not in snippet]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with RUN/sft of a model that was trained through adapters."""
    path = tmp_path_factory.mktemp("finished")
    with one_rank(path):
        config = configured("stage=sft", "stage.batch_size=8", "stage.max_steps=1", "lora.rank=2", *small_model(path))
        prepare(config)
        train_sft(config, path / "RUN" / "sft")
    yield path


def test_there_are_snippets_to_run() -> None:
    assert [len(HERE), len(SNIPPETS)] == [2, 4]


@pytest.mark.parametrize("snippet", HERE, ids=["transformers", "peft"])
def test_the_snippet_runs(
    snippet: str, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished)
    exec(compile(snippet, "docs/next_steps.md", "exec"), {})
    assert capsys.readouterr().out.strip()
    if "merged" in snippet:
        merged, exported = (AutoModelForCausalLM.from_pretrained(path) for path in ("merged", "RUN/sft/model"))
        theirs = merged.state_dict()
        for name, value in exported.state_dict().items():
            assert (value - theirs[name]).abs().max() < 1e-5, name
