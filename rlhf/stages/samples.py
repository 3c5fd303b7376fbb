"""A few answers of a trained model, for the report."""

from rlhf.data.collate import collate_prompts
from rlhf.rollout.generate import Generator
from rlhf.rollout.score import ended_with_eos, response_texts
from rlhf.stages.session import Session


def record_samples(session: Session, generator: Generator, *, step: int, count: int = 10) -> None:
    """Answer a few held-out prompts: PPO's, so that its answers can stand beside them, or else another stage's."""
    stage = next((name for name in ("ppo", "sft", "rm") if session.data.has_part(name, held_out=True)), None)
    if stage is None:
        return
    rows = session.data.part(stage, held_out=True)
    rows = rows.select(range(min(count, len(rows)))).to_list()
    prompts = collate_prompts(rows, pad_id=session.pad_id).to(session.device)
    rollout = generator.generate(prompts, seed=session.config.seed)
    ended = ended_with_eos(rollout, ends=generator.sampling.stop_ids).tolist()
    lengths = rollout.response_mask.sum(dim=1).tolist()
    texts = response_texts(rollout, session.tokenizer)
    session.recorder.samples(
        step,
        [
            {
                "prompt": row["prompt_text"],
                "responses": {session.config.stage.name: {"text": text, "tokens": length, "ended": end}},
            }
            for row, text, length, end in zip(rows, texts, lengths, ended, strict=True)
        ],
    )
