"""What is wrong with a model directory that a user names: every file of it is looked at before a library reads it.

Libraries answer a wrong type with a traceback, a token id of four billion with a process that aborts or fills the
memory, and a missing layer with random weights. Here each fault is told with its file, field and reason. No torch.
"""

import os
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlhf.config.errors import ConfigError
from rlhf.config.model_files import (
    MIB,
    ModelFileError,
    StoredTensor,
    kind_of,
    read_object,
    read_regular,
    read_text_file,
    stored_tensors,
)
from rlhf.config.model_numbers import finite_faults, head_faults, is_int, shape_faults, size_faults

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
LARGEST_ID = 2**24  # Tokenizers make a table as long as the largest id.
# Which transformers takes from torch by name, whatever the name; only those in which a model can compute.
_DTYPES = re.compile("auto|b?float16|float32|float64|half|float|double|float8_[a-z0-9]+")
_TOKENIZER_LIMIT, _TEMPLATE_LIMIT = 256 * MIB, MIB


def check_directory(directory: Path) -> None:
    """Raise ConfigError with everything that is wrong with a model directory's files."""
    if problems := directory_faults(directory):
        raise ConfigError(*problems)


def check_tokenizer_files(directory: Path) -> None:
    """Raise ConfigError with everything that is wrong with a directory's tokenizer."""
    if problems := _looked_at(directory, tokenizer_faults):
        raise ConfigError(*problems)


def directory_faults(directory: Path) -> list[str]:
    """Everything that is wrong with a model directory's files; a file that is not there is no fault but config.json."""
    return [
        fault
        for look in (config_faults, generation_faults, adapter_faults, weight_faults, tokenizer_faults)
        for fault in _looked_at(directory, look)
    ]


def own_code(directory: Path) -> bool:
    """Whether a model comes with code of its own (auto_map), which is never run."""
    for name in ("config.json", "tokenizer_config.json"):
        try:
            if read_object(directory / name).get("auto_map"):
                return True
        except ModelFileError:
            continue
    return False


def _looked_at(directory: Path, look: Callable[[Path], Iterator[str]]) -> tuple[str, ...]:
    """What a look at a directory finds; looking again at the same files costs nothing."""
    state = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        try:
            facts = path.stat()
        except OSError:  # A link that leads nowhere.
            state.append((path.name, 0, 0, 0))
        else:
            state.append((path.name, facts.st_size, facts.st_mtime_ns, facts.st_ino))
    return _found(directory, look, tuple(state))


@lru_cache(maxsize=64)
def _found(directory: Path, look: Callable[[Path], Iterator[str]], state: Any) -> tuple[str, ...]:
    try:
        return tuple(look(directory))
    except ModelFileError as error:
        return error.problems


def config_faults(directory: Path) -> Iterator[str]:
    """What is wrong with config.json."""
    path = directory / "config.json"
    entries = read_object(path)
    where = f"{path}: "
    if not isinstance(entries.get("model_type"), str):
        kind = kind_of(entries.get("model_type"))
        yield f"{where}model_type is {kind}; it names the architecture, as in opt or llama"
    wrong = list(size_faults(entries))
    yield from (where + fault for fault in wrong)
    yield from (where + fault for fault in (*finite_faults(entries), *_dtype_faults(entries)))
    architectures = entries.get("architectures")
    if architectures is not None and not _is_list_of(architectures, str):
        yield f"{where}architectures is {kind_of(architectures)}; it must be a list of class names"
    for name in _IDS:
        yield from (where + fault for fault in _id_faults(entries, name))
    pad, vocab = entries.get("pad_token_id"), entries.get("vocab_size")
    if not wrong and isinstance(pad, int) and isinstance(vocab, int) and not -1 <= pad < vocab:
        yield f"{where}pad_token_id={pad} is not below vocab_size={vocab}"
    labels = entries.get("id2label")
    if labels is not None and not isinstance(labels, dict):
        yield f"{where}id2label is {kind_of(labels)} where an object belongs"
    for name in ("rope_scaling", "rope_parameters", "quantization_config", "auto_map"):
        value = entries.get(name)
        if value is not None and not isinstance(value, dict):
            yield f"{where}{name} is {kind_of(value)} where an object belongs"
    if not wrong:
        yield from (where + fault for fault in head_faults(entries))


def _dtype_faults(entries: dict[str, Any]) -> Iterator[str]:
    for key in ("dtype", "torch_dtype"):
        value = entries.get(key)
        for one in value.values() if isinstance(value, dict) else [value]:  # One for each part of a model.
            if one is not None and not (isinstance(one, str) and _DTYPES.fullmatch(one)):
                yield f"{key} is {kind_of(one)}; it must be a format of weights, such as float32 or bfloat16"


