"""Vocabularies in the forms in which others keep them, and texts to try them on."""

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptfast import get_tokenizer
from gptfast.tokenizer.train import train_tokenizer

EOT = "<|endoftext|>"
TEXTS = [
    "the cat and the hat, the rat and the bat; 1234 12 1999 don't I'll they're",
    "naïve café déjà vu über Straße   three spaces\n\n\ttabs and  runs \r\n of   white\u3000space",
    "日本語のテキスト 日本語 \u0661\u0662\u0663 привет привет мир 😀😀 👩\u200d👧 e\u0301 \x00\x7f",
] * 3


def base(directory: Path, size: int = 420) -> tuple[dict[str, int], list[str]]:
    """Return the ids and merges of a small vocabulary without end-of-text."""
    train_tokenizer(TEXTS, size, directory)
    vocab = json.loads((directory / "encoder.json").read_text())
    del vocab[EOT]
    return vocab, (directory / "vocab.bpe").read_text().split("\n")[1:-1]


def write(directory: Path, **files: Any) -> None:
    """Write files: vocab_json={...} becomes vocab.json; a string is written as it is."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        stem, _, suffix = name.rpartition("_")
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / f"{stem}.{suffix}").write_bytes(text.encode())


def whole(vocab: dict[str, int], merges: list[str], **others: Any) -> dict[str, Any]:
    """Return the content of a tokenizer.json."""
    space = others.pop("add_prefix_space", False)
    model = {"type": "BPE", "vocab": vocab, "merges": merges, **others.pop("model", {})}
    split = {"type": "ByteLevel", "add_prefix_space": space, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {**split, "use_regex": True},
        "post_processor": None,
        "decoder": {**split, "use_regex": True},
        "model": model,
        **others,
    }


def added(i: int, content: str, **flags: bool) -> dict[str, Any]:
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": i, "content": content, **off, **flags}


@functools.cache
def gpt2_files() -> dict[str, str]:
    return get_tokenizer("gpt2").transformers_files()


def _gpt2(d: Path) -> None:
    write(d, **{name.replace(".", "_"): text for name, text in gpt2_files().items()})


def _gpt2_json(d: Path) -> None:
    files = gpt2_files()
    raw = whole(json.loads(files["vocab.json"]), files["merges.txt"].split("\n")[1:-1])
    del raw["model"]["type"]  # as in the file of GPT-2 itself
    raw["model"] |= {"unk_token": "", "continuing_subword_prefix": "", "end_of_word_suffix": ""}
    raw["added_tokens"] = [added(50256, EOT, special=True, normalized=True)]
    pad = [added(50257, "[PAD]", special=True), added(50258, "<|im_start|>", special=True)]
    raw["added_tokens"] += pad
    write(d, tokenizer_json=raw, tokenizer_config_json={"pad_token": "[PAD]"})


def _crlf(d: Path) -> None:
    vocab, merges = base(d / "base")
    lines = ["#version: 0.3 - by somebody else", *merges]
    write(d, vocab_json={**vocab, EOT: len(vocab)}, merges_txt="\r\n".join(lines) + "\r\n")


def _specials_first(d: Path) -> None:
    vocab, merges = base(d / "base")
    vocab = {token: i + 3 for token, i in vocab.items()}
    vocab |= {"<s>": 0, "</s>": 1, "<unk>": 2}
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": {"content": "<unk>"}}
    write(d, vocab_json=vocab, merges_txt="\n".join(merges), special_tokens_map_json=special)


def _added_tokens(d: Path) -> None:
    vocab, merges = base(d / "base")
    n = len(vocab)
    more = {EOT: n, "[PAD]": n + 1, "<tag>": n + 2, "hat": n + 3}
    special = {"pad_token": "[PAD]", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    write(
        d,
        vocab_json=vocab,
        merges_txt="#version: 0.2\n" + "\n".join(merges) + "\n",
        added_tokens_json=more,
        special_tokens_map_json=special,
        tokenizer_config_json={"tokenizer_class": "GPT2Tokenizer"},
    )


def _prefix_space_bos(d: Path) -> None:
    vocab, merges = base(d / "base")
    config = {"add_prefix_space": True, "add_bos_token": True, "eos_token": "</s>"}
    write(
        d,
        vocab_json={**vocab, EOT: len(vocab), "</s>": len(vocab) + 1},
        merges_txt="#version: 0.2\n" + "\n".join(merges),
        tokenizer_config_json=config,
    )


def _flags(d: Path) -> None:
    vocab, merges = base(d / "base")
    n = len(vocab)
    decoder = {
        n: added(n, EOT, special=True),
        n + 1: added(n + 1, "<mask>", special=True, lstrip=True),
        n + 2: added(n + 2, "[R]", rstrip=True),
        n + 3: added(n + 3, "rat", single_word=True, normalized=True),
        n + 4: added(n + 4, "rat and", lstrip=True, rstrip=True, normalized=True),
        n + 5: added(n + 5, "é", special=False),
    }
    tokens = list(decoder.values())
    write(
        d,
        tokenizer_json=whole(vocab, merges, added_tokens=tokens),
        tokenizer_config_json={
            "tokenizer_class": "GPT2Tokenizer",
            "mask_token": "<mask>",
            "added_tokens_decoder": {str(i): {**t, "id": None} for i, t in decoder.items()},
        },
    )
    config = json.loads((d / "tokenizer_config.json").read_text())
    for token in config["added_tokens_decoder"].values():
        del token["id"]
    write(d, tokenizer_config_json=config)


def _backend(d: Path) -> None:
    vocab, merges = base(d / "base")
    vocab = {"<s>": 0, "</s>": 1, **{token: i + 2 for token, i in vocab.items()}}
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    pairs = [merge.split(" ") for merge in merges]
    tokens = [added(0, "<s>", special=True), added(1, "</s>", special=True)]
    raw = whole(vocab, pairs, added_tokens=tokens, post_processor=template, add_prefix_space=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    write(d, tokenizer_json=raw, tokenizer_config_json=config)


def _odd_merges(d: Path) -> None:
    """Merges in an order that no training gives, a token made in two ways, a pair twice."""
    vocab, merges = base(d / "base")
    merges = [*merges[60:], *merges[:60], *merges[:9]]
    vocab |= {"thecat": len(vocab), "the": vocab.get("the", len(vocab) + 1)}
    extra = [("t", "he"), ("th", "e"), ("the", "cat"), ("c", "at"), ("ca", "t"), ("h", "e")]
    for a, b in [*extra, ("t", "h"), ("a", "t"), ("c", "a")]:
        for token in (a, b, a + b):
            vocab.setdefault(token, max(vocab.values()) + 1)
        merges.append(f"{a} {b}")
    vocab[EOT] = max(vocab.values()) + 1
    write(d, vocab_json=vocab, merges_txt="\n".join(merges))


def _few_bytes(d: Path) -> None:
    """A vocabulary trained without all bytes, whose unknown ones have a token."""
    vocab, merges = base(d / "base")
    lost = [token for token in vocab if len(token) == 1 and ord(token) > 0x7E]
    used = {part for merge in merges for part in merge.split(" ")}
    vocab = {token: i for token, i in vocab.items() if token not in lost or token in used}
    vocab = {token: i for i, token in enumerate(["<unk>", *vocab])}
    model = {"unk_token": "<unk>", "fuse_unk": True, "ignore_merges": True}
    tokens = [added(0, "<unk>", special=True)]
    config = {"tokenizer_class": "TokenizersBackend", "unk_token": "<unk>"}
    raw = whole(vocab, merges, added_tokens=tokens, model=model)
    write(d, tokenizer_json=raw, tokenizer_config_json=config)


def _trained(d: Path) -> None:
    """What the library's own trainer and transformers' save_pretrained write."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2TokenizerFast

    (d / "base").mkdir(parents=True)
    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(
        TEXTS, 380, 2, show_progress=False, special_tokens=["</s>", "<pad>"]
    )
    trainer.save_model(str(d / "base"))
    tokenizer = GPT2TokenizerFast.from_pretrained(d / "base", eos_token="</s>", bos_token="</s>")
    tokenizer.add_special_tokens({"pad_token": "<pad>", "sep_token": "<sep>"})
    tokenizer.add_tokens(["newword", "naïve"])
    tokenizer.save_pretrained(d)


