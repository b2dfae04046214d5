"""Test packed directories, damaged or whole, and the inputs that an engine refuses."""

import copy
import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    random_ids,
    random_model,
)
from test_engine import DTYPES, prompts

from gptfast import GPT, CheckpointError, generate, use_backend
from gptfast.config import parameter_shapes
from gptfast.engine import Engine, is_packed
from gptfast.engine.packed import FILE
from gptfast.ops.backend import EXTENSION

pytestmark = pytest.mark.skipif(EXTENSION is None, reason="the C++ extension is not built")


@pytest.fixture
def model() -> GPT:
    return random_model(block_size=64, vocab_size=211).eval()


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, pickle.dumps, lambda engine: copy.deepcopy({"draft": engine})],
    ids=["copy", "deepcopy", "pickle", "deepcopy-of-a-holder"],
)
def test_a_copy_says_what_to_do(
    duplicate: Callable[[Any], Any], model: GPT, tmp_path: Path
) -> None:
    engine = Engine(model)
    with pytest.raises(TypeError, match="call engine.save.* Engine.directory") as raised:
        duplicate(engine)
    assert "\n" not in str(raised.value)
    engine.save(tmp_path / "packed")  # the remedy works, and the engine still does
    rows = Engine(tmp_path / "packed").generate(prompts(9), 5, temperature=0.0)
    assert rows == engine.generate(prompts(9), 5, temperature=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_directory_is_the_engine(dtype: str, model: GPT, tmp_path: Path) -> None:
    engine = Engine(model, dtype)
    engine.save(tmp_path / "packed")
    loaded = Engine(tmp_path / "packed")
    assert is_packed(tmp_path / "packed") and loaded.dtype == dtype
    assert loaded.config == model.config
    assert torch.equal(loaded.packed.data, engine.packed.data)
    assert loaded.logits(prompts(9)[0]).equal(engine.logits(prompts(9)[0]))
    with pytest.raises(ValueError, match="exists"):
        engine.save(tmp_path / "packed")
    assert os.listdir(tmp_path) == ["packed"]


def test_an_engine_of_files_is_one_of_the_model(model: GPT, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert torch.equal(Engine(tmp_path, "int8").packed.data, Engine(model, "int8").packed.data)


def test_the_tokenizer_goes_along(model: GPT, tmp_path: Path) -> None:
    model.tokenizer_name = "byte"
    Engine(model).save(tmp_path / "packed")
    assert Engine(tmp_path / "packed").tokenizer_name == "byte"


def _damaged(path: Path) -> Iterator[str]:
    """Write one kind of damage to the file after another; yield a name for each."""
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start])
    for at in (0, 8, 100, start, start + 1000, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        yield f"byte {at}"
    for size in (0, 7, 200, start, len(whole) - 64):
        path.write_bytes(whole[:size])
        yield f"{size} bytes"
    for name, value in (
        ("dtype", "fp32"),
        ("dtype", "int3"),
        ("format", "x"),
        ("crc32c", "0"),
        ("config", "{}"),
        ("config", json.dumps({"n_layer": 10**9})),
        # The first has the right size but other heads; the other's byte count is 0 in 64 bits.
        ("config", header["__metadata__"]["config"].replace('"n_head": 2', '"n_head": 4')),
        (
            "config",
            json.dumps(
                {
                    "vocab_size": 67091104,
                    "block_size": 13,
                    "n_layer": 1365,
                    "n_head": 2**20,
                    "n_embd": 2**24,
                }
            ),
        ),
    ):
        changed = {**header, "__metadata__": {**header["__metadata__"], name: value}}
        text = json.dumps(changed).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + whole[start:])
        yield f"{name} {value}"


def test_damaged_files_are_refused(model: GPT, tmp_path: Path) -> None:
    Engine(model, "int8").save(tmp_path / "packed")
    for _ in _damaged(tmp_path / "packed" / FILE):
        with pytest.raises(CheckpointError, match=r"damaged|cannot"):
            Engine(tmp_path / "packed")


def test_a_directory_of_an_older_gptfast(tmp_path: Path) -> None:
    """Its bf16 weights had another padding, if their inputs are no multiple of 32."""
    for n_embd, dtype, same in ((64, "bf16", True), (48, "bf16", False), (48, "int8", True)):
        engine = Engine(random_model(n_embd=n_embd), dtype)
        engine.save(tmp_path / f"{n_embd}-{dtype}")
        path = tmp_path / f"{n_embd}-{dtype}" / FILE
        path.write_bytes(path.read_bytes().replace(b"gptfast-packed-2", b"gptfast-packed-1"))
        if same:
            assert torch.equal(Engine(path.parent).packed.data, engine.packed.data)
        else:
            with pytest.raises(CheckpointError, match=r"older gptfast.*pack the model again"):
                Engine(path.parent)