def _id_faults(entries: dict[str, Any], name: str) -> Iterator[str]:
    value = entries.get(name)
    several = value if isinstance(value, list) and name == "eos_token_id" else [value]
    for one in several:
        if one is not None and not (is_int(one) and -1 <= one < LARGEST_ID):
            yield f"{name} is {kind_of(one)}; it must be a token's id"
            return


def generation_faults(directory: Path) -> Iterator[str]:
    """What is wrong with generation_config.json."""
    path = directory / "generation_config.json"
    if os.path.lexists(path):
        entries = read_object(path)
        yield from (f"{path}: {fault}" for fault in finite_faults(entries))
        for name in _IDS:
            yield from (f"{path}: {fault}" for fault in _id_faults(entries, name))


def adapter_faults(directory: Path) -> Iterator[str]:
    """An adapter is no model; transformers would load another one, which the adapter names, in its place."""
    path = directory / "adapter_config.json"
    if os.path.lexists(path):
        base = read_object(path).get("base_model_name_or_path")
        yield (
            f"{directory} holds an adapter of {str(base)[:200]!r} (adapter_config.json), not a whole model: give the "
            "directory of the merged model"
        )


def weight_faults(directory: Path) -> Iterator[str]:
    """What is wrong with the weights: their files, and what config.json says of their shapes."""
    pickles = sorted(path.name for path in directory.glob("*.bin"))
    if not any(directory.glob("*.safetensors")):
        how = (
            f"only in {pickles[0]}, a pickle, which may run code: convert it to safetensors (save_pretrained of a "
            "recent transformers does)"
            if pickles
            else "no weights (*.safetensors)"
        )
        yield f"{directory} holds {how}"
        return
    tensors: dict[str, StoredTensor] = {}
    whole, index = directory / WEIGHTS, directory / INDEX
    if os.path.lexists(whole):
        tensors = stored_tensors(whole)
    elif os.path.lexists(index):
        faults = list(_shard_faults(directory, index, tensors))
        yield from faults
        if faults:
            return
    else:
        yield f"{directory} holds neither {WEIGHTS} nor {INDEX}, which says in what files the weights are"
        return
    try:
        entries = read_object(directory / "config.json")
    except ModelFileError:
        return  # Told by itself.
    if tensors and not list(size_faults(entries)):
        yield from (f"{directory / 'config.json'}: {fault}" for fault in shape_faults(entries, tensors))


