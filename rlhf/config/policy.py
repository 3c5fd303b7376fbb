"""The options of what policy optimisation is made of: sampling, scoring, averaging, mixed pretraining, health."""

from dataclasses import dataclass

from rlhf.config.choices import Mismatch as Mismatch
from rlhf.config.choices import Normalize as Normalize
from rlhf.config.choices import PtxMode as PtxMode
from rlhf.config.choices import RolloutBackend as RolloutBackend
from rlhf.config.choices import RuleAction as RuleAction
from rlhf.config.fields import option, option_factory

REWARD_MODEL = "reward_model"


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    """Sampling of responses."""

    backend: RolloutBackend = option(
        RolloutBackend.auto,
        "What generates: native (a static cache, continuous batching, compiled on CPUs), vllm (installed beside), hf "
        "(transformers' generate: any model, slowly), or auto: native where it knows the model and, under ZeRO-3, a "
        "copy of the policy fits.",
    )
    temperature: float = option(1.0, "Sampling temperature; log-probabilities use the same.", minimum=0.01)
    top_p: float = option(
        1.0, "Nucleus sampling; values below 1 bias the PPO ratio and are warned about.", above=0, maximum=1
    )
    top_k: int = option(0, "Sample from the k likeliest tokens; 0 for all. Other values bias the PPO ratio.", minimum=0)
    min_p: float = option(
        0.0,
        "Leave out tokens less likely than this share of the likeliest one; 0 for none. Biases the PPO ratio.",
        minimum=0,
        maximum=1,
    )
    repetition_penalty: float = option(
        1.0, "Divides positive logits of tokens that occurred; 1 for none. Biases the PPO ratio.", above=0
    )
    min_new_tokens: int = option(0, "No stop token is drawn before. Biases the PPO ratio.", minimum=0)
    stop_tokens: list[str] = option_factory(list, "Tokens that end a response, beside EOS and the model's own list.")
    stop: list[str] = option_factory(
        list,
        "Texts that end a response; what completes them belongs to it. On the command line \\n is a line break, \\t a "
        "tab, \\r a carriage return and \\\\ a backslash, as in  'rollout.stop=[\"\\n\\n\"]'.",
        escapes=True,
    )
    max_new_tokens: int | None = option(
        None, "Longest response in tokens; null takes data.max_response_length.", minimum=1
    )
    batch_size_per_gpu: int | None = option(
        None, "Prompts generated together on a rank; null for all at once.", minimum=1
    )
    tensor_parallel: int | None = option(
        None,
        "Native decoding: ranks that share the policy's weights while they answer their prompts together; null: one if "
        "the policy fits whole, else the fewest over which it does.",
        minimum=1,
    )
    release_cache: bool | None = option(
        None, "Give the cache of keys and values back after each rollout; null: if it takes a tenth of the free memory."
    )
    mismatch: Mismatch = option(
        Mismatch.hf,
        "If generation and training differ in the tokens' log-probabilities by more than mismatch_tolerance: warn, go "
        "on with hf, or stop the run.",
    )
    mismatch_tolerance: float = option(
        0.1, "Mean difference of log-probabilities between generation and training, in nats per token.", above=0
    )
    importance_cap: float | None = option(
        None,
        "Truncated importance sampling: each token's advantage is multiplied by its probability in training over that "
        "in generation, at most this. For backends that compute otherwise than training; null for none.",
        minimum=1,
    )
    gather: bool | None = option(
        None,
        "Make a copy of the policy for each rollout where generation needs one: gathered under ZeRO-3, with adapters "
        "merged, packed on a CPU without g++. Otherwise the weights are used as they are, which is slower; under "
        "ZeRO-3 by transformers, gathering each layer at each token. null: if it fits.",
    )


