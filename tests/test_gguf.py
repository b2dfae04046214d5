"""GGUF, llama.cpp's form: what the library and llama.cpp read of it, what is read, what refused."""

import json
import struct
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Capture, done, refused, run
from helpers import differing, hide_library, parameters, random_model

from gptfast import GPT, GPTConfig, get_tokenizer
from gptfast.tokenizer.bpe import ByteTokenizer
from gptfast.tokenizer.characters import CharacterTokenizer
from gptfast.tokenizer.gguf import gguf_values
from gptfast.tokenizer.vocabulary import has_gpt2
from gptfast.weights.convert import save
from gptfast.weights.gguf import gguf_name
from gptfast.weights.lazy_tensor import CheckpointError

gguf = pytest.importorskip("gguf")
TEXT = "The value, wörld — of \t 12 names <|endoftext|> isn't\n\n  it?  \n"


def byte_model(seed: int = 0, **changes: Any) -> GPT:
    sizes = {"vocab_size": 257, "n_embd": 64, "block_size": 64}
    return random_model(seed, **{**sizes, **changes}).eval()


def write(model: GPT, path: Path, kind: str | None = None, **options: Any) -> Path:
    options = {"tokenizer": "byte", **options}
    save(model.config, model.state_dict(), path, kind=kind, **options)
    return path


