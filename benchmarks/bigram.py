"""Perplexity of a bigram model on the held-out answers of SFT: what a language model has to beat.

python benchmarks/bigram.py [OVERRIDE ...]        the overrides are those of launch.py
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

Ids = NDArray[np.int64]


class KneserNeyBigram:
    """Interpolated Kneser-Ney bigram over token ids (Chen and Goodman 1999, section 2.7).

    p(w | v) = max(c(v w) - d, 0) / c(v) + d n(v) / c(v) * q(w)
    q(w)     = max(m(w) - d, 0) / M + d k / M * 1/V

    c counts occurrences, n(v) distinct successors of v, m(w) distinct predecessors of w, M = sum m, k = number of w
    with m(w) > 0. The discount d is n1 / (n1 + 2 n2), of the numbers of bigrams seen once and twice. q is itself
    interpolated with the uniform distribution, so that no token has probability zero.
    """

    def __init__(self, sequences: Iterable[Sequence[int]], *, vocab_size: int) -> None:
        """Count the bigrams of the sequences; ids are below `vocab_size`."""
        keys = [_bigram_keys(np.asarray(sequence, dtype=np.int64), vocab_size) for sequence in sequences]
        self.vocab_size = vocab_size
        self.keys, self.counts = np.unique(np.concatenate(keys), return_counts=True)
        once, twice = int((self.counts == 1).sum()), int((self.counts == 2).sum())
        self.discount = once / (once + 2 * twice) if once else 0.5
        first, second = self.keys // vocab_size, self.keys % vocab_size
        self.context_counts = np.bincount(first, weights=self.counts, minlength=vocab_size)
        self.successors = np.bincount(first, minlength=vocab_size)
        predecessors = np.bincount(second, minlength=vocab_size)
        kinds, total = int((predecessors > 0).sum()), int(predecessors.sum())
        self.continuation = (np.maximum(predecessors - self.discount, 0.0) + self.discount * kinds / vocab_size) / total

    def probabilities(self, previous: Ids, current: Ids) -> NDArray[np.float64]:
        """p(current | previous), elementwise."""
        wanted = previous * self.vocab_size + current
        place = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        count = np.where(self.keys[place] == wanted, self.counts[place], 0)
        context = self.context_counts[previous]
        safe = np.maximum(context, 1)
        backoff = np.where(context > 0, self.discount * self.successors[previous] / safe, 1.0)
        return np.asarray(np.maximum(count - self.discount, 0.0) / safe + backoff * self.continuation[current])

    def perplexity(self, prompts: Iterable[Sequence[int]], responses: Iterable[Sequence[int]]) -> float:
        """exp of the mean negative log-probability of the response tokens, the first given the prompt's last token."""
        previous, current = [], []
        for prompt, response in zip(prompts, responses, strict=True):
            previous.append([prompt[-1], *response[:-1]])
            current.append(list(response))
        probability = self.probabilities(np.concatenate(previous), np.concatenate(current))
        return float(np.exp(-np.log(probability).mean()))


def _bigram_keys(sequence: Ids, vocab_size: int) -> Ids:
    return np.asarray(sequence[:-1] * vocab_size + sequence[1:], dtype=np.int64)


def main() -> None:
    """Fit on the SFT training part of the configured data, print the held-out perplexity as JSON."""
    from hydra import compose, initialize_config_dir

    from rlhf.models.tokenizer import load_tokenizer
    from rlhf.stages import from_composed, register_schemas
    from rlhf.stages.preflight import preflight

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", help="configuration overrides as for launch.py")
    overrides = parser.parse_args().overrides
    register_schemas()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = from_composed(compose("config", overrides=overrides))
    prepared = preflight(config)
    train, held_out = (prepared.data.part("sft", held_out=is_held_out) for is_held_out in (False, True))
    stage = getattr(config.stage, "sft", config.stage)
    held_out = held_out.select(range(min(stage.eval_examples, len(held_out))))  # Those that SFT is evaluated on.
    sequences = ([*row["prompt_ids"], *row["chosen_ids"]] for row in train)
    model = KneserNeyBigram(sequences, vocab_size=len(load_tokenizer(prepared.tokenizer_dir)))
    figures = {
        "perplexity": round(model.perplexity(held_out["prompt_ids"], held_out["chosen_ids"]), 2),
        "discount": round(model.discount, 3),
        "train_rows": len(train),
        "held_out_rows": len(held_out),
        "data_fingerprint": prepared.data.fingerprint,
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
