"""Experience and updates of PPO."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf.batch import Experience, PromptBatch, Rollout, SFTBatch
from rlhf.config.choices import KlPlacement, Mismatch, PtxMode
from rlhf.config.errors import ConfigError, StoppedError
from rlhf.config.validate import raise_problems
from rlhf.engine.distributed import all_reduce_sum, rank, world_size
from rlhf.engine.update import Objective, StepResult, optimizer_step
from rlhf.functional.advantages import importance_weights
from rlhf.functional.kl import adaptive_kl_coef, kl_k1, kl_k2, per_sequence_kl
from rlhf.functional.losses import PolicyLossStats, policy_loss, value_loss
from rlhf.functional.masking import masked_moments, masked_sum, masked_whiten
from rlhf.functional.rewards import token_rewards
from rlhf.planner.memory import mix_problems
from rlhf.rollout.advantages import Estimator, Signals, estimator
from rlhf.rollout.forward import (
    in_groups,
    next_token_loss,
    response_logprobs,
    response_logprobs_and_entropy,
    response_values,
)
from rlhf.rollout.grouping import micro_batches
from rlhf.rollout.mixing import GradientRatio
from rlhf.rollout.parity import compare, disagreement
from rlhf.rollout.score import ended_with_eos
from rlhf.rollout.shaping import Scorer
from rlhf.stages.ppo.engine import DeepSpeedRLHFEngine
from rlhf.stages.scoring import build_scorer, build_shaping
from rlhf.stages.session import generator_of
from rlhf.tracking.metrics import MetricAccumulator
from rlhf.tracking.recorder import Recorder

PolicyLoss = Callable[..., tuple[Tensor, PolicyLossStats]]


class DeepSpeedPPOTrainer:
    """The two halves of a PPO iteration: `generate_experience` and `train_rlhf`.

    Args:
        engine: the engines.
        args: the run's configuration (the engine's own if not given).
        accumulator: where metrics are summed; a new one if not given.
        recorder: where the seconds of each phase are noted, if given.
        scorer: what scores responses instead of `args.scorer.kind`: called with this rank's prompts and rollout, it
            returns one number for each [B], which is clipped, scaled and punished as `args.scorer` says.
        advantage: what estimates advantages, instead of what `stage.advantage` says.
        loss: the actor's loss, instead of `rlhf.functional.losses.policy_loss`, and called like it: a sum over tokens.
        pretraining: endless batches of text for the pretraining mix, `stage.ptx_batch_size` sequences for all ranks.
    """

    def __init__(
        self,
        *,
        engine: DeepSpeedRLHFEngine,
        args: Any = None,
        accumulator: MetricAccumulator | None = None,
        recorder: Recorder | None = None,
        scorer: Scorer | None = None,
        advantage: Estimator | None = None,
        loss: PolicyLoss | None = None,
        pretraining: Iterator[SFTBatch] | None = None,
    ) -> None:
        self.engine = engine
        self.args = args if args is not None else engine.args
        self.stage = engine.stage
        self.metrics = accumulator or MetricAccumulator(device=engine.actor.device)
        self._recorder = recorder
        self.kl_coef = self.stage.kl_coef
        self.iteration = 0
        self._first_update = False
        self.generator = generator_of(self.args, engine.actor, engine.tokenizer, vocab_limit=engine.vocab_limit)
        self.sampling = self.generator.sampling
        self.scorer = scorer or self._scorer()
        self.shaping = build_shaping(self.args.scorer)
        self.advantage = advantage or estimator(self.stage.advantage, key="stage.advantage")
        self.loss = loss or policy_loss
        if self.stage.ptx_batch_size and pretraining is None:
            raise ConfigError(f"stage.ptx.coef={self.stage.ptx.coef}: give the trainer its text, pretraining=…")
        self.pretraining = pretraining
        ptx = self.stage.ptx
        self.ptx_ratio = GradientRatio(ptx.coef) if ptx.coef and ptx.mode is PtxMode.grad_ratio else None
        raise_problems(mix_problems(self.args))
        # Its own generator: the order of the updates does not depend on how much was sampled.
        self._shuffle = torch.Generator().manual_seed(self.args.seed * 1000 + rank())

    def generate_experience(self, prompts: PromptBatch) -> Experience:
        """Sample responses to each prompt and compute all that the update needs. Every rank must call.

        Args:
            prompts: this rank's prompts [B / group_size, P], left-padded.

        Returns:
            An experience of B rows on the engines' device (its `update_order` on the CPU), the `group_size` answers to
            a prompt one behind the other.
            Log-probabilities and values are those of the present actor and critic, in evaluation mode and without
            gradient; values are 0 without a critic.
        """
        engine, stage, phase = self.engine, self.stage, self._phase
        wanted = stage.rollout_batch_size // stage.group_size // world_size()
        if len(prompts) != wanted:
            raise ValueError(
                f"{len(prompts)} prompts on this rank: stage.rollout_batch_size={stage.rollout_batch_size} responses "
                f"are {wanted} prompts × group_size={stage.group_size} × {world_size()} ranks"
            )
        self.iteration += 1
        engine.train()
        prompts = prompts.repeat(stage.group_size)
        with phase("generation"):
            # A response depends on its prompt's place in the global batch, not on the rank that answers it.
            streams = torch.arange(len(prompts)) + rank() * len(prompts)
            rollout = self.generator.generate(
                prompts.to(engine.actor.device), seed=self.args.seed * 1_000_003 + self.iteration, streams=streams
            )
        with phase("scoring"):
            ended = ended_with_eos(rollout, ends=self.sampling.stop_ids)
            scores = self.shaping(self.scorer(prompts, rollout), rollout, ended, all_reduce=all_reduce_sum)
            order = torch.randperm(len(rollout), generator=self._shuffle)
            groups = [group for mini_batch in self._groups(rollout, order) for group in mini_batch]
            old_logprobs = self._logprobs(engine.actor, rollout, groups)
            self._check_parity(rollout, old_logprobs)
            ref_logprobs = self._logprobs(engine.reference, rollout, groups)
            values = None if engine.critic is None else self._values(rollout, groups)
        in_reward = self.kl_coef if stage.kl_placement is KlPlacement.reward else 0.0
        rewards = token_rewards(scores, old_logprobs, ref_logprobs, rollout.response_mask, kl_coef=in_reward)
        advantages, returns = self._advantages(rewards, scores, rollout.response_mask, values)
        advantages = self._corrected(advantages, rollout, old_logprobs)
        experience = Experience(
            sequence_ids=rollout.sequence_ids,
            prompt_mask=rollout.prompt_mask,
            response_mask=rollout.response_mask,
            scores=scores,
            old_logprobs=old_logprobs,
            ref_logprobs=ref_logprobs,
            old_values=torch.zeros_like(rewards) if values is None else values,
            rewards=rewards,
            advantages=advantages,
            returns=returns,
            update_order=order,
        )
        self._record_rollout(experience, ended)
        return experience

    def train_rlhf(self, experience: Experience) -> tuple[float, float]:
        """Train actor and critic on an experience, for `ppo_epochs` passes. Every rank must call.

        Args:
            experience: what `generate_experience` returned.

        Returns:
            Mean actor loss and mean critic loss per response token on this rank; the latter is 0 without a critic.
        """
        totals = torch.zeros(3)
        with self._phase("training"):
            for index, micro_batches in enumerate(self._mini_batches(experience)):
                tokens = torch.stack([part.response_mask.sum() for part in micro_batches]).sum()
                num_tokens = float(all_reduce_sum(tokens.float()))
                if self.engine.critic is not None:
                    objective = Objective(
                        micro_batches=micro_batches, loss_sum=self._critic_loss, num_targets=num_tokens
                    )
                    result = optimizer_step(self.engine.critic, objective)
                    self._record_step("critic", result)
                    totals[1] += result.loss_sum.cpu()
                if self.iteration > self.stage.critic_warmup_iterations:
                    self._first_update = index == 0
                    totals[0] += self._actor_step(micro_batches, num_tokens).cpu()
                totals[2] += tokens.cpu()
        self._adapt_kl_coef(experience)
        return float(totals[0] / totals[2]), float(totals[1] / totals[2])

    def _actor_step(self, micro_batches: list[Experience], num_tokens: float) -> Tensor:
        """One optimizer step of the actor, the pretraining mix included; returns the policy loss's sum."""
        objectives: list[Objective[Any]] = [
            Objective(micro_batches=micro_batches, loss_sum=self._actor_loss, num_targets=num_tokens)
        ]
        if self.stage.ptx_batch_size:
            objectives.append(self._ptx_objective())
        result = optimizer_step(self.engine.actor, *objectives)
        self._record_step("actor", result)
        if result.own_norms:
            self._record_mix(*result.own_norms, weight=objectives[1].weight)
        if self.engine.average is not None and result.applied:
            self.engine.average.update()
        return result.loss_sum

    def _ptx_objective(self) -> Objective[Any]:
        assert self.pretraining is not None, "stage.ptx needs an iterator of text"
        batch = next(self.pretraining).to(self.engine.actor.device)
        num_targets = float(all_reduce_sum(batch.loss_mask[:, 1:].sum().float()))

        def loss_sum(part: SFTBatch) -> Tensor:
            loss = next_token_loss(self.engine.actor, part, vocab_limit=self.engine.vocab_limit)
            self.metrics.add("ptx/loss", loss.detach(), part.loss_mask[:, 1:].sum())
            return loss

        micro_batches = batch.split(self.stage.micro_batch_size_per_gpu)
        weight = self.stage.ptx.coef if self.ptx_ratio is None else self.ptx_ratio.weight
        return Objective(micro_batches=micro_batches, loss_sum=loss_sum, num_targets=num_targets, weight=weight)

    def _record_mix(self, policy_norm: float, text_norm: float, *, weight: float) -> None:
        if self.ptx_ratio is not None:
            self.ptx_ratio.update(policy_norm, text_norm)
        self.metrics.add("ptx/weight", weight, 1)
        if math.isfinite(policy_norm) and math.isfinite(text_norm):
            self.metrics.add("ptx/policy_grad_norm", policy_norm, 1)
            self.metrics.add("ptx/grad_norm", text_norm, 1)

    def _advantages(
        self, rewards: Tensor, scores: Tensor, mask: Tensor, values: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        stage = self.stage
        advantages, returns = self.advantage(
            Signals(
                rewards=rewards,
                scores=scores,
                mask=mask,
                values=values,
                group_size=stage.group_size,
                gamma=stage.gamma,
                gae_lambda=stage.gae_lambda,
            )
        )
        if advantages.shape != mask.shape or returns.shape != mask.shape:
            raise ConfigError(
                f"stage.advantage={stage.advantage}: returned advantages {list(advantages.shape)} and returns "
                f"{list(returns.shape)} instead of {list(mask.shape)}"
            )
        if stage.whiten_advantages:
            mean, variance = masked_moments(advantages, mask, all_reduce=all_reduce_sum)
            advantages = masked_whiten(advantages, mask, mean=mean, variance=variance)
        return advantages, returns

    def _scorer(self) -> Scorer:
        return build_scorer(
            self.args.scorer,
            self.engine.rewards,
            tokenizer=self.engine.tokenizer,
            reward_tokenizer=self.engine.reward_tokenizer,
            micro_batch_size=self.stage.micro_batch_size_per_gpu,
        )

    def _phase(self, name: str) -> AbstractContextManager[None]:
        return self._recorder.phase(name) if self._recorder is not None else nullcontext()

    def _mini_batches(self, experience: Experience) -> Iterator[list[Experience]]:
        """The micro-batches of each optimizer step: this rank's rows, shuffled anew in every pass over them."""
        rollout = experience.rollout
        lengths = rollout.attention_mask.sum(dim=1).cpu()
        order = experience.update_order.cpu()
        if not torch.equal(order.sort().values, torch.arange(len(experience))):
            # Rows were left out or put together since: there is no pass to repeat.
            order = torch.randperm(len(experience), generator=self._shuffle)
        for epoch in range(self.stage.ppo_epochs):
            if epoch:
                order = torch.randperm(len(experience), generator=self._shuffle)
            for groups in self._groups(rollout, order):
                widths = [lengths[group] for group in groups]
                places = sum(len(width) * int(width.max()) for width in widths)
                self.metrics.add(
                    "actor/padding_share", float(places - sum(int(width.sum()) for width in widths)), places
                )
                yield [experience.rows(group) for group in groups]

    def _groups(self, rollout: Rollout, order: Tensor) -> list[list[Tensor]]:
        """The rows of the micro-batches of each mini-batch of a pass that takes the rows in the given order."""
        share = len(rollout) * self.stage.mini_batch_size // self.stage.rollout_batch_size
        lengths = rollout.attention_mask.sum(dim=1).cpu()
        size = self.stage.micro_batch_size_per_gpu
        return [micro_batches(rows, lengths, size=size) for rows in torch.split(order, share)]

    def _actor_loss(self, part: Experience) -> Tensor:
        logprobs, entropy = response_logprobs_and_entropy(
            self.engine.actor,
            part.rollout,
            temperature=self.sampling.temperature,
            vocab_limit=self.engine.vocab_limit,
        )
        loss, stats = self.loss(
            logprobs,
            part.old_logprobs,
            part.advantages,
            part.response_mask,
            clip_range=self.stage.clip_range,
            dual_clip=self.stage.dual_clip,
        )
        if self.stage.kl_placement is KlPlacement.loss:
            loss = loss + self.kl_coef * masked_sum(kl_k2(logprobs, part.ref_logprobs), part.response_mask)
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

    def _values(self, rollout: Rollout, groups: list[Tensor]) -> Tensor:
        return in_groups(lambda part: response_values(self.engine.critic, part), rollout, groups)

    def _logprobs(self, engine: Any, rollout: Rollout, groups: list[Tensor]) -> Tensor:
        compute = partial(
            response_logprobs, engine, temperature=self.sampling.temperature, vocab_limit=self.engine.vocab_limit
        )
        return in_groups(compute, rollout, groups)

    def _corrected(self, advantages: Tensor, rollout: Rollout, computed: Tensor) -> Tensor:
        """Advantages of tokens that were drawn from a slightly other distribution than the one that is trained."""
        cap = self.args.rollout.importance_cap
        if cap is None or rollout.sampled_logprobs is None:
            return advantages
        weights = importance_weights(computed, rollout.sampled_logprobs, rollout.response_mask, cap=cap)
        self.metrics.add("rollout/importance_weight", weights.sum(), rollout.response_mask.sum())
        return advantages * weights

    def _check_parity(self, rollout: Rollout, computed: Tensor) -> None:
        """Hold the sampled tokens' log-probabilities against those of training, which are needed anyway."""
        if rollout.sampled_logprobs is None:
            return
        options = self.args.rollout
        mean = compare(rollout.sampled_logprobs, computed, rollout.response_mask, metrics=self.metrics)
        found = disagreement(mean, tolerance=options.mismatch_tolerance, iteration=self.iteration)
        if found is None:
            return
        if options.mismatch is Mismatch.stop:
            raise StoppedError(f"stopped: {found}; rollout=hf generates with transformers")
        if options.mismatch is Mismatch.hf:
            self.generator.fall_back(found)
            without = "" if options.importance_cap is None else ", so that rollout.importance_cap does nothing"
            found = f"{found}; transformers generates from now on (rollout.mismatch=hf){without}"
        (warnings.warn if self._recorder is None else self._recorder.line)(f"warning: {found}")

    def _record_rollout(self, experience: Experience, ended: Tensor) -> None:
        mask, rows = experience.response_mask, len(experience)
        tokens = mask.sum()
        kl = per_sequence_kl(experience.old_logprobs, experience.ref_logprobs, mask)
        add = self.metrics.add
        add("rollout/score", experience.scores.double().sum(), rows)
        add("rollout/score_square", experience.scores.double().square().sum(), rows)
        add("rollout/kl_per_sequence", kl.sum(), rows)
        add("rollout/kl_per_token", kl_k1(experience.old_logprobs, experience.ref_logprobs)[mask].sum(), tokens)
        add("rollout/response_length", tokens.float(), rows)
        add("rollout/eos_rate", ended.float().sum(), rows)
        add("rollout/reward", experience.rewards.sum(), rows)
        add("rollout/tokens", (experience.prompt_mask.sum() + tokens) * world_size(), 1)
        if self.engine.critic is None:
            return
        errors = torch.where(mask, experience.returns - experience.old_values, 0.0)
        returns = torch.where(mask, experience.returns, 0.0)
        add("critic/error_square", errors.square().sum(), tokens)
        add("critic/error", errors.sum(), tokens)
        add("critic/return_square", returns.square().sum(), tokens)
        add("critic/return", returns.sum(), tokens)

    def _record_step(self, name: str, result: StepResult) -> None:
        known = math.isfinite(result.grad_norm)
        self.metrics.add(f"{name}/grad_norm", result.grad_norm if known else 0.0, float(known))
        self.metrics.add(f"{name}/learning_rate", result.learning_rate, 1)
        self.metrics.add(f"{name}/skipped_steps", float(not result.applied), 1)
        if result.loss_scale is not None:
            # The lowest of the iteration.
            self.metrics.maximum(f"{name}/inverse_loss_scale", 1.0 / result.loss_scale)

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
