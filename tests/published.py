"""Miniature tokenizers with chat templates that are built as published families' are. Written anew, and small."""

from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# A system turn of its own where there is none.
QWEN25 = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}"
) + CHATML
# Thoughts are cut out of former answers, and an empty thought stands before the last one.
QWEN3 = (
    "{% for m in messages %}{% set content = m['content'] %}{% if m['role'] == 'assistant' %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}"
    "{{ '<|im_start|>assistant\\n' }}{% if loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ content + '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\\n' + content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA31 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: 26 Jul 2024\\n\\n' + system + '<|eot_id|>' }}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'"
    " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Its marks of roles are plain text.
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A family: `own` is what its generation_config.json says ends a response, `end` what the template writes there."""

    template: str
    special: tuple[str, ...]
    eos: str
    end: str
    own: tuple[str, ...]
    bos: str | None = None
    adds_bos: bool = False
    pad: str | None = None
    plain: tuple[str, ...] = ()  # Added tokens that are not called special.
    takes_space: bool = False  # Whether control tokens take the white space behind them.


FAMILIES: dict[str, Family] = {
    "chatml": Family(
        template=CHATML,
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        eos="<|im_end|>",
        end="<|im_end|>",
        own=("<|im_end|>",),
    ),
    "qwen2.5": Family(
        template=QWEN25,
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        eos="<|im_end|>",
        end="<|im_end|>",
        own=("<|im_end|>", "<|endoftext|>"),
        pad="<|endoftext|>",
    ),
    "qwen3": Family(
        template=QWEN3,
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        eos="<|im_end|>",
        end="<|im_end|>",
        own=("<|im_end|>", "<|endoftext|>"),
        pad="<|endoftext|>",
        plain=("<think>", "</think>"),
    ),
    "qwen3-base": Family(  # Its tokenizer's EOS ends documents.
        template=QWEN3,
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        eos="<|endoftext|>",
        end="<|im_end|>",
        own=("<|endoftext|>",),
        pad="<|endoftext|>",
        plain=("<think>", "</think>"),
    ),
    "llama3.1": Family(
        template=LLAMA31,
        special=(
            *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
            *("<|eot_id|>", "<|eom_id|>"),
        ),
        bos="<|begin_of_text|>",
        adds_bos=True,
        eos="<|eot_id|>",
        end="<|eot_id|>",
        own=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    ),
    "gemma": Family(
        template=GEMMA,
        special=("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        adds_bos=True,
        eos="<eos>",
        end="<end_of_turn>",
        own=("<eos>", "<end_of_turn>"),
        pad="<pad>",
        plain=("\n\n",),
    ),
    "mistral": Family(
        template=MISTRAL,
        special=("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        bos="<s>",
        adds_bos=True,
        eos="</s>",
        end="</s>",
        own=("</s>",),
    ),
    "phi3": Family(
        template=PHI3,
        special=("<unk>", "<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        bos="<s>",
        eos="<|endoftext|>",
        end="<|end|>",
        own=("<|endoftext|>", "<|assistant|>", "<|end|>"),
        pad="<|endoftext|>",
        takes_space=True,
    ),
    "zephyr": Family(
        template=ZEPHYR,
        special=("<unk>", "<s>", "</s>"),
        bos="<s>",
        adds_bos=True,
        eos="</s>",
        end="</s>",
        own=("</s>",),
        pad="</s>",
    ),
    "yi": Family(  # The end of a turn is an added token that is not called special.
        template=CHATML,
        special=("<unk>", "<|startoftext|>", "<|endoftext|>"),
        eos="<|endoftext|>",
        end="<|im_end|>",
        own=("<|im_end|>",),
        plain=("<|im_start|>", "<|im_end|>"),
    ),
}


def tokenizer_of(name: str) -> Any:
    """A family's tokenizer: its special tokens, and one token for each byte."""
    family = FAMILIES[name]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False, rstrip=family.takes_space) for token in family.special]
    )
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.plain])
    if family.adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{family.bos}:0 $A:0", special_tokens=[(family.bos, backend.token_to_id(family.bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.pad,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = family.template
    return tokenizer
