"""The data mix: sources, their split over the stages, and limits of rows."""

from dataclasses import dataclass

from rlhf.config.choices import Exhausted, LossOn, OnProblem, Unread
from rlhf.config.fields import option, option_factory

# The format of a source that its rows tell.
AUTO = "auto"


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One source of rows in a data mix."""

    kind: str = option("file", "A module of rlhf/data/sources: file, hub, film_reviews.")
    format: str = option(
        AUTO,
        "A module of rlhf/data/formats: preference, conversational, completion, instruction, transcript, "
        "scored_pair, prompt, text; auto: told by the columns of the first rows.",
    )
    path: str | None = option(None, "File or directory (kind=file), or ORG/NAME on the Hugging Face hub (kind=hub).")
    subset: str | None = option(None, "kind=hub: the subset, which the hub calls configuration.")
    split: str = option(
        "train",
        "kind=hub: the split, as in train or train[:10%]; kind=file: that of a saved DatasetDict, or of a directory "
        "whose names tell train from test.",
    )
    revision: str | None = option(None, "kind=hub: branch, tag or commit.")
    columns: dict[str, str] = option_factory(
        dict, "Where the format's columns are in the rows if they are called otherwise, as in  {prompt: question.text}."
    )
    markers: list[str] = option_factory(
        list,
        "format=transcript: the user's and the assistant's mark; empty: Anthropic's HH's. \\n is as in rollout.stop.",
        escapes=True,
    )
    max_row_bytes: int = option(8 * 1024**2, "Longest row in bytes: a longer one is a bad row.", minimum=1)
    remove: str | None = option(None, "A regular expression of what is taken out of answers, such as citations.")
    keep: list[str] = option_factory(list, "Further columns that a scorer is given, such as a known answer.")
    stages: list[str] = option_factory(
        list, "The stages that may have the rows, as in [sft]; empty: every stage that can use them."
    )
    fraction: float = option(1.0, "Share of the prompts that is used, picked by a hash.", above=0, maximum=1)
    weight: float | None = option(
        None, "Share in the training mix relative to the other sources; null for all: every row is used.", minimum=0
    )
    part: str | None = option(None, "kind=film_reviews: one_liners or long_reviews.")
    opening_words: int = option(2, "kind=film_reviews: words of the review that the prompt gives away.", minimum=1)


@dataclass(kw_only=True, slots=True)
class SplitConfig:
    """How prompts are divided; every prompt belongs to exactly one part."""

    sft: float = option(0.2, "Relative share of the prompts for supervised fine-tuning.", minimum=0)
    rm: float = option(0.4, "Relative share of the prompts for the reward model.", minimum=0)
    ppo: float = option(0.4, "Relative share of the prompts for PPO.", minimum=0)
    held_out: float = option(0.05, "Share of the prompts that no stage trains on and every stage is evaluated on.")
    seed: int = option(0, "Seed of the hash that assigns prompts; the same for all stages of a pipeline.", minimum=0)


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """A mix of data sources and its division over the stages."""

    name: str = option("", "Short name, used for run directories.")
    sources: dict[str, SourceConfig] = option_factory(dict, "The sources by name.")
    split: SplitConfig = option_factory(SplitConfig, "The division over the stages.")
    max_prompt_length: int = option(256, "Longest prompt in tokens, chat template included.", minimum=1)
    max_response_length: int = option(
        256, "Longest response in tokens, EOS included; longer ones are truncated and counted.", minimum=1
    )
    exhausted: Exhausted = option(
        Exhausted.stop,
        "Weighted sources: an epoch ends with the first source that is used up (stop), or with the last one while "
        "the others repeat (repeat).",
    )
    on_bad_row: OnProblem = option(OnProblem.error, "Stop at rows that cannot be used, or skip and count them.")
    on_long_prompt: OnProblem = option(
        OnProblem.error, "Stop at prompts beyond max_prompt_length, or skip and count them."
    )
    unread: Unread = option(
        Unread.list, "Columns and keys of messages that nothing reads: list and count them, or stop (error)."
    )
    loss_on: LossOn = option(
        LossOn.auto,
        "The answers of a conversation that SFT learns: last, all, or auto: all where a row is one conversation.",
    )
    sft_on_rejected: bool = option(False, "Fine-tune on the rejected answers as well as on the chosen ones.")
    workers: int | None = option(
        None, "Processes that tokenise; null: one for each core, or none beside the main one for few rows.", minimum=1
    )
    judge: str | None = option(
        None, "A module of rlhf/data/sources with reviews for an independent judge; null for none."
    )
