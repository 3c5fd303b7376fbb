"""The checks that check everything else: annotations are enforced in tests, and long code is found."""

import re
from pathlib import Path

import jaxtyping
import pytest
import torch
from size_limits import MAX_FILE_LINES, MAX_FUNCTION_LINES, main

from rlhf.batch import PromptBatch
from rlhf.functional.masking import position_ids


def test_shapes_and_formats_are_checked_at_run_time() -> None:
    ids, mask = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.bool)
    assert len(PromptBatch(prompt_ids=ids, prompt_mask=mask)) == 2
    with pytest.raises(jaxtyping.TypeCheckError):
        PromptBatch(prompt_ids=ids, prompt_mask=mask[:, 1:])
    with pytest.raises(jaxtyping.TypeCheckError):
        position_ids(ids)


def test_what_a_batch_carries_beside_tensors_goes_with_its_rows() -> None:
    ids, mask = torch.arange(6).view(3, 2), torch.ones(3, 2, dtype=torch.bool)
    batch = PromptBatch(prompt_ids=ids, prompt_mask=mask, records=tuple({"source": name} for name in "abc"))
    assert [record["source"] for record in batch.rows(torch.tensor([2, 0])).records] == ["c", "a"]
    assert [record["source"] for record in batch.rows(torch.tensor([False, True, True])).records] == ["b", "c"]
    assert [len(part.records) for part in batch.split(2)] == [2, 1]
    assert PromptBatch(prompt_ids=ids, prompt_mask=mask).rows(torch.tensor([0])).records == ()


def test_long_functions_and_files_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = "    pass\n"
    fits = tmp_path / "fits.py"
    fits.write_text("def fits():\n" + body * (MAX_FUNCTION_LINES - 1))
    assert main([str(fits)]) == 0
    long = tmp_path / "folder" / "long.py"
    long.parent.mkdir()
    long.write_text("\n" * 4 + "async def grows():\n" + body * MAX_FUNCTION_LINES)
    capsys.readouterr()
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().out == f"{long}:5: grows has {MAX_FUNCTION_LINES + 1} lines, at most 60: split it\n"
    long.write_text("x = 1\n" * (MAX_FILE_LINES + 1))
    assert main([str(tmp_path)]) == 1
    assert f"{long}: {MAX_FILE_LINES + 1} lines" in capsys.readouterr().out


def test_the_docs_name_tests_that_are_there() -> None:
    """As `file.py::test` or `file.py`, relative to tests/; `::test` is of the file named before it in the line."""
    root = Path(__file__).resolve().parents[1]
    named: set[tuple[str, str]] = set()
    for page in (*sorted((root / "docs").rglob("*.md")), root / "README.md"):
        for line in page.read_text(encoding="utf-8").splitlines():
            file = ""
            for path, test in re.findall(
                r"`(?:tests/)?((?:[\w-]+/)*test_\w+\.py|tests/[\w/]+\.py|)(?:::(\w+))?`", line
            ):
                file = path.removeprefix("tests/") or file
                if path or test:
                    named.add((file, test))
    assert len(named) > 50
    missing = [
        f"{file}::{test}"
        for file, test in sorted(named)
        if not (found := root / "tests" / file).is_file() or (test and f"def {test}(" not in found.read_text("utf-8"))
    ]
    assert missing == []
