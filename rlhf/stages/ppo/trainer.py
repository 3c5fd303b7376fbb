"""Experience and updates of PPO."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from rlhf.batch import Experience, PromptBatch, Rollout
from rlhf.engine.distributed import all_reduce_sum, rank, world_size
from rlhf.engine.update import optimizer_step
from rlhf.functional.advantages import gae
from rlhf.functional.kl import adaptive_kl_coef, kl_k1, per_sequence_kl
from rlhf.functional.losses import policy_loss, value_loss
from rlhf.functional.masking import masked_moments, masked_whiten
from rlhf.functional.rewards import token_rewards
from rlhf.rollout.forward import (
    in_micro_batches,
    response_logprobs,
    response_logprobs_and_entropy,
    response_values,
)
from rlhf.rollout.generate import generate
from rlhf.rollout.score import RewardModelScorer, ended_with_eos
from rlhf.stages.ppo.engine import DeepSpeedRLHFEngine
from rlhf.stages.session import sampling_of
from rlhf.tracking.metrics import MetricAccumulator
from rlhf.tracking.recorder import Recorder


class DeepSpeedPPOTrainer:
    """The two halves of a PPO iteration: `generate_experience` and `train_rlhf`.

    Args:
        engine: the four engines.
        args: the run's configuration (the engine's own if not given).
        accumulator: where metrics are summed; a new one if not given.
        recorder: where the seconds of each phase are noted, if given.
    """

    def __init__(
        self,
        *,
        engine: DeepSpeedRLHFEngine,
        args: Any = None,
        accumulator: MetricAccumulator | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.engine = engine
        self.args = args if args is not None else engine.args
        self.stage = engine.stage
        self.metrics = accumulator or MetricAccumulator(device=engine.actor.device)
        self._recorder = recorder
        self.kl_coef = self.stage.kl_coef
        self.iteration = 0
        self._first_update = False
        self.shown_warnings: set[str] = set()
        self.sampling = sampling_of(self.args)
        self.scorer = RewardModelScorer(
            engine=engine.reward,
            mean=engine.score_mean if self.args.scorer.normalize else 0.0,
            std=engine.score_std if self.args.scorer.normalize else 1.0,
            clip=self.args.scorer.clip,
            missing_eos_penalty=self.args.scorer.missing_eos_penalty,
            micro_batch_size=self.stage.micro_batch_size_per_gpu,
            tokenizer=engine.tokenizer,
            reward_tokenizer=engine.reward_tokenizer,
        )
        # Its own generator: the order of the updates does not depend on how much was sampled.
        self._shuffle = torch.Generator().manual_seed(self.args.seed * 1000 + rank())

    def generate_experience(self, prompts: PromptBatch) -> Experience:
        """Sample a response to each prompt and compute all that the update needs. Every rank must call.

        Args:
            prompts: this rank's prompts [B, P], left-padded.

        Returns:
            An experience of B rows on the engines' device. Log-probabilities and values are those of the present
            actor and critic, in evaluation mode and without gradient.
        """
        self.iteration += 1
        engine, phase = self.engine, self._phase
        engine.train()
        with phase("generation"):
            rollout = generate(
                engine.actor,
                prompts.to(engine.actor.device),
                tokenizer=engine.tokenizer,
                sampling=self.sampling,
                vocab_limit=engine.vocab_limit,
            )
        with phase("scoring"):
            ended = ended_with_eos(rollout, eos_id=int(engine.tokenizer.eos_token_id))
            scores = self.scorer(prompts, rollout, ended)
            old_logprobs = self._logprobs(engine.actor, rollout)
            ref_logprobs = self._logprobs(engine.reference, rollout)
            old_values = self._in_micro_batches(lambda part: response_values(engine.critic, part), rollout)
        rewards = token_rewards(scores, old_logprobs, ref_logprobs, rollout.response_mask, kl_coef=self.kl_coef)
        advantages, returns = gae(
            rewards, old_values, rollout.response_mask, gamma=self.stage.gamma, gae_lambda=self.stage.gae_lambda
        )
        if self.stage.whiten_advantages:
            mean, variance = masked_moments(advantages, rollout.response_mask, all_reduce=all_reduce_sum)
            advantages = masked_whiten(advantages, rollout.response_mask, mean=mean, variance=variance)
        experience = Experience(
            sequence_ids=rollout.sequence_ids,
            prompt_mask=rollout.prompt_mask,
            response_mask=rollout.response_mask,
            scores=scores,
            old_logprobs=old_logprobs,
            ref_logprobs=ref_logprobs,
            old_values=old_values,
            rewards=rewards,
            advantages=advantages,
            returns=returns,
        )
        self._record_rollout(experience, ended)
        return experience

    def train_rlhf(self, experience: Experience) -> tuple[float, float]:
        """Train actor and critic on an experience, for `ppo_epochs` passes. Every rank must call.

        Args:
            experience: what `generate_experience` returned.

        Returns:
            Mean actor loss and mean critic loss per response token on this rank.
        """
        totals = torch.zeros(3)
        with self._phase("training"):
            for index, mini_batch in enumerate(self._mini_batches(experience)):
                num_tokens = float(all_reduce_sum(mini_batch.response_mask.sum().float()))
                micro_batches = mini_batch.split(self.stage.micro_batch_size_per_gpu)
                critic = optimizer_step(self.engine.critic, micro_batches, self._critic_loss, num_targets=num_tokens)
                self._record_step("critic", critic.grad_norm, critic.learning_rate, critic.applied)
                totals[1] += critic.loss_sum.cpu()
                if self.iteration > self.stage.critic_warmup_iterations:
                    self._first_update = index == 0
                    actor = optimizer_step(self.engine.actor, micro_batches, self._actor_loss, num_targets=num_tokens)
                    self._record_step("actor", actor.grad_norm, actor.learning_rate, actor.applied)
                    totals[0] += actor.loss_sum.cpu()
                totals[2] += mini_batch.response_mask.sum().cpu()
        self._adapt_kl_coef(experience)
        return float(totals[0] / totals[2]), float(totals[1] / totals[2])

    def _phase(self, name: str) -> AbstractContextManager[None]:
        return self._recorder.phase(name) if self._recorder is not None else nullcontext()

    def _mini_batches(self, experience: Experience) -> Iterator[Experience]:
        """This rank's share of each mini-batch, shuffled anew in every epoch."""
        share = len(experience) * self.stage.mini_batch_size // self.stage.rollout_batch_size
        for _ in range(self.stage.ppo_epochs):
            order = torch.randperm(len(experience), generator=self._shuffle).to(experience.scores.device)
            for start in range(0, len(experience), share):
                yield experience.rows(order[start : start + share])

    def _actor_loss(self, part: Experience) -> Tensor:
        logprobs, entropy = response_logprobs_and_entropy(
            self.engine.actor,
            part.rollout,
            temperature=self.sampling.temperature,
            vocab_limit=self.engine.vocab_limit,
        )
        loss, stats = policy_loss(
            logprobs,
            part.old_logprobs,
            part.advantages,
            part.response_mask,
            clip_range=self.stage.clip_range,
            dual_clip=self.stage.dual_clip,
        )
        tokens = part.response_mask.sum()
        self.metrics.add("actor/loss", loss.detach(), tokens)
        self.metrics.add("actor/entropy", entropy.sum(), tokens)
        self.metrics.add("actor/clip_fraction", stats.clipped, tokens)
        self.metrics.add("actor/approx_kl", stats.approx_kl, tokens)
        self.metrics.add("actor/ratio", stats.ratio, tokens)
        if self._first_update:
            self.metrics.maximum("actor/first_ratio_error", stats.max_ratio_error)
        return loss

    def _critic_loss(self, part: Experience) -> Tensor:
        values = response_values(self.engine.critic, part.rollout)
        loss, stats = value_loss(
            values,
            part.old_values,
            part.returns,
            part.response_mask,
            value_clip_range=self.stage.value_clip_range,
        )
        tokens = part.response_mask.sum()
        self.metrics.add("critic/loss", loss.detach(), tokens)
        self.metrics.add("critic/clip_fraction", stats.clipped, tokens)
        return loss

    def _logprobs(self, engine: Any, rollout: Rollout) -> Tensor:
        return self._in_micro_batches(
            lambda part: response_logprobs(
                engine, part, temperature=self.sampling.temperature, vocab_limit=self.engine.vocab_limit
            ),
            rollout,
        )

    def _in_micro_batches(self, compute: Any, rollout: Rollout) -> Tensor:
        return in_micro_batches(compute, rollout, micro_batch_size=self.stage.micro_batch_size_per_gpu)

    def _record_rollout(self, experience: Experience, ended: Tensor) -> None:
        mask, rows = experience.response_mask, len(experience)
        tokens = mask.sum()
        kl = per_sequence_kl(experience.old_logprobs, experience.ref_logprobs, mask)
        errors = torch.where(mask, experience.returns - experience.old_values, 0.0)
        returns = torch.where(mask, experience.returns, 0.0)
        add = self.metrics.add
        add("rollout/score", experience.scores.sum(), rows)
        add("rollout/score_square", experience.scores.square().sum(), rows)
        add("rollout/kl_per_sequence", kl.sum(), rows)
        add("rollout/kl_per_token", kl_k1(experience.old_logprobs, experience.ref_logprobs)[mask].sum(), tokens)
        add("rollout/response_length", tokens.float(), rows)
        add("rollout/eos_rate", ended.float().sum(), rows)
        add("rollout/reward", experience.rewards.sum(), rows)
        add("rollout/tokens", (experience.prompt_mask.sum() + tokens) * world_size(), 1)
        add("critic/error_square", errors.square().sum(), tokens)
        add("critic/error", errors.sum(), tokens)
        add("critic/return_square", returns.square().sum(), tokens)
        add("critic/return", returns.sum(), tokens)

    def _record_step(self, name: str, grad_norm: float, learning_rate: float, applied: bool) -> None:
        self.metrics.add(f"{name}/grad_norm", grad_norm, 1)
        self.metrics.add(f"{name}/learning_rate", learning_rate, 1)
        self.metrics.add(f"{name}/skipped_steps", float(not applied), 1)

    def _adapt_kl_coef(self, experience: Experience) -> None:
        if self.stage.kl_target is None:
            return
        kl = per_sequence_kl(experience.old_logprobs, experience.ref_logprobs, experience.response_mask)
        total, count = all_reduce_sum(torch.stack([kl.sum(), torch.tensor(float(len(kl)), device=kl.device)])).tolist()
        self.kl_coef = adaptive_kl_coef(
            self.kl_coef,
            observed_kl=total / count,
            target=self.stage.kl_target,
            horizon=self.stage.kl_horizon,
            num_sequences=int(count),
        )