def _shard_faults(directory: Path, index: Path, tensors: dict[str, StoredTensor]) -> Iterator[str]:
    """What is wrong with an index and its files; their tensors are put into `tensors`."""
    entries = read_object(index)
    places, facts = entries.get("weight_map"), entries.get("metadata", {})
    if not isinstance(facts, dict):
        yield f"{index}: metadata is {kind_of(facts)} where an object belongs"
    if not isinstance(places, dict) or not places or not _is_list_of(list(places.values()), str):
        yield f"{index}: weight_map is {kind_of(places)}; it must be an object of tensors' names and files' names"
        return
    for name in sorted(set(places.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            yield f"{index}: names the file {name[:80]!r}; only *.safetensors in the same directory are read"
        elif not os.path.lexists(directory / name):
            yield f"{index}: names {name}, which is not there: the download was not finished"
        else:
            tensors.update(stored_tensors(directory / name))
            if lost := [key for key, where in places.items() if where == name and key not in tensors]:
                yield f"{index}: says that {lost[0][:80]!r} is in {name}, but it is not"


def tokenizer_faults(directory: Path) -> Iterator[str]:
    """What is wrong with a tokenizer's files."""
    path = directory / "tokenizer.json"
    if os.path.lexists(path):
        yield from (f"{path}: {fault}" for fault in _backend_faults(read_object(path, limit=_TOKENIZER_LIMIT)))
    path = directory / "tokenizer_config.json"
    if os.path.lexists(path):
        wrong = list(_tokenizer_config_faults(read_object(path)))
        yield from (f"{path}: {fault}" for fault in wrong)
        if not wrong:
            yield from (f"{path}: {fault}" for fault in _end_faults(directory, read_object(path)))
    for name in ("added_tokens.json", "vocab.json", "special_tokens_map.json"):
        path = directory / name
        if os.path.lexists(path):
            entries = read_object(path, limit=_TOKENIZER_LIMIT)
            faults = _special_faults(entries) if name.startswith("special") else _vocabulary_faults(entries, name)
            yield from (f"{path}: {fault}" for fault in faults)
    for name, limit in (("chat_template.jinja", _TEMPLATE_LIMIT), ("merges.txt", _TOKENIZER_LIMIT)):
        if os.path.lexists(directory / name):
            read_text_file(directory / name, limit=limit)
    if os.path.lexists(directory / "tokenizer.model"):
        read_regular(directory / "tokenizer.model", limit=_TOKENIZER_LIMIT)


def _end_faults(directory: Path, entries: dict[str, Any]) -> Iterator[str]:
    """An EOS that no file has an id for becomes a new token, of which the model knows nothing."""
    end = entries.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    path, more = directory / "tokenizer.json", directory / "added_tokens.json"
    if not end or not os.path.lexists(path):
        return
    backend = read_object(path, limit=_TOKENIZER_LIMIT)
    model, added = backend.get("model"), [*(backend.get("added_tokens") or [])]
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # Unigram: pairs of a token and its score.
        vocabulary = [pair[0] for pair in vocabulary if isinstance(pair, list) and pair]
    added += (entries.get("added_tokens_decoder") or {}).values()
    known = [token.get("content") for token in added if isinstance(token, dict)]
    known += read_object(more, limit=_TOKENIZER_LIMIT) if os.path.lexists(more) else []
    if end not in (vocabulary or []) and end not in known:
        yield f"eos_token is {end[:40]!r}, which is no token of {path.name}: the model has learnt nothing of it"


def _backend_faults(entries: dict[str, Any]) -> Iterator[str]:
    model, added = entries.get("model"), entries.get("added_tokens")
    if not isinstance(model, dict):
        yield f"model is {kind_of(model)} where an object belongs"
    else:
        vocabulary = model.get("vocab")
        if isinstance(vocabulary, dict):
            yield from _vocabulary_faults(vocabulary, "model.vocab")
        elif not isinstance(vocabulary, list):
            yield f"model.vocab is {kind_of(vocabulary)} where an object or a list belongs"
    if added is not None and not _is_list_of(added, dict):
        yield f"added_tokens is {kind_of(added)}; it must be a list of objects"
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and not _is_token_id(token.get("id")):
            yield f"added_tokens: the id of {str(token.get('content'))[:40]!r} is {_id_kind(token.get('id'))}"
            return


def _vocabulary_faults(vocabulary: dict[str, Any], name: str) -> Iterator[str]:
    wrong = next(((token, number) for token, number in vocabulary.items() if not _is_token_id(number)), None)
    if wrong is not None:
        yield f"{name}: the id of {wrong[0][:40]!r} is {_id_kind(wrong[1])}"
    elif len(set(vocabulary.values())) < len(vocabulary):
        first: dict[int, str] = {}
        for token, number in vocabulary.items():
            if number in first:
                yield f"{name}: {first[number][:40]!r} and {token[:40]!r} have the same id {number}"
                return
            first[number] = token


def _tokenizer_config_faults(entries: dict[str, Any]) -> Iterator[str]:
    yield from _special_faults(entries)
    template = entries.get("chat_template")
    if template is not None and not _is_template(template):
        yield f"chat_template is {kind_of(template)}; it must be a text, or a list of objects with name and template"
    longest = entries.get("model_max_length")
    if longest is not None and (isinstance(longest, bool) or not isinstance(longest, int | float) or not longest > 0):
        yield f"model_max_length is {kind_of(longest)}; it must be a number above 0"
    kind = entries.get("tokenizer_class")
    if kind is not None and not isinstance(kind, str):
        yield f"tokenizer_class is {kind_of(kind)}; it must be a class name"
    added = entries.get("added_tokens_decoder")
    if added is not None and not isinstance(added, dict):
        yield f"added_tokens_decoder is {kind_of(added)} where an object belongs"
    for key, token in added.items() if isinstance(added, dict) else ():
        if not re.fullmatch("[0-9]{1,9}", key) or int(key) >= LARGEST_ID:
            yield f"added_tokens_decoder: {key[:24]!r} is no token's id below {LARGEST_ID:,}"
            return
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            yield f"added_tokens_decoder: the token {key} is {kind_of(token)}; it must be an object with content"
            return


def _is_template(value: Any) -> bool:
    """A text, or several with names, in either of the two forms of transformers."""
    if isinstance(value, dict):
        return _is_list_of(list(value.values()), str)
    listed = value if isinstance(value, list) else []
    named = [isinstance(one, dict) and _is_list_of([one.get("name"), one.get("template")], str) for one in listed]
    return isinstance(value, str) or (bool(named) and all(named))


def _special_faults(entries: dict[str, Any]) -> Iterator[str]:
    for name in _SPECIAL:
        value = entries.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if value is not None and not (isinstance(text, str) and text):
            yield f"{name} is {kind_of(value)}; it must be a token's text"


def _is_token_id(value: Any) -> bool:
    return is_int(value) and 0 <= value < LARGEST_ID


def _id_kind(value: Any) -> str:
    return f"{kind_of(value)}; ids go from 0 to {LARGEST_ID - 1:,}"


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(one, kind) for one in value)