def test_bad_input_gets_one_clear_error(model: GPT, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype must be one of fp32, bf16, int8, int4, got 'fp8'"):
        Engine(model, "fp8")
    with pytest.raises(ValueError, match="max_batch must be an integer >= 1, got 0"):
        Engine(model, max_batch=0)
    with pytest.raises(CheckpointError, match="nowhere"):
        Engine(tmp_path / "nowhere")
    engine, prompt = Engine(model, "bf16"), prompts(3)[0]
    engine.save(tmp_path / "packed")
    with pytest.raises(ValueError, match="packed as bf16, not int8"):
        Engine(tmp_path / "packed", "int8")
    other = Engine(random_model(vocab_size=50))
    for options, message in (
        ({"draft": other}, "vocabulary of 50 tokens, the model one of 211"),
        ({"draft": model}, "draft must be a gptfast.Engine, got GPT"),
        ({"draft": engine, "lookup": True}, "lookup and draft do not go together"),
        ({"lookup": True, "num_beams": 2}, "lookup and num_beams=2 do not go together"),
        ({"lookup": 3}, "lookup must be True or False, got 3"),
        ({"top_logprobs": -1}, "top_logprobs must be an integer from 0 to 211, got -1"),
        ({"top_logprobs": 212}, "top_logprobs must be an integer from 0 to 211, got 212"),
        ({"top_logprobs": 1, "num_beams": 2}, "top_logprobs"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.generate([prompt], 3, **options)
    with pytest.raises(ValueError, match="lookup needs an engine"):
        generate(model, [prompt], 3, lookup=True)
    with pytest.raises(IndexError, match="211"):
        engine.generate([[211]], 3)
    with pytest.raises(ValueError, match="65 ids are more than block_size=64"):
        engine.logits([1] * 65)
    assert not sum(map(len, engine.rows.ids))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_or_infinite_weights(dtype: str, value: float, model: GPT) -> None:
    with torch.no_grad():
        model.h[1].mlp.c_fc.weight[5, 7] = value
    engine = Engine(model, dtype)
    with pytest.raises(ValueError, match="NaN"):
        engine.generate(prompts(4), 5)
    assert engine.generate([], 5) == []


def test_the_operator_refuses_arguments_out_of_bounds(model: GPT) -> None:
    step, packed = torch.ops.gptfast.engine_step, Engine(model).packed
    cache = torch.zeros(2 * 2 * 2 * 16 * 10)  # 10 slots
    slots = torch.arange(10, dtype=torch.int32)[None]
    good = [packed.data, packed.shape, cache, slots, [0], [0], [2], [1, 2], [1], [], []]
    logits, ids = step(*good)
    assert logits.shape == (1, 211) and ids.shape == (0,)
    for at, value in (
        (0, packed.data[:-1]),
        (1, [0] * 7),
        (1, packed.shape[:-1]),
        (2, cache[:-1]),
        (2, cache.half()),
        (3, slots + 9),
        (3, slots.long()),
        (4, [1]),
        (5, [-1]),
        (5, [9]),
        (6, [3]),
        (7, [1, 211]),
        (7, [1, -1]),
        (8, [2]),
        (9, [torch.zeros(1)]),
    ):
        with pytest.raises((ValueError, IndexError), match="engine:"):
            step(*good[:at], value, *good[at + 1 :])
    torch.library.opcheck(step.default, tuple(good), test_utils=("test_schema",))


def test_a_changed_model() -> None:
    """A changed model still generates by itself; an engine of it is refused."""
    prompt = random_ids(5).tolist()

    def tied() -> GPT:
        model = random_model(tie_weights=False)
        model.lm_head.weight = model.wte.weight
        return model

    def shared() -> GPT:
        model = random_model()
        model.h[1] = model.h[0]
        return model

    def another_eps() -> GPT:
        model = random_model()
        model.ln_f.eps = 0.5
        return model

    def one_more() -> GPT:
        model = random_model()
        model.value_head = torch.nn.Linear(24, 1)
        return model

    for make in (tied, shared, another_eps, one_more):
        model = make().eval()
        with use_backend("reference"):
            wanted = generate(model, [prompt], 20, temperature=0.0)
        assert generate(model, [prompt], 20, temperature=0.0) == wanted, make.__name__
        if make in (another_eps, one_more):
            with pytest.raises(ValueError, match="takes an unchanged gptfast.GPT"):
                Engine(model)
        else:
            assert Engine(model).generate([prompt], 20, temperature=0.0) == wanted
    with use_backend("cpp"):
        assert Engine(random_model()).generate([prompt], 3)


def test_every_package_is_installed() -> None:
    root = Path(__file__).parents[1]
    if (root / "setup.py").exists():
        listed = (root / "setup.py").read_text()
        for path in (root / "gptfast").rglob("__init__.py"):
            name = ".".join(path.parent.relative_to(root).parts)
            assert f'"{name}"' in listed, name


def test_every_parameter_is_packed(model: GPT) -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert parameter_shapes(model.config) == shapes