@dataclass(kw_only=True, slots=True)
class ScorerConfig:
    """From a response to its score."""

    kind: str = option(
        REWARD_MODEL, "What scores: reward_model, or a module of rlhf/rollout/scorers: function, gsm8k, http."
    )
    others: list[str] = option_factory(
        list, "kind=reward_model: directories of further reward models, whose scores are added to the stage's one's."
    )
    weights: list[float] = option_factory(
        list, "kind=reward_model: weights of the stage's reward model and of the others, in order; empty: 1 each."
    )
    function: str | None = option(
        None,
        "kind=function: FILE.py:NAME or MODULE:NAME of a function score(prompts, responses, **columns) -> list[float].",
    )
    url: str | None = option(None, "kind=http: address that answers POST {prompts, responses, columns} with {scores}.")
    batch_size: int = option(32, "kind=http: responses in one request at most.", minimum=1)
    timeout_seconds: float = option(60.0, "kind=http: how long to wait for a connection and for an answer.", above=0)
    retries: int = option(4, "kind=http: further attempts after a failed one, ever later.", minimum=0)
    normalize: Normalize = option(
        Normalize.model,
        "model: by the mean and standard deviation that each reward model has stored. running: by those of all scores "
        "so far. off: not at all.",
    )
    clip: float | None = option(5.0, "Clip scores to [-clip, clip] after normalisation; null for no clipping.", above=0)
    scale: float = option(1.0, "Factor of the clipped score.", above=0)
    missing_eos_penalty: float = option(2.0, "Taken off the score of a response that does not end with EOS.", minimum=0)
    length_penalty: float = option(0.0, "Taken off for each token of a response beyond length_limit.", minimum=0)
    length_limit: int = option(0, "Tokens of a response, EOS included, that cost no length_penalty.", minimum=0)
    repetition_penalty: float = option(
        0.0, "Taken off times the share of a response's n-grams that occurred before in it.", minimum=0
    )
    repetition_ngram: int = option(3, "Length of those n-grams in tokens.", minimum=1)


@dataclass(kw_only=True, slots=True)
class EmaConfig:
    """An exponential moving average of the policy's weights (Ouyang et al. 2022, appendix C.4: decay 0.992)."""

    decay: float | None = option(
        None, "Share of the average that each optimizer step keeps; null for no average.", above=0, maximum=0.999999
    )
    start_step: int = option(
        0, "Optimizer steps after which averaging begins; before, the average is a copy.", minimum=0
    )
    final_evaluation: bool = option(False, "Evaluate the average at the end instead of the last weights.")


@dataclass(kw_only=True, slots=True)
class PtxConfig:
    """Next-token loss on pretraining text in PPO's optimizer steps (Ouyang et al. 2022, equation 2: PPO-ptx)."""

    coef: float = option(0.0, "Weight of the mean loss per token, or share of the norm; 0 turns it off.", minimum=0)
    mode: PtxMode = option(
        PtxMode.coef,
        "coef: the loss has the weight coef. grad_ratio: the weight is such that the text's gradient has coef times "
        "the norm of the policy's (running means of both; the first step takes coef itself as the weight).",
    )
    batch_size: int | None = option(
        None, "Sequences of text per optimizer step, over all ranks; null: as many as mini_batch_size.", minimum=1
    )


@dataclass(kw_only=True, slots=True)
class RuleConfig:
    """One health rule."""

    action: RuleAction = option(RuleAction.warn, "warn: say it. stop: end the run, with its last good model. off.")
    threshold: float = option(0.0, "Where the rule begins to speak.")


def _rule(threshold: float, doc: str) -> RuleConfig:
    return option_factory(lambda: RuleConfig(threshold=threshold), doc)  # type: ignore[no-any-return]


@dataclass(kw_only=True, slots=True)
class HealthConfig:
    """The health rules: what is looked at in every iteration, each with what to do and where it begins."""

    first_ratio: RuleConfig = _rule(0.05, "Probability ratio of the first update, off 1 by more than the threshold.")
    kl_over_budget: RuleConfig = _rule(1.0, "KL per sequence above threshold × stage.kl_budget.")
    entropy_collapse: RuleConfig = _rule(0.2, "Entropy per token below this share of the first iterations'.")
    length_collapse: RuleConfig = _rule(0.4, "Response length below this share of the first iterations'.")
    length_runaway: RuleConfig = _rule(2.5, "Response length above this multiple of the first iterations'.")
    missing_eos: RuleConfig = _rule(0.5, "Share of responses that were cut off before EOS.")
    explained_variance: RuleConfig = _rule(0.0, "Share of the returns' variance that the critic explains, below this.")
    clip_fraction: RuleConfig = _rule(0.4, "Share of tokens whose update is clipped.")
    over_optimisation: RuleConfig = _rule(
        0.05, "Fall of the judge's positive share from its best while the score rises (needs data.judge)."
    )
    non_finite: RuleConfig = _rule(0.0, "Metrics that are not finite, or more skipped steps than this share.")
    loss_scale: RuleConfig = _rule(1.0, "fp16's loss scale at this floor.")
    equal_scores: RuleConfig = _rule(1e-6, "Standard deviation of a rollout's scores at or below this.")