def _no_bytes(d: Path) -> None:
    vocab, merges = base(d / "base")
    del vocab["!"], vocab["\xff"], vocab["Q"]
    write(d, vocab_json={**vocab, EOT: 1000, "<pad>": 1001}, merges_txt="\n".join(merges) + "\n")


SHAPES: dict[str, Callable[[Path], None]] = {
    "gpt2": _gpt2,
    "gpt2-json": _gpt2_json,
    "crlf": _crlf,
    "specials-first": _specials_first,
    "added-tokens": _added_tokens,
    "prefix-space-bos": _prefix_space_bos,
    "flags": _flags,
    "backend": _backend,
    "odd-merges": _odd_merges,
    "few-bytes": _few_bytes,
    "trained": _trained,
    "no-bytes": _no_bytes,
}


def random_texts(n: int, names: list[str], seed: int) -> list[str]:
    """Return random strings: words, digits, white space, any characters, names of tokens."""
    generator = random.Random(seed)
    words = " ".join(TEXTS).split(" ")
    spaces = [" ", "  ", "\n", "\r\n", "\t", "\u3000", "\xa0", "\x1c", "\x85", "\u2028", "   \n "]

    def piece() -> str:
        kind = generator.randrange(8)
        if kind < 2:
            return generator.choice(words)
        if kind == 2:
            return generator.choice(spaces)
        if kind == 3 and names:
            return generator.choice(names)
        if kind == 4:
            code = generator.randrange(generator.choice([0x80, 0x800, 0x3000, 0x20000]))
            return "" if 0xD800 <= code < 0xE000 else chr(code)
        if kind == 5:
            return str(generator.randrange(10 ** generator.randrange(1, 6)))
        if kind == 6:
            return generator.choice("'.,!?-<>[]|'") + generator.choice(["", "s", "t", "re", "LL"])
        return " " + generator.choice(words)

    return ["".join(piece() for _ in range(generator.randrange(1, 14))) for _ in range(n)]
