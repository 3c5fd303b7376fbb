"""A row or two of every data set in conf/source, with the columns that the real one has, and what is to come of it."""

from typing import Any

from rlhf.data.conversation import Message

USER, ASSISTANT = "user", "assistant"
HH = "\n\nHuman: Where is it?\n\nAssistant: There.\n\nHuman: Where exactly?\n\nAssistant:"
TURNS = [(USER, "Where is it?"), (ASSISTANT, "There."), (USER, "Where exactly?")]
PASSAGE = {"docid": "1#0", "title": "題", "text": "正しい文。"}
MKQA = {
    "example_id": "5",
    "queries": {"en": "who sings it", "zh_cn": "谁演唱的", "ja": "誰が歌っていますか"},
    "query": "who sings it",
    "answers": {
        "en": [{"type": 0, "entity": "Q1", "text": "Dave Edmunds", "aliases": []}],
        "zh_cn": [{"type": 0, "entity": "Q1", "text": "戴夫·埃德蒙兹", "aliases": []}],
        "ja": [{"type": 0, "entity": "Q1", "text": "デイヴ・エドモンズ", "aliases": ["x"]}],
    },
}


def shp(score_a: int, score_b: int) -> dict[str, Any]:
    """A row of SHP."""
    row: dict[str, Any] = {"post_id": "a", "domain": "askacademia_train", "upvote_ratio": 0.9, "history": "What now?"}
    row |= {"c_root_id_A": "b", "c_root_id_B": "c", "created_at_utc_A": 1, "created_at_utc_B": 2}
    row |= {"score_A": score_a, "score_B": score_b, "human_ref_A": "A it is.", "human_ref_B": "B it is."}
    return row | {"labels": int(score_a > score_b), "seconds_difference": 1.0, "score_ratio": 2.0}


def webgpt(score_0: float, score_1: float) -> dict[str, Any]:
    """A row of WebGPT's comparisons."""
    row: dict[str, Any] = {"question": {"dataset": "eli5", "id": "x", "full_text": "Why?"}}
    for side, score in (("0", score_0), ("1", score_1)):
        quotes = {"title": ["T"], "extract": ["E"]}
        tokens = {"prefix": [1], "completion": [2]}
        answer = f"Because of {side} [1], and [2, 3] more."
        row |= {f"quotes_{side}": quotes, f"answer_{side}": answer, f"tokens_{side}": tokens, f"score_{side}": score}
    return row


def turns(*pairs: tuple[str, str]) -> tuple[Message, ...]:
    """Messages."""
    return tuple(Message(role, content) for role, content in pairs)


