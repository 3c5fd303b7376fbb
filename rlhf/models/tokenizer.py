"""Tokenizers and chat templates, without torch.

A prepared tokenizer is a directory that plain `transformers` loads: it has BOS or not, an EOS, a PAD distinct from
EOS, and a chat template. Token ids of a prompt and of a response come from `encode_prompts` and `encode_responses`
everywhere, so that training, generation and chat see the same text.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf.config.errors import ConfigError, MissingExtraError
from rlhf.config.schema import ModelConfig, WeightSource
from rlhf.models.turns import Turns, as_turns, named_fields, render, render_all

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
USER, ASSISTANT, SYSTEM = "<|user|>", "<|assistant|>", "<|system|>"
ADDED_PAD = "<|pad|>"

# One special token opens a turn; EOS closes an answer, so several turns follow each other without ambiguity. What an
# assistant writes is marked as generated: other programs find there what the loss is on (TRL's assistant_only_loss).
_SAID = (
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
)
SCRATCH_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}" + _SAID + "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# For pretrained models without a template of their own. An answer starts on its own line: no tokenizer joins its first
# token with the newline before it.
DEFAULT_TEMPLATE = (
    "{% if bos_token %}{{ bos_token }}{% endif %}{% for message in messages %}"
    "{{ message['role'].capitalize() + ':\\n' }}" + _SAID + "{% if message['role'] != 'assistant' %}{{ '\\n\\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)


def load_tokenizer(name_or_path: str | Path, *, revision: str | None = None) -> Any:
    """Load a tokenizer (a transformers PreTrainedTokenizerBase) from a directory or the hub; raises ConfigError.

    A directory with a tokenizer.json is read without importing torch.
    """
    from transformers import PreTrainedTokenizerFast

    directory = Path(name_or_path)
    try:
        if (directory / "tokenizer.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(directory))
            if tokenizer.eos_token_id is not None:
                return tokenizer  # Otherwise the tokenizer's own class knows its special tokens.
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(name_or_path), revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        if directory.is_dir():
            raise ConfigError(f"{directory} holds no tokenizer that can be loaded: {reason}") from error
        raise ConfigError(
            f"the tokenizer of {name_or_path} (revision {revision or 'main'}) could not be loaded: {reason}\n"
            "Check the name and the connection to the Hugging Face hub, or give model.path a local directory"
        ) from error


def _train_bpe(texts: Iterator[str], *, vocab_size: int) -> Any:
    """Train a byte-level BPE: every text can be encoded and decoded without loss."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [BOS, EOS, PAD, USER, ASSISTANT, SYSTEM]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(special) + len(alphabet)
    if vocab_size < least:
        raise ConfigError(f"model.scratch.vocab_size={vocab_size}: must be at least {least} (bytes and special tokens)")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    backend.train_from_iterator(texts, trainer)
    build: Callable[..., Any] = PreTrainedTokenizerFast
    return build(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[USER, ASSISTANT, SYSTEM],
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def package_directory(model: ModelConfig) -> Path:
    """Where the Python package that carries a model's weights is; raises MissingExtraError if it is not installed."""
    package = model.package or ""
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or spec.origin is None:
        raise MissingExtraError(package.replace("_", "-"), model.extra or model.name, f"model={model.name}")
    return Path(spec.origin).parent


def _gguf_tokenizer(model: ModelConfig) -> Any:
    directory = package_directory(model)
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("gguf", model.extra or model.name, f"reading the GGUF file of model={model.name}")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), gguf_file=model.gguf_file, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model={model.name}: {model.gguf_file} in {directory} cannot be read: {error}") from error


def complete_tokenizer(tokenizer: Any, *, chat_template: str | None) -> bool:
    """Give a tokenizer what the pipeline needs and say whether anything changed.

    A PAD that is missing or equal to EOS is replaced: by the unknown token if that is distinct, else by a new token
    `<|pad|>`, for which the model's embedding has to grow by a row. A missing chat template is filled in by
    `chat_template`, or else by a plain default. Raises ConfigError if there is no EOS.
    """
    changed = False
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {tokenizer.name_or_path} has no EOS token: responses could never end")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        unknown = tokenizer.unk_token_id
        usable = unknown is not None and unknown not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
        if usable:
            tokenizer.pad_token = tokenizer.unk_token
        else:
            tokenizer.add_special_tokens({"pad_token": ADDED_PAD})
        changed = True
    if not tokenizer.chat_template:
        tokenizer.chat_template = chat_template or DEFAULT_TEMPLATE
        changed = True
    return changed


