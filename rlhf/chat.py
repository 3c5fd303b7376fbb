"""Talk to a model in the terminal: `python -m rlhf.chat RUN`.

RUN is a run's directory or a model's. Answers are streamed, with the model's own chat template and the whole
conversation before them; /help lists the commands. Input from a pipe is a message a line, and only the answers are
written to the standard output.
"""

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from rlhf.config.errors import ConfigError, DataError
from rlhf.config.model_directory import check_directory
from rlhf.config.model_files import read_object
from rlhf.config.storage import default_cache, storage_problem
from rlhf.config.terminal import guard_output
from rlhf.interpreter import TALKING, require

if TYPE_CHECKING:
    from rlhf.data.conversation import Message

HELP = """\
/reset   forget the conversation
/help    this list
/exit    end (so does Ctrl-D)
Ctrl-C   stop the answer that is being written"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How answers are sampled. `seed` None: another answer each time."""

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 1.0
    seed: int | None = None
    system: str | None = None
    greedy: bool = False

    def check(self) -> None:
        """Raise ConfigError for values that cannot be sampled with."""
        problems = []
        if self.max_new_tokens < 1:
            problems.append(f"--max-new-tokens {self.max_new_tokens}: must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"--temperature {self.temperature}: must be 0 (the likeliest token) or more")
        if not 0 < self.top_p <= 1:
            problems.append(f"--top-p {self.top_p}: must be above 0 and at most 1")
        if problems:
            raise ConfigError("\n".join(problems))


@dataclass(kw_only=True, slots=True)
class Chat:
    """A model, its tokenizer and the conversation so far."""

    model: Any
    tokenizer: Any
    options: Options
    history: list["Message"] = field(default_factory=list)

    def reset(self) -> None:
        """Forget everything but the system message."""
        from rlhf.data.conversation import Message

        system = self.options.system
        self.history = [Message(role="system", content=system)] if system is not None else []

    def answer(self, text: str, output: TextIO, notices: TextIO) -> None:
        """Write the answer to a message as it comes, and remember both; Ctrl-C stops it and keeps what there is.

        Raises ConfigError if the message alone is too long, and leaves it out of the conversation.
        """
        from rlhf.data.conversation import Message

        question = Message(role="user", content=text)
        prompt_ids, dropped = self._fit([*self.history, question])
        if dropped:
            print(f"(the context is full: the oldest {dropped} messages are forgotten)", file=notices, flush=True)
            kept_from = self._system_messages() + dropped
            self.history = self.history[: self._system_messages()] + self.history[kept_from:]
        written = self._generate(prompt_ids, output)
        self.history += [question, Message(role="assistant", content=written)]

    @property
    def context(self) -> int:
        """The longest sequence that the model takes, in tokens."""
        return int(getattr(self.model.config, "max_position_embeddings", None) or sys.maxsize)

    def _system_messages(self) -> int:
        return int(bool(self.history) and self.history[0].role == "system")

    def _fit(self, messages: list["Message"]) -> tuple[list[int], int]:
        """Token ids of the conversation without its oldest turns, as many as must go, and the messages dropped.

        An answer gets `max_new_tokens` of the context, or a quarter of it if that is less.
        """
        from rlhf.models.tokenizer import encode_prompt

        room = self.context - min(self.options.max_new_tokens, self.context // 4)
        first = self._system_messages()
        dropped = 0
        while True:
            prompt_ids = encode_prompt(self.tokenizer, messages[:first] + messages[first + dropped :])
            if len(prompt_ids) <= room:
                return prompt_ids, dropped
            if first + dropped + 1 >= len(messages):
                raise ConfigError(
                    f"the message has {len(prompt_ids)} tokens with its template; this model takes {room} and an answer"
                )
            dropped += 2

    def _generate(self, prompt_ids: list[int], output: TextIO) -> str:
        import torch

        options = self.options
        sample = not options.greedy and options.temperature > 0
        limit = min(options.max_new_tokens, self.context - len(prompt_ids))
        beyond = range(len(self.tokenizer), self.model.get_input_embeddings().num_embeddings)
        sampling = {"temperature": options.temperature, "top_p": options.top_p, "top_k": 0} if sample else {}
        config = _transformers().GenerationConfig(
            max_new_tokens=limit,
            do_sample=sample,
            eos_token_id=self.model.generation_config.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            suppress_tokens=list(beyond) or None,
            **sampling,
        )
        ids = torch.tensor([prompt_ids], device=self.model.device)
        streamer = make_streamer(self.tokenizer, output, ends=config.eos_token_id)
        try:
            self.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=streamer)
        except KeyboardInterrupt:
            streamer.end()
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise ConfigError(
                "the model's outputs are no numbers (NaN or infinity): its weights or its config.json are damaged"
            ) from error
        return "".join(streamer.pieces)


def make_streamer(tokenizer: Any, output: TextIO, *, ends: int | list[int]) -> Any:
    """A transformers TextStreamer that writes finished text to `output`, ends it with a newline, and keeps it.

    The `ends` of an answer are left out, special tokens or not.
    """
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        """Writes words as soon as no later token can change them. Special tokens are left out."""

        pieces: list[str]

        def put(self, value: Any) -> None:
            """Take the prompt, then one token after the other."""
            if self.next_tokens_are_prompt or int(value[-1]) not in (ends if isinstance(ends, list) else [ends]):
                cast(Any, super()).put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            """Take the next piece of text."""
            self.pieces.append(text)
            output.write(text + ("\n" if stream_end else ""))
            output.flush()

    streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.pieces = []
    return streamer


def find_model(run: Path) -> Path:
    """The directory of the causal model that RUN means.

    A model's directory is itself; a stage's is its model; a pipeline's is the PPO model, or else the newest model of a
    stage that can write. Raises ConfigError if there is none, and for a reward model.
    """
    if os.path.islink(run) and not os.path.exists(run):
        raise ConfigError(f"{run} is a link that leads nowhere: give a run's directory, or a model's")
    if not os.path.exists(run):  # Path.exists raises where a name is too long.
        near = sorted(path.name for path in run.parent.glob("*") if path.is_dir()) if os.path.isdir(run.parent) else []
        hint = f"; {run.parent} has {', '.join(near[:8])}" if near else ""
        raise ConfigError(f"there is no directory {run}{hint}: give a run's directory, such as runs/NAME, or a model's")
    for directory in (run, run / "model", run / "ppo" / "model"):
        if os.path.lexists(directory / "config.json"):
            return _require_causal(directory)
    found = [path.parent for path in run.glob("*/model/config.json") if _writes_text(path.parent)]
    if found:
        return max(found, key=lambda directory: (directory / "config.json").stat().st_mtime)
    raise ConfigError(
        f"{run} holds no model that can write: neither config.json, model/config.json nor <stage>/model/config.json "
        "of a language model. Has the run finished?"
    )


def load_chat(directory: Path, options: Options) -> Chat:
    """Load a model and its tokenizer in the format that it was saved in, on the GPU if there is one."""
    import torch

    from rlhf.models.door import check_tokenizer, check_weights, load_model
    from rlhf.models.load import fit_embedding, set_special_tokens
    from rlhf.models.tokenizer import complete_tokenizer, load_tokenizer

    library = _transformers()
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    check_directory(directory)
    check_tokenizer(directory, cache_dir=default_cache())
    tokenizer = load_tokenizer(directory)
    complete_tokenizer(tokenizer, chat_template=None)
    model = load_model(library.AutoModelForCausalLM, directory, dtype="auto")
    check_weights(model, directory)
    fit_embedding(model, tokenizer)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    # What ends an answer is the model's; nothing else that isn't asked for may come from a file beside the weights.
    set_special_tokens(model, tokenizer)
    if options.seed is not None:
        torch.manual_seed(options.seed)
    chat = Chat(model=model, tokenizer=tokenizer, options=options)
    chat.reset()
    return chat


def converse(chat: Chat, lines: Iterator[str], output: TextIO, notices: TextIO) -> None:
    """Answer each line until the input or the user ends. Commands begin with a slash."""
    for line in lines:
        text = line.strip()
        if text == "/exit":
            return
        if text == "/reset":
            chat.reset()
            print("(forgotten)", file=notices)
        elif text == "/help":
            print(HELP, file=notices)
        elif text.startswith("/"):
            print(f"(there is no command {text.split()[0]}: /help lists them)", file=notices)
        elif text:
            try:
                chat.answer(line.rstrip("\r\n"), output, notices)  # Its indentation is the user's.
            except (ConfigError, DataError) as error:
                print(f"({error})", file=notices)


def typed_lines(output: TextIO) -> Iterator[str]:
    """What somebody types at the terminal, until Ctrl-D. Ctrl-C drops the line that is being typed."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() line editing and a history

    while True:
        try:
            yield input("\nyou> ")
        except EOFError:
            output.write("\n")
            return
        except KeyboardInterrupt:
            output.write("\n(/exit or Ctrl-D ends)")


def parse_arguments(arguments: Sequence[str] | None) -> tuple[Path, Options]:
    """Read the command line; mistakes in it exit with code 2."""
    defaults = Options()
    parser = argparse.ArgumentParser(prog="python -m rlhf.chat", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", metavar="RUN", type=Path, help="directory of a run, of one of its stages, or of a model")
    parser.add_argument("--max-new-tokens", type=int, default=defaults.max_new_tokens, metavar="N")
    parser.add_argument("--temperature", type=float, default=defaults.temperature, metavar="T")
    parser.add_argument("--top-p", type=float, default=defaults.top_p, metavar="P")
    parser.add_argument("--seed", type=int, metavar="S", help="the same answers each time")
    parser.add_argument("--system", metavar="TEXT", help="a system message before the conversation")
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token")
    values = vars(parser.parse_args(arguments))
    run = values.pop("run")
    return run, Options(**values)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the conversation and return the exit code: 0, or 2 for what the user has to change."""
    guard_output(lasting=False)
    require("rlhf.chat", TALKING)
    run, options = parse_arguments(arguments)
    try:
        options.check()
        directory = find_model(run)
        interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if interactive:
            print(f"Loading {directory} …", flush=True)
        chat = load_chat(directory, options)
        if interactive:
            print("Type a message; /help lists the commands.")
        lines = typed_lines(sys.stdout) if interactive else iter(sys.stdin)
        converse(chat, lines, sys.stdout, sys.stdout if interactive else sys.stderr)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except PermissionError as error:
        print(f"error: {storage_problem(error) or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the answers has gone; the interpreter must not fail over flushing to them.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _transformers() -> Any:
    # Loaded late, so that mistakes are told at once; its annotations are too partial for a strict check.
    return importlib.import_module("transformers")


def _writes_text(directory: Path) -> bool:
    return not _architecture(directory).endswith("ForSequenceClassification")


def _require_causal(directory: Path) -> Path:
    if _writes_text(directory):
        return directory
    raise ConfigError(
        f"{directory} is a reward model ({_architecture(directory)}): it scores answers and cannot write them. "
        "Give the directory of the pipeline, or of its sft or ppo stage"
    )


def _architecture(directory: Path) -> str:
    names = read_object(directory / "config.json").get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


if __name__ == "__main__":
    sys.exit(main())
