"""Tokenizers and chat templates, without torch.

A prepared tokenizer is a directory that plain `transformers` loads: it has BOS or not, an EOS, a PAD distinct from
EOS, and a chat template. Token ids of a prompt and of a response come from `encode_prompts` and `encode_responses`
everywhere, so that training, generation and chat see the same text.
"""

import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf.config.errors import ConfigError, MissingExtraError
from rlhf.config.model_directory import check_tokenizer_files
from rlhf.config.schema import ModelConfig, WeightSource
from rlhf.config.templates import chat_template_text
from rlhf.config.writing import whole_directory
from rlhf.models.door import check_tokenizer, digest, files_digest, reason
from rlhf.models.template import encoded, end_of_turn, plain_ids
from rlhf.models.turns import as_turns, token_ids

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
    if os.path.isdir(directory):  # Path.is_dir raises where a name is too long.
        check_tokenizer_files(directory)
    try:
        if os.path.isfile(directory / "tokenizer.json"):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(directory))
            if tokenizer.eos_token_id is not None:
                return tokenizer  # Otherwise the tokenizer's own class knows its special tokens.
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(name_or_path), revision=revision, trust_remote_code=False)
    except BaseException as error:  # What native code raises is no Exception.
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        if os.path.isdir(directory):
            raise ConfigError(f"{directory} holds no tokenizer that can be loaded: {reason(error)}") from error
        raise ConfigError(
            f"the tokenizer of {name_or_path} (revision {revision or 'main'}) could not be loaded: {reason(error)}\n"
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

    `chat_template` wins over the tokenizer's own; where there is neither it gets a plain one. A PAD that is missing, or
    that ends an answer, is replaced: by the unknown token if that is distinct, else by a new token `<|pad|>`, for which
    the model's embedding has to grow by a row. Raises ConfigError if there is no EOS.
    """
    changed = False
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {tokenizer.name_or_path} has no EOS token: responses could never end")
    template = chat_template or tokenizer.chat_template or DEFAULT_TEMPLATE
    if tokenizer.chat_template != template:
        tokenizer.chat_template = template
        changed = True
    ends = (tokenizer.eos_token_id, end_of_turn(tokenizer))
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        unknown = tokenizer.unk_token_id
        if unknown is not None and unknown not in (*ends, tokenizer.bos_token_id):
            tokenizer.pad_token = tokenizer.unk_token
        else:
            tokenizer.add_special_tokens({"pad_token": ADDED_PAD})
        changed = True
    return changed


def _save(tokenizer: Any, target: Path) -> Path:
    with whole_directory(target) as partial:
        tokenizer.save_pretrained(str(partial))
    return target


def prepare_tokenizer(
    model: ModelConfig, *, texts: Callable[[], Iterator[str]], fingerprint: str, cache_dir: Path
) -> Path:
    """Return a directory with the model's tokenizer, complete in the sense of `complete_tokenizer`.

    source=scratch trains a byte-level BPE on `texts()`, which `fingerprint` identifies. Results are kept as
    cache_dir/models/<name>-<digest>/ and found again there; a local directory that lacks nothing is returned as it is.
    """
    from filelock import FileLock

    model = replace(model, chat_template=chat_template_text(model.chat_template))
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
        content = files_digest(local) if local.is_dir() else (model.path, model.revision)
        identity = (content, model.chat_template, DEFAULT_TEMPLATE)
        if local.is_dir():
            check_tokenizer(local, cache_dir=cache_dir, chat_template=model.chat_template)
    target = cache_dir / "models" / f"{model.name or 'model'}-{digest(identity)}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        return target if target.is_dir() else _build(model, texts=texts, target=target, cache_dir=cache_dir)


def _build(model: ModelConfig, *, texts: Callable[[], Iterator[str]], target: Path, cache_dir: Path) -> Path:
    template = model.chat_template
    local = False
    if model.source is WeightSource.scratch:
        tokenizer = _train_bpe(texts(), vocab_size=model.scratch.vocab_size)
    elif model.source is WeightSource.gguf_package:
        tokenizer = _gguf_tokenizer(model)
    else:
        tokenizer = load_tokenizer(str(model.path), revision=model.revision)
        local = Path(str(model.path)).is_dir()
    if not local and (template or tokenizer.chat_template):  # Those of a local directory have been tried.
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            check_tokenizer(
                Path(folder), cache_dir=cache_dir, chat_template=template, name=model.path or f"model={model.name}"
            )
    if model.source is WeightSource.scratch:
        template = template or SCRATCH_TEMPLATE
    if not complete_tokenizer(tokenizer, chat_template=template) and local:
        return Path(str(model.path))
    return _save(tokenizer, target)


def tokenizer_digest(tokenizer: Any) -> str:
    """Hash of what decides the token ids: vocabulary and rules, special tokens, template; not of their files."""
    rules: object = sorted(tokenizer.get_vocab().items())
    if tokenizer.is_fast:
        stored = json.loads(tokenizer.backend_tokenizer.to_str())
        rules = {key: value for key, value in stored.items() if key not in ("padding", "truncation")}
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return digest([json.dumps(rules, sort_keys=True), special, tokenizer.chat_template])


def encode_prompts(tokenizer: Any, prompts: Sequence[Sequence[Any]]) -> list[list[int]]:
    """Token ids of prompts through the chat template, up to where the assistant begins to answer.

    A prompt is a sequence of messages: objects with `role`, `content` and perhaps `fields` (see data's Message).
    """
    if not prompts:
        return []
    return encoded(tokenizer, [as_turns(prompt) for prompt in prompts], to_answer=True)


def encode_responses(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of answers, each with the end that the template writes. Control tokens in a text are plain text."""
    end = end_of_turn(tokenizer)
    return [[*ids, end] for ids in plain_ids(tokenizer, texts)]


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of plain texts: what the tokenizer itself puts before a text, such as BOS, and EOS at the end."""
    whole, bare = (token_ids(tokenizer, ["a"], add_special_tokens=special)[0] for special in (True, False))
    starts = (start for start in range(len(whole)) if whole[start : start + len(bare)] == bare)
    first = whole[: next(starts, 0)]
    return [[*first, *ids, tokenizer.eos_token_id] for ids in plain_ids(tokenizer, texts)]


def encode_prompt(tokenizer: Any, messages: Sequence[Any]) -> list[int]:
    """Token ids of one prompt: see `encode_prompts`."""
    return encode_prompts(tokenizer, [messages])[0]


def encode_response(tokenizer: Any, text: str) -> list[int]:
    """Token ids of one answer with its end: see `encode_responses`."""
    return encode_responses(tokenizer, [text])[0]


def template_agrees(tokenizer: Any, messages: Sequence[Any], response: str) -> bool:
    """Whether prompt ids + response ids are what the template makes of the whole conversation, through its last EOS.

    Of a conversation that the template refuses nothing is known: True.
    """
    turns, tools = as_turns(messages)
    answered = [*turns, {"role": "assistant", "content": response}]
    try:
        (whole,) = encoded(tokenizer, [(answered, tools)], to_answer=False)
        parts = encode_prompt(tokenizer, messages) + encode_response(tokenizer, response)
    except ConfigError:
        return True
    return whole[: len(parts)] == parts
