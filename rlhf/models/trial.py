"""Try a tokenizer and a chat template: run as a process of its own by `rlhf.models.door.check_tokenizer`.

The template comes through the standard input; nothing there means the tokenizer's own.
"""

import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What each step may take beyond loading: it takes milliseconds. CPU time, so that a busy machine changes nothing.
STEP_SECONDS, STEP_MEMORY = 5, 2 * 2**30
# White space, letters of several bytes, and repetitions, over which a pattern may backtrack for ever.
_TEXTS = ("A question?\n\n  é 映画", "a" * 40 + "!", "1234567890" * 4, "so it goes, and goes. " * 40, " ", "")
_TURN = {"user": "A question?", "assistant": "An answer.", "system": "Be brief.", "tool": "42"}
_ROUND = ("user", "assistant")
_ORDERS = (
    *((*_ROUND * 6, "user")[:turns] for turns in range(1, 14)),
    ("system", "user"),
    ("system", *_ROUND * 3),
    ("assistant", "user"),
    ("user", "user", "assistant"),
    ("user", "assistant", "tool", "assistant"),
    _ROUND * 20,
)


def main() -> int:
    """Load, encode and render; the step that is under way is printed first, and what goes wrong to stderr."""
    from rlhf.config.errors import ConfigError

    try:
        for step in _steps(Path(sys.argv[1]), sys.stdin.buffer.read().decode("utf-8", "surrogatepass")):
            print(step, flush=True)
    except (ConfigError, MemoryError) as error:
        print(str(error) or "it takes too much memory", file=sys.stderr)
        return 2
    except BaseException as error:  # What native code raises is no Exception.
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def _steps(directory: Path, template: str) -> Iterator[str]:
    """Do one step after the other, each behind its name."""
    from rlhf.models.tokenizer import load_tokenizer

    yield "load"
    tokenizer = load_tokenizer(directory)
    yield "encode"
    _tighten()
    for text in _TEXTS:
        tokenizer.decode(tokenizer(text)["input_ids"])
        tokenizer(text, add_special_tokens=False, split_special_tokens=True)
    tokenizer.chat_template = template or tokenizer.chat_template
    for order in _ORDERS if tokenizer.chat_template else ():
        yield f"template {len(order)}"
        _tighten()
        _render(tokenizer, [{"role": role, "content": _TURN[role]} for role in order])


def _render(tokenizer: Any, turns: list[dict[str, str]]) -> None:
    for to_answer in (True, False):
        try:
            tokenizer.apply_chat_template(turns, add_generation_prompt=to_answer, tokenize=False)
        except MemoryError:
            raise
        except Exception:  # What it refuses is told where a row is refused.
            continue


def _tighten() -> None:
    """Limit the next step: the time and the memory that this process has taken, and a little more."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    seconds = int(usage.ru_utime + usage.ru_stime) + 1 + STEP_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (min(seconds, most), most))
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (min(pages * os.sysconf("SC_PAGE_SIZE") + STEP_MEMORY, most), most))


if __name__ == "__main__":
    sys.exit(main())
