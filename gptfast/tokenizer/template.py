"""The steps of a tokenizer.json before and after its model, as far as GPT-2 has them."""

from typing import Any

from gptfast.tokenizer.words import SPLIT


def check_pre_tokenizer(described: Any) -> bool:
    """Return whether a pre-tokenizer puts a space before a text.

    There are two descriptions of GPT-2's split: the library's own, and `train_tokenizer`'s. Raises
    ValueError for any other, by its name.
    """
    if not described:
        raise ValueError("it has no pre-tokenizer; GPT-2's is ByteLevel")
    *before, last = described.get("pretokenizers", [described])
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    for step in before:
        if step != split:
            name = "Split by another pattern" if step["type"] == "Split" else step["type"]
            raise ValueError(f"it has the pre-tokenizer {name}, which GPT-2's tokenizer has not")
    if last["type"] != "ByteLevel":
        raise ValueError(f"it has the pre-tokenizer {last['type']}, and GPT-2's is ByteLevel")
    own_split = last.get("use_regex", True)
    if bool(before) == own_split or len(before) > 1:
        how = "splits text twice" if before else "does not split text into words"
        raise ValueError(f"its pre-tokenizer {how}, which GPT-2's tokenizer does once")
    if before and last["add_prefix_space"]:
        raise ValueError("its pre-tokenizer puts a space before each word, which GPT-2's does not")
    return bool(last["add_prefix_space"])


def around(described: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that a post-processor puts before and after a text.

    Raises ValueError for one that does something else, by its name.
    """
    if not described or described["type"] == "ByteLevel":
        return (), ()
    kind = described["type"]
    if kind == "Sequence":
        before: tuple[int, ...] = ()
        after: tuple[int, ...] = ()
        for step in described["processors"]:
            first, last = around(step)
            before, after = first + before, after + last
        return before, after
    if kind in ("RobertaProcessing", "BertProcessing"):
        return (int(described["cls"][1]),), (int(described["sep"][1]),)
    if kind != "TemplateProcessing":
        raise ValueError(f"it has the post-processor {kind}, which GPT-2's tokenizer has not")
    ids: tuple[list[int], list[int]] = ([], [])
    texts = 0
    for piece in described["single"]:
        if "Sequence" in piece:
            texts += 1
        else:
            token = described["special_tokens"][piece["SpecialToken"]["id"]]
            ids[texts > 0].extend(map(int, token["ids"]))
    if texts != 1:
        raise ValueError(f"its post-processor's template has the text {texts} times, not once")
    return tuple(ids[0]), tuple(ids[1])