def fields(path: Path) -> dict[str, Any]:
    """Return the values that the library's own reader finds."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


# Written


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_models_own_dtype_is_kept_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    model = byte_model(tie_weights=False).to(dtype)
    loaded = GPT.from_pretrained(write(model, tmp_path / "m.gguf"))
    assert loaded.config == model.config and next(loaded.parameters()).dtype == dtype
    assert differing(parameters(loaded), parameters(model)) == []


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_matrices_alone_are_rounded(kind: str, tmp_path: Path) -> None:
    """Norms, biases and positions stay fp32, and so is the model that is read."""
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
    model = byte_model()
    loaded = GPT.from_pretrained(write(model, tmp_path / "m.gguf", kind))
    for name, p in parameters(model).items():
        rounded = p.dim() == 2 and name != "wpe.weight"
        expected = p.to(dtype).float() if rounded else p
        assert torch.equal(parameters(loaded)[name], expected), name


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_quantised_values_are_the_librarys(kind: str, tmp_path: Path) -> None:
    model = byte_model()
    loaded = GPT.from_pretrained(write(model, tmp_path / "m.gguf", kind))
    for name, p in parameters(model).items():
        expected = p
        if p.dim() == 2 and name != "wpe.weight":
            # The embedding is the head too, and 4 bits are few for it.
            ggml = gguf.GGMLQuantizationType["Q8_0" if name == "wte.weight" else kind.upper()]
            packed = gguf.quants.quantize(p.numpy(), ggml)
            expected = torch.from_numpy(gguf.quants.dequantize(packed, ggml))
        assert torch.equal(parameters(loaded)[name], expected), name
    assert gguf.GGUFReader(tmp_path / "m.gguf").get_tensor(0).name == "token_embd.weight"


def test_what_the_file_says(tmp_path: Path) -> None:
    """The library's own reader finds what llama.cpp needs, and the tensors in its shapes."""
    model = byte_model(qkv_bias=False)
    path = write(model, tmp_path / "tiny.gguf", "f16", license="mit", eos_ids=(256, 10))
    found = fields(path)
    expected = {
        "general.architecture": "gpt2",
        "general.type": "model",
        "general.name": "tiny",
        "general.license": "mit",
        "general.file_type": 1,
        "gpt2.context_length": 64,
        "gpt2.embedding_length": 64,
        "gpt2.feed_forward_length": 256,
        "gpt2.block_count": 2,
        "gpt2.attention.head_count": 2,
        "gpt2.vocab_size": 257,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 256,
        "tokenizer.ggml.eot_token_id": 10,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert found["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5, rel=1e-6)
    assert len(found["tokenizer.ggml.tokens"]) == len(found["tokenizer.ggml.token_type"]) == 257
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert tensors["blk.1.ffn_up.weight"].shape.tolist() == [64, 256]  # the innermost first
    assert not tensors["blk.1.attn_qkv.bias"].data.any()  # llama.cpp wants it
    loaded = GPT.from_pretrained(path)
    assert loaded.config == model.config and loaded.eos_ids == (256, 10)


def test_what_it_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(ValueError, match="q8_0 holds 32 numbers at a time, which n_embd=24 is no"):
        write(random_model(vocab_size=257), path, "q8_0")
    model = byte_model()
    with torch.no_grad():
        model.h[1].mlp.c_fc.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match="blk.1.ffn_up.weight has values that F16 cannot hold"):
        write(model, path, "f16")
    with torch.no_grad():
        for value, kind in ((1e9, "q8_0"), (1e6, "q4_0"), (torch.nan, "q8_0"), (torch.inf, "q4_0")):
            model.h[1].mlp.c_fc.weight[0, 0] = value
            with pytest.raises(
                ValueError, match=f"ffn_up.weight has values that {kind.upper()} ca"
            ):
                write(model, path, kind)
    for spec in (None, ModuleSpec("gguf", None)):  # a folder of that name is no library
        hide_library(monkeypatch, "gguf", spec)
        with pytest.raises(ValueError, match=r"needs the gguf library: pip install '.*\[gguf\]'"):
            write(model, path)
    assert not list(tmp_path.iterdir())


def test_the_license_is_that_of_openais_models(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of somebody else in a directory called gpt2 has none that we know."""
    monkeypatch.chdir(tmp_path)
    byte_model().save_pretrained("gpt2")
    done(capsys, "convert", "gpt2", "m.gguf")
    assert "general.license" not in fields(tmp_path / "m.gguf")


# Vocabularies


def trained(**changes: Any) -> Any:
    """Return a small byte-level BPE with added tokens, changed as its description says."""
    pytest.importorskip("tokenizers")
    from gptfast.tokenizer.added import AddedToken
    from gptfast.tokenizer.bpe import BPETokenizer
    from gptfast.tokenizer.train import train_tokenizer

    with tempfile.TemporaryDirectory() as directory:
        texts = ["the value of the name of the value"] * 3
        learnt = train_tokenizer(texts, 280, Path(directory) / "words")
        described = learnt.description()
    n = learnt.n_vocab
    added = {**described.added, n: AddedToken("<|user|>", special=True), n + 1: AddedToken("name")}
    return BPETokenizer("own", replace(described, **{"added": added, "texts": {}, **changes}))


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "byte": ByteTokenizer,
    "gpt2": lambda: get_tokenizer("gpt2") if has_gpt2() else pytest.skip("no vocabulary of GPT-2"),
    "trained": trained,
}


@pytest.mark.parametrize(("kind", "padding"), [("byte", 0), ("trained", 7), ("gpt2", 47)])
def test_a_vocabulary_comes_back(kind: str, padding: int, tmp_path: Path) -> None:
    """The ids mean the same, and so does what is made of the file: a run, another form."""
    tokenizer = TOKENIZERS[kind]()
    model = random_model(vocab_size=tokenizer.n_vocab + padding)
    path = write(model, tmp_path / "m.gguf", tokenizer=tokenizer)
    loaded = GPT.from_pretrained(path)
    found = get_tokenizer(loaded.tokenizer_name)
    assert found.sha256 == tokenizer.sha256 and found.eot == tokenizer.eot
    assert found.special_tokens == tokenizer.special_tokens
    assert found.encode(TEXT) == tokenizer.encode(TEXT)
    assert found.encode(TEXT, "all") == tokenizer.encode(TEXT, "all")
    loaded.save_pretrained(tmp_path / "hf")
    kept = get_tokenizer(str(tmp_path / "hf"))
    assert kept.sha256 == tokenizer.sha256 and kept.encode(TEXT) == tokenizer.encode(TEXT)


def test_the_end_of_a_text_is_not_that_of_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    path = write(byte_model(), tmp_path / "m.gguf", tokenizer=tokenizer, eos_ids=(10,))
    assert GPT.from_pretrained(path).eos_ids == (10,)
    assert get_tokenizer(str(path)).eot == tokenizer.eot


def test_vocabularies_that_it_cannot_express() -> None:
    characters = CharacterTokenizer("chars", "abcdefghijklmnop")
    for tokenizer, words in {
        characters: "tokenizer chars: it has no end-of-text, for which llama.cpp would take id 11",
        trained(eot=None): "tokenizer own: it has no end-of-text",
        trained(add_prefix_space=True): "it puts a space before a text",
        trained(whole_words=True): "it has whole_words tokens",
        trained(before=(3,)): "it puts others than its begin and end around a text",
    }.items():
        with pytest.raises(ValueError, match=f"{words}.*name a directory instead"):
            gguf_values(tokenizer, 1000)
    with pytest.raises(ValueError, match="it has 257 tokens for the 61 rows of the model"):
        gguf_values(ByteTokenizer(), 61)


def test_a_vocabulary_of_another_kind(tmp_path: Path) -> None:
    """The weights load; text needs --tokenizer."""
    for name, changes in {
        "split": {"tokenizer.ggml.pre": "llama-bpe"},
        "kind": {"tokenizer.ggml.model": "bert"},
        "types": {"tokenizer.ggml.token_type": [6] * 257},
        "few": {"tokenizer.ggml.token_type": [1] * 9},
        "twice": {"tokenizer.ggml.tokens": ["a"] * 257},
        "end": {"tokenizer.ggml.eos_token_id": 300},
        "merges": {"tokenizer.ggml.merges": ["a b c"]},
        "unknown merges": {"tokenizer.ggml.merges": ["a b"]},
        "bytes": {"gptfast.tokenizer": "byte", "tokenizer.ggml.eos_token_id": 3},
    }.items():
        path = tmp_path / f"{name}.gguf"
        foreign(path, {**gguf_values(ByteTokenizer(), 257), **changes})
        loaded = GPT.from_pretrained(path)
        assert loaded.tokenizer_name == str(path)
        with pytest.raises(ValueError, match="that does not fit.*--tokenizer") as caught:
            get_tokenizer(str(path))
        assert "\n" not in str(caught.value), name


# Files of others


def foreign(path: Path, values: dict[str, Any], *, seed: int = 0, **changes: Any) -> GPT:
    """Write a file as llama.cpp's converter does: F16 matrices, the head written again."""
    model = byte_model(seed)
    model.load_state_dict({name: p.half().float() for name, p in model.state_dict().items()})
    writer = gguf.GGUFWriter(path, changes.pop("architecture", "gpt2"))
    sizes = {
        "block_count": 2,
        "context_length": 64,
        "embedding_length": 64,
        "feed_forward_length": 256,
        "attention.head_count": 2,
        "attention.layer_norm_epsilon": 1e-5,
    }
    for name, value in {**sizes, **changes}.items():
        if value is not None and name != "tensors":
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(name if name.startswith("split.") else f"gpt2.{name}", value)
    for name, value in values.items():
        kind = gguf.GGUFValueType.get_type(value)
        kind = gguf.GGUFValueType.UINT32 if kind == gguf.GGUFValueType.INT32 else kind
        writer.add_key_value(name, value, kind)
    for name, p in model.state_dict().items():
        array = p.numpy()
        array = array.astype(np.float16) if p.dim() == 2 and name != "wpe.weight" else array
        writer.add_tensor(gguf_name(name), array)
        if name == "wte.weight":
            writer.add_tensor("output.weight", array)
    for name, array in changes.get("tensors", {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_a_file_of_llama_cpps_converter(tmp_path: Path) -> None:
    """A head that is the embedding again is no head of its own."""
    values = {k: v for k, v in gguf_values(ByteTokenizer(), 257).items() if "gptfast" not in k}
    model = foreign(tmp_path / "m.gguf", values)
    loaded = GPT.from_pretrained(tmp_path / "m.gguf")
    assert loaded.config == replace(model.config, tie_weights=True)
    assert next(loaded.parameters()).dtype == torch.float16  # every value of the file fits
    assert differing(parameters(loaded.float()), parameters(model)) == []
    assert loaded.eos_ids == (256,)
    assert get_tokenizer(loaded.tokenizer_name).encode("ab<|endoftext|>", "all") == [97, 98, 256]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "llama"}, "GGUF of the architecture 'llama', and gptfast reads 'gpt2'"),
        ({"split.count": 3}, "is one of 3 files of a model; llama-gguf-split --merge"),
        ({"feed_forward_length": 100}, "gpt2.feed_forward_length is 100, but .* needs 256"),
        ({"attention.head_count_kv": 1}, "gpt2.attention.head_count_kv is 1, but .* needs 2"),
        ({"attention.layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is .*, but .* needs"),
        ({"attention.head_count": 5}, "n_embd must be divisible by n_head"),
        ({"block_count": 3}, "no tensor 'blk.2"),
        ({"block_count": 1}, "does not know: 'blk.1"),
        ({"context_length": 65}, r"position_embd.weight has shape \(64, 64\), the model needs"),
        ({"context_length": None}, "has no value 'gpt2.context_length'"),
        ({"tensors": {"rope_freqs.weight": np.zeros(4, np.float32)}}, "know: 'rope_freqs.weight'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_models_that_gpt_is_not(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    foreign(tmp_path / "m.gguf", {}, **changes)
    with pytest.raises(CheckpointError, match=words) as caught:
        GPT.from_pretrained(tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)


# Hostile files


def patched(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    path.write_bytes(content.replace(old, new))


def entry(name: str, shape: tuple[int, ...], kind: int) -> bytes:
    """Return how a header writes a tensor, before its offset."""
    dims = b"".join(struct.pack("<Q", n) for n in shape[::-1])
    head = struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
    return head + dims + struct.pack("<I", kind)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"GGUF\x03\0\0\0", b"GGUF\x01\0\0\0", "version 1, and only 2 and 3 can be read"),
        (b"GGUF\x03\0\0\0", b"GGUF\0\0\0\x03", "written for big-endian machines"),
        (entry("output_norm.bias", (64,), 0), entry("output_norm.bias", (64,), 99), "type 99"),
        (
            entry("output_norm.bias", (64,), 0),
            entry("output_norm.bias", (2**60,), 0),
            "is damaged: output_norm.bias ends at",
        ),
        (entry("output_norm.bias", (64,), 0), entry("output_norm.bias", (0,), 0), "has shape"),
        (
            entry("output_norm.bias", (64,), 0),
            entry("output_norm.bias", (64,), 0).replace(b"\x01\0\0\0\x40", b"\x09\0\0\0\x40"),
            "9 dimensions",
        ),
        (b"output_norm.bias", b"output_norm.bia\xff", "damaged GGUF"),
        (b"blk.0.ffn_up.bias", b"blk.1.ffn_up.bias", "tensor 'blk.1.ffn_up.bias' twice"),
    ],
    ids=["version", "endian", "type", "huge", "empty", "dims", "utf8", "twice"],
)
def test_damaged_headers(old: bytes, new: bytes, words: str, tmp_path: Path) -> None:
    path = write(byte_model(), tmp_path / "m.gguf")
    patched(path, old, new)
    with pytest.raises(CheckpointError, match=words) as caught:
        GPT.from_pretrained(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("n", [2**31, 2**40, 2**64 - 1])
def test_counts_are_no_promise(n: int, tmp_path: Path) -> None:
    """Each count of a header may lie: nothing is made of it beyond the file's bytes."""
    path, count = tmp_path / "m.gguf", struct.pack("<Q", n)
    text = struct.pack("<Q", 1) + b"a"
    for content in (
        count + struct.pack("<Q", 0),  # tensors
        struct.pack("<Q", 0) + count,  # values
        struct.pack("<QQ", 0, 1) + count,  # the bytes of a name
        struct.pack("<QQ", 0, 1) + text + struct.pack("<I", 8) + count,  # of a text
        struct.pack("<QQ", 0, 1) + text + struct.pack("<II", 9, 8) + count,  # texts
        struct.pack("<QQ", 0, 1) + text + struct.pack("<II", 9, 12) + count,  # numbers
    ):
        path.write_bytes(b"GGUF" + struct.pack("<I", 3) + content)
        with pytest.raises(CheckpointError, match="is a damaged GGUF"):
            GPT.from_pretrained(path)
        with pytest.raises(ValueError, match="is a damaged GGUF"):
            get_tokenizer(str(path))


def test_a_file_that_was_cut_off(tmp_path: Path) -> None:
    content = write(byte_model(), tmp_path / "m.gguf").read_bytes()
    for n in (*range(4, 600, 7), *range(600, len(content), len(content) // 40), len(content) - 33):
        (tmp_path / "cut.gguf").write_bytes(content[:n])
        with pytest.raises(CheckpointError, match="damaged") as caught:
            GPT.from_pretrained(tmp_path / "cut.gguf")
        assert "\n" not in str(caught.value)


# Commands


def test_commands(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a directory to GGUF and back, generated from, trained on."""
    monkeypatch.chdir(tmp_path)
    model = byte_model()
    model.save_pretrained("a", tokenizer=ByteTokenizer())
    assert "in m.gguf (gguf)" in done(capsys, "convert", "a", "m.gguf", "--dtype", "f32")
    options = ["--prompt", "the", "--max-new-tokens", 8, "--seed", 1]
    assert done(capsys, "generate", "m.gguf", *options) == done(capsys, "generate", "a", *options)
    done(capsys, "convert", "m.gguf", "b")
    assert differing(parameters(GPT.from_pretrained("b")), parameters(model)) == []
    assert json.loads(Path("b/config.json").read_text())["eos_token_id"] == 256
    Path("text.txt").write_text("the value of the name\n" * 40)
    given = ["--init", "m.gguf", "--data", "text.txt", "--out", "run", "--lr", 1e-9, "--max-steps"]
    sizes = ["--batch-size", 2, "--sample-tokens", 1, "--device", "cpu", "--max-length", 16]
    done(capsys, "train", *given, 1, *sizes)
    Path("m.gguf").unlink()  # the run has its vocabulary
    done(capsys, "generate", "run", *options)
    assert get_tokenizer(GPT.from_pretrained("run").tokenizer_name).sha256 == ByteTokenizer.sha256


def test_commands_refuse(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    byte_model().save_pretrained("a", tokenizer=ByteTokenizer())
    refused(run(capsys, "convert", "a", "b", "--dtype", "q8_0"), "only GGUF has", "int8")
    refused(run(capsys, "convert", "a", "m.gguf", "--dtype", "int8"), "q8_0", "packed")
    refused(run(capsys, "convert", "a", "m.gguf", "--to", "llm.c"), "no .gguf file")
    refused(run(capsys, "convert", "a", "p", "--to", "packed", "--dtype", "q4_0"), "not q4_0")
    assert sorted(path.name for path in Path().iterdir()) == ["a"]
    random_model(vocab_size=61).save_pretrained("c")
    assert "holds no vocabulary" in done(capsys, "convert", "c", "m.gguf")
    refused(run(capsys, "generate", "m.gguf", "--prompt", "a"), "--tokenizer")


def test_a_run_starts_without_a_vocabulary_of_another_kind(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    foreign(Path("m.gguf"), {**gguf_values(ByteTokenizer(), 257), "tokenizer.ggml.pre": "bloom"})
    refused(run(capsys, "generate", "m.gguf", "--prompt", "a"), "'bloom'", "--tokenizer")
    done(capsys, "generate", "m.gguf", "--prompt", "a", "--tokenizer", "byte", "-n", 1)
    Path("text.txt").write_text("the value of the name\n" * 40)
    train = ["train", "--init", "m.gguf", "--data", "text.txt", "--max-steps", 1]
    refused(run(capsys, *train, "--device", "cpu"), "'bloom'", "--tokenizer")


# llama.cpp


@pytest.fixture(scope="module")
def llama() -> Any:
    return pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed").Llama


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_llama_cpp_continues_with_the_same_ids(llama: Any, kind: str, tmp_path: Path) -> None:
    model = byte_model()
    path = write(model, tmp_path / "m.gguf", kind)
    theirs = llama(str(path), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    ids = theirs.tokenize(TEXT.encode(), add_bos=True, special=False)
    assert ids == ByteTokenizer().encode(TEXT) and len(ids) > 60
    assert theirs.tokenize(TEXT.encode(), special=True) == ByteTokenizer().encode(TEXT, "all")
    assert (theirs.token_bos(), theirs.token_eos()) == (256, 256)
    theirs.eval(ids[:60])
    logits = GPT.from_pretrained(path)(torch.tensor([ids[:60]]))[0].detach().numpy()
    error = np.abs(np.array(theirs.scores[:60]) - logits).max() / np.abs(logits).max()
    # Each of nine products in a row takes inputs that llama.cpp rounds as the weights are; keys,
    # values and the table of GELU are f16 in any case.
    unit = {"f32": 2**-11, "f16": 2**-11, "bf16": 2**-9, "q8_0": 1 / 254}[kind]
    assert error < 10 * unit
    if kind != "f32":
        return
    theirs.reset()
    found = []
    for token in theirs.generate(ids[:5], temp=0.0, repeat_penalty=1.0):
        found.append(token)
        if len(found) == 20:
            break
    idx = torch.tensor([ids[:5]])
    for _ in found:
        idx = torch.cat([idx, model(idx)[:, -1:].argmax(-1)], 1)
    assert found == idx[0, 5:].tolist()


@pytest.mark.parametrize("kind", ["gpt2", "trained"])
def test_llama_cpp_has_the_same_ids(llama: Any, kind: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[kind]()
    model = GPT(GPTConfig(tokenizer.n_vocab, 8, 1, 1, 8))
    path = write(model, tmp_path / "m.gguf", tokenizer=tokenizer)
    theirs = llama(str(path), vocab_only=True, verbose=False)
    for text in (TEXT, " x", "\n", "naïve café 你好 123,456 \u2003 <|user|>name"):
        plain = theirs.tokenize(text.encode(), add_bos=True, special=False)
        assert plain == tokenizer.encode(text)
        allowed = theirs.tokenize(text.encode(), add_bos=True, special=True)
        assert allowed == tokenizer.encode(text, "all")


@pytest.mark.parametrize("file_type", ["MOSTLY_Q4_K_M", "MOSTLY_Q2_K"])
def test_what_llama_cpp_quantises_is_read(llama: Any, file_type: str, tmp_path: Path) -> None:
    """Types of 256 numbers at a time, of which a file has several."""
    import ctypes

    import llama_cpp

    # Smaller weights: 256 of the others would make a rounding grow from layer to layer.
    source = write(byte_model(n_embd=256, std=0.05), tmp_path / "m.gguf")
    path = tmp_path / "k.gguf"
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = int(gguf.LlamaFileType[file_type]), 1
    paths = (str(file).encode() for file in (source, path))
    assert llama_cpp.llama_model_quantize(*paths, ctypes.byref(options)) == 0
    theirs = llama(str(path), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    ids = list(range(60, 100))
    theirs.eval(ids)
    logits = GPT.from_pretrained(path)(torch.tensor([ids]))[0].detach().numpy()
    error = np.abs(np.array(theirs.scores[:40]) - logits).max() / np.abs(logits).max()
    assert error < 10 / 254, error  # inputs are rounded to 8 bits, as for q8_0
