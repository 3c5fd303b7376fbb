"""Try a tokenizer and its chat template: run as a process of its own by `rlhf.models.door.check_tokenizer`."""

import sys
from pathlib import Path

_TURNS = [
    {"role": "user", "content": "A question?"},
    {"role": "assistant", "content": "An answer."},
    {"role": "user", "content": "Another one?"},
]


def main() -> int:
    """Load, encode and render; the step that is under way is printed first, and what goes wrong to stderr."""
    from rlhf.config.errors import ConfigError
    from rlhf.models.tokenizer import load_tokenizer

    print("load", flush=True)
    try:
        tokenizer = load_tokenizer(Path(sys.argv[1]))
        tokenizer.decode(tokenizer("A question?\n\n  é 映画")["input_ids"])
    except (ConfigError, MemoryError) as error:
        print(str(error) or "it takes too much memory", file=sys.stderr)
        return 2
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print("template", flush=True)
    for turns in (_TURNS[:1], _TURNS[:2], _TURNS):
        try:
            if tokenizer.chat_template:
                tokenizer.apply_chat_template(turns, add_generation_prompt=len(turns) != 2, tokenize=False)
        except MemoryError:
            print("it takes too much memory", file=sys.stderr)
            return 2
        except Exception:  # What it refuses is told where a row is refused.
            continue
    return 0


if __name__ == "__main__":
    sys.exit(main())