CHAT = [{"content": "Say hi.", "role": USER}]
# Source -> rows, and for each the turns of the prompt, chosen, rejected and what is kept; None for a dropped tie.
HUB_ROWS: dict[str, tuple[list[dict[str, Any]], list[Any]]] = {
    "rm_static": (
        [{"prompt": HH, "response": " Here.", "chosen": " Here.", "rejected": " No idea."}],
        [(TURNS, "Here.", "No idea.", {})],
    ),
    "full_hh_rlhf": (
        [{"prompt": HH, "response": " Here.", "chosen": " Here.", "rejected": " No idea."}],
        [(TURNS, "Here.", "No idea.", {})],
    ),
    "synthetic_instruct": (
        [{"prompt": "Name a colour.", "chosen": "Red.", "rejected": "Seven."}],
        [([(USER, "Name a colour.")], "Red.", "Seven.", {})],
    ),
    "rlhf_reward": (
        [
            {"prompt": "Human: Name a colour.\n\n", "chosen": "Assistant: Red.", "rejected": "Assistant: Seven."},
            {"prompt": HH.removesuffix("Assistant:"), "chosen": "Assistant: Here.", "rejected": "Assistant: No."},
        ],
        [([(USER, "Name a colour.")], "Red.", "Seven.", {}), (TURNS, "Here.", "No.", {})],
    ),
    "webgpt": (
        [webgpt(0.5, -0.5), webgpt(-1.0, 1.0), webgpt(0.0, 0.0)],
        [
            ([(USER, "Why?")], "Because of 0, and more.", "Because of 1, and more.", {}),
            ([(USER, "Why?")], "Because of 1, and more.", "Because of 0, and more.", {}),
            None,
        ],
    ),
    "shp": (
        [shp(9, 3), shp(3, 9), shp(4, 4)],
        [
            ([(USER, "What now?")], "A it is.", "B it is.", {}),
            ([(USER, "What now?")], "B it is.", "A it is.", {}),
            None,
        ],
    ),
    "sharegpt": (
        [{"prompt": "USER: Where is it? ASSISTANT: There. USER: Where exactly? ASSISTANT:", "label": "Here."}],
        [(TURNS, "Here.", None, {})],
    ),
    "hh_rlhf": (
        [{"chosen": f"{HH} Here.", "rejected": f"{HH} No idea."}],
        [(TURNS, "Here.", "No idea.", {})],
    ),
    "ultrafeedback": (
        [
            {
                "prompt": "Say hi.",
                "prompt_id": "x",
                "chosen": [*CHAT, {"content": "Hi!", "role": ASSISTANT}],
                "rejected": [*CHAT, {"content": "No.", "role": ASSISTANT}],
                "messages": [*CHAT, {"content": "Hi!", "role": ASSISTANT}],
                "score_chosen": 9.0,
                "score_rejected": 2.0,
            }
        ],
        [([(USER, "Say hi.")], "Hi!", "No.", {})],
    ),
    "tldr": (
        [{"prompt": "SUBREDDIT: r/x\n\nPOST: long\n\nTL;DR:", "completion": " Short."}],
        [([(USER, "SUBREDDIT: r/x\n\nPOST: long\n\nTL;DR:")], " Short.", None, {})],
    ),
    "zhihu": (
        [{"INSTRUCTION": "为什么？", "RESPONSE": "因为。", "SOURCE": "Zhihu", "METADATA": "{}"}],
        [([(USER, "为什么？")], "因为。", None, {})],
    ),
    "miracl_zh": (
        [
            {
                "query_id": "1",
                "query": "哪里？",
                "positive_passages": [PASSAGE],
                "negative_passages": [{**PASSAGE, "text": "错。"}],
                "emb": [0.1],
            }
        ],
        [([(USER, "哪里？")], "正しい文。", "错。", {})],
    ),
    "miracl_ja": (
        [
            {
                "query_id": "1",
                "query": "どこ？",
                "positive_passages": [PASSAGE],
                "negative_passages": [{**PASSAGE, "text": "違う。"}],
                "emb": [0.1],
            }
        ],
        [([(USER, "どこ？")], "正しい文。", "違う。", {})],
    ),
    "hc3_zh": (
        [{"id": "0", "question": "为什么？", "human_answers": ["因为。", "不知道。"], "chatgpt_answers": ["机器。"]}],
        [([(USER, "为什么？")], "因为。", None, {})],
    ),
    "mkqa_zh": ([MKQA], [([(USER, "谁演唱的")], "戴夫·埃德蒙兹", None, {})]),
    "mkqa_ja": ([MKQA], [([(USER, "誰が歌っていますか")], "デイヴ・エドモンズ", None, {})]),
    "qg_jaquad": (
        [
            {
                "question": "誰？",
                "sentence": "彼だ。",
                "answer": "彼",
                "paragraph": "彼だ。終わり。",
                "paragraph_id": "1",
            }
        ],
        [([(USER, "誰？")], "彼だ。", None, {})],
    ),
    "qag_jaquad": (
        [
            {
                "questions": ["誰？", "何？"],
                "answers": ["彼", "それ"],
                "paragraph": "彼だ。それだ。",
                "paragraph_id": "1",
            }
        ],
        [([(USER, "誰？")], "彼だ。それだ。", None, {})],
    ),
    "gsm8k": (
        [{"question": "2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}],
        [([(USER, "2 + 3?")], "2 + 3 = <<2+3=5>>5\n#### 5", None, {"answer": "2 + 3 = <<2+3=5>>5\n#### 5"})],
    ),
}