def _digest(parts: Sequence[object]) -> str:
    return hashlib.blake2b(json.dumps([str(part) for part in parts]).encode(), digest_size=8).hexdigest()


def _save(tokenizer: Any, target: Path) -> Path:
    """Save under a temporary name and rename, so that a directory that exists is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        tokenizer.save_pretrained(str(temporary))
        temporary.chmod(0o755)
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _directory_digest(directory: Path) -> str:
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json")
    files = [directory / name for name in (*names, "merges.txt", "tokenizer.model")]
    return _digest([(file.name, hashlib.blake2b(file.read_bytes()).hexdigest()) for file in files if file.is_file()])


def prepare_tokenizer(
    model: ModelConfig, *, texts: Callable[[], Iterator[str]], fingerprint: str, cache_dir: Path
) -> Path:
    """Return a directory with the model's tokenizer, complete in the sense of `complete_tokenizer`.

    source=scratch trains a byte-level BPE on `texts()`, which `fingerprint` identifies. Results are kept as
    cache_dir/models/<name>-<digest>/ and found again there; a local directory that lacks nothing is returned as it is.
    """
    from filelock import FileLock

    identity: tuple[object, ...]
    if model.source is WeightSource.scratch:
        identity = (fingerprint, model.scratch.vocab_size, SCRATCH_TEMPLATE, model.chat_template)
    elif model.source is WeightSource.gguf_package:
        file = package_directory(model) / (model.gguf_file or "")
        if not file.is_file():
            raise ConfigError(f"model.gguf_file={model.gguf_file}: the package {model.package} has no such file")
        identity = (model.gguf_file, file.stat().st_size, model.chat_template)
    else:
        if not model.path:
            raise ConfigError("model.path is not set: give it a local directory or ORG/NAME on the Hugging Face hub")
        local = Path(model.path)
        content = _directory_digest(local) if local.is_dir() else (model.path, model.revision)
        identity = (content, model.chat_template, DEFAULT_TEMPLATE)
    target = cache_dir / "models" / f"{model.name or 'model'}-{_digest(identity)}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        return target if target.is_dir() else _build(model, texts=texts, target=target)


def _build(model: ModelConfig, *, texts: Callable[[], Iterator[str]], target: Path) -> Path:
    template = model.chat_template
    if model.source is WeightSource.scratch:
        tokenizer = _train_bpe(texts(), vocab_size=model.scratch.vocab_size)
        complete_tokenizer(tokenizer, chat_template=template or SCRATCH_TEMPLATE)
    elif model.source is WeightSource.gguf_package:
        tokenizer = _gguf_tokenizer(model)
        complete_tokenizer(tokenizer, chat_template=template)
    else:
        path = str(model.path)
        tokenizer = load_tokenizer(path, revision=model.revision)
        if not complete_tokenizer(tokenizer, chat_template=template) and Path(path).is_dir():
            return Path(path)
    return _save(tokenizer, target)


def tokenizer_digest(tokenizer: Any) -> str:
    """Hash of what decides the token ids: vocabulary and rules, special tokens, template; not of their files."""
    rules: object = sorted(tokenizer.get_vocab().items())
    if tokenizer.is_fast:
        stored = json.loads(tokenizer.backend_tokenizer.to_str())
        rules = {key: value for key, value in stored.items() if key not in ("padding", "truncation")}
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return _digest([json.dumps(rules, sort_keys=True), special, tokenizer.chat_template])


def encode_prompts(tokenizer: Any, prompts: Sequence[Sequence[Any]]) -> list[list[int]]:
    """Token ids of prompts through the chat template, up to where the assistant begins to answer.

    A prompt is a sequence of messages: objects with `role`, `content` and perhaps `fields` (see data's Message).
    """
    if not prompts:
        return []
    conversations = [as_turns(prompt) for prompt in prompts]
    texts = render_all(tokenizer, conversations, to_answer=True)
    encoded = [list(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    special = re.compile("|".join(re.escape(token) for token in special_tokens(tokenizer)) or "(?!)")
    for index, turns in enumerate(conversations):
        if special.search(named_fields(tokenizer, turns)):
            raise ConfigError("a control token stands in tool calls, tools or the like, as text")
        if any(special.search(turn["content"]) for turn in turns[0]):
            encoded[index] = _encode_around(tokenizer, texts[index], _placed(tokenizer, turns, texts[index]))
    return encoded


def special_tokens(tokenizer: Any) -> list[str]:
    """Every text that the tokenizer would turn into a control token, longest first."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted({*tokenizer.all_special_tokens, *added} - {""}, key=len, reverse=True)


def _placed(tokenizer: Any, conversation: Turns, text: str) -> list[tuple[int, int]]:
    """Where in a rendered prompt its messages' contents are: [start, end).

    The template is asked where it puts them by rendering other contents in their place. Where it does more with a
    content than strip it, the whole prompt counts as content: no part of it becomes a control token.
    """
    turns, tools = conversation
    marks = [f"\ue000{number}\ue001" for number in range(len(turns))]
    marked = [{**turn, "content": mark} for turn, mark in zip(turns, marks, strict=True)]
    pattern = render(tokenizer, (marked, tools), to_answer=True)
    spans, position = [], 0
    for number, fixed in enumerate(re.split("\ue000[0-9]+\ue001", pattern)):
        if number:
            content = turns[number - 1]["content"]
            used = next((c for c in (content, content.strip()) if text.startswith(c + fixed, position)), None)
            if used is None:
                return [(0, len(text))]
            spans.append((position, position + len(used)))
            position += len(used)
        elif not text.startswith(fixed):
            return [(0, len(text))]
        position += len(fixed)
    return spans


def _encode_around(tokenizer: Any, text: str, spans: list[tuple[int, int]]) -> list[int]:
    """Token ids of a rendered prompt in which special tokens that stand in a message's content are plain text."""
    ids: list[int] = []
    position = 0
    for start, end in spans:
        ids += tokenizer(text[position:start], add_special_tokens=False)["input_ids"]
        ids += tokenizer(text[start:end], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        position = end
    return ids + list(tokenizer(text[position:], add_special_tokens=False)["input_ids"])


def encode_responses(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of answers, each with EOS at its end. Special tokens written out in a text are plain text."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [[*ids, tokenizer.eos_token_id] for ids in encoded]


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of plain texts, BOS at the beginning if the tokenizer has one and EOS at the end."""
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [[*first, *ids] for ids in encode_responses(tokenizer, texts)]


def encode_prompt(tokenizer: Any, messages: Sequence[Any]) -> list[int]:
    """Token ids of one prompt: see `encode_prompts`."""
    return encode_prompts(tokenizer, [messages])[0]


def encode_response(tokenizer: Any, text: str) -> list[int]:
    """Token ids of one answer with EOS: see `encode_responses`."""
    return encode_responses(tokenizer, [text])[0]


def template_agrees(tokenizer: Any, messages: Sequence[Any], response: str) -> bool:
    """Whether prompt ids + response ids are what the template makes of the whole conversation, through its last EOS.

    Of a conversation that the template refuses nothing is known: True.
    """
    from jinja2 import TemplateError

    turns, tools = as_turns(messages)
    try:
        answered = [*turns, {"role": "assistant", "content": response}]
        whole = tokenizer.apply_chat_template(answered, tools=tools, tokenize=False)
        parts = encode_prompt(tokenizer, messages) + encode_response(tokenizer, response)
    except (TemplateError, TypeError, ConfigError):
        return True
    whole_ids = list(tokenizer(whole, add_special_tokens=False)["input_ids"])
    return whole_ids[: len(parts)] == parts
