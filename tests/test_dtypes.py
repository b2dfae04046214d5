"""No number depends on torch's default dtype: the code names the dtype of each tensor that it
makes, and under another default everything comes out as the same bits."""

import ast
import copy
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import english, make_trainer, random_ids, random_model, without_speed
from seeds import shifted, torch_generator
from torch import Tensor

import gptfast
from gptfast import GPT, AdamW, Engine, GPTConfig, TrainConfig, generate, get_tokenizer, ops
from gptfast.data.tokens import as_tokens, split_tokens
from gptfast.engine.gpu_rows import gpu_rows
from gptfast.evaluate.hellaswag import hellaswag
from gptfast.evaluate.loss import loader_score, sliding_score, text_score, token_losses
from gptfast.generate import generate_text, stream, stream_text
from gptfast.generation.options import Options
from gptfast.kernels.reference.decode_linear import quantize
from gptfast.ops.backend import EXTENSION
from gptfast.training.schedule import learning_rate

ROOT = Path(__file__).parents[1]
FILES = [path for folder in ("gptfast", "kernels") for path in (ROOT / folder).rglob("*.py")]
BYTE = get_tokenizer("byte")
needs_engine = pytest.mark.skipif(EXTENSION is None, reason="the C++ extension is not built")

# torch's functions that make a tensor from numbers or from nothing. What makes one from a tensor
# (x.new_zeros, torch.zeros_like) takes the tensor's dtype, and what takes an array (from_numpy) the
# array's, which NumPy chose.
FACTORIES = set(
    "arange as_tensor asarray bartlett_window blackman_window empty empty_permuted empty_strided "
    "eye full hamming_window hann_window kaiser_window linspace logspace normal ones rand randint "
    "randn randperm range scalar_tensor tensor zeros Tensor FloatTensor".split()
)
# Their dtype is int64, whatever the default, if their arguments are integers. randint and randperm
# take no others.
OF_INTEGERS = {"arange", "randint", "randperm"}


def factories_in(function: ast.expr) -> set[str]:
    """Return the factories that an expression may be: torch.x, or one of both in an `if else`."""
    if isinstance(function, ast.IfExp):
        return factories_in(function.body) | factories_in(function.orelse)
    if isinstance(function, ast.Attribute) and ast.unparse(function.value) == "torch":
        return {function.attr} & FACTORIES
    return set()


def makes_a_float(argument: ast.expr) -> bool:
    """Return whether an argument is visibly a float: a number with a point, a / b or float(x)."""
    nodes = list(ast.walk(argument))
    return (
        any(isinstance(n, ast.Constant) and isinstance(n.value, float) for n in nodes)
        or any(isinstance(n, ast.BinOp) and isinstance(n.op, ast.Div) for n in nodes)
        or any(isinstance(n, ast.Name) and n.id in ("float", "math") for n in nodes)
    )


def without_dtype(source: str) -> list[str]:
    """Return the places of a file that make a tensor in the default dtype, as LINE: CODE."""
    found, called = [], set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            if FACTORIES & {alias.name for alias in node.names} - {"Tensor"}:
                found.append((node.lineno, ast.unparse(node)))
        if not isinstance(node, ast.Call) or not (names := factories_in(node.func)):
            continue
        called |= {id(part) for part in ast.walk(node.func)}
        given = any(keyword.arg == "dtype" for keyword in node.keywords)
        if not given and not (names <= OF_INTEGERS and not any(map(makes_a_float, node.args))):
            found.append((node.lineno, ast.unparse(node)))
    for node in ast.walk(tree):
        # A factory that is passed on, as in map(torch.tensor, rows); torch.Tensor is a type too.
        passed = isinstance(node, ast.Attribute) and factories_in(node) - {"Tensor", "FloatTensor"}
        if passed and id(node) not in called:
            found.append((node.lineno, ast.unparse(node)))
    return [f"{line}: {code}" for line, code in sorted(found)]


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(ROOT)) for p in FILES])
def test_every_new_tensor_names_its_dtype(path: Path) -> None:
    assert without_dtype(path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.tensor(x)",
        "torch.tensor([0, 1], device=device)",
        "torch.zeros(3).to(dtype)",
        "(torch.empty if N else torch.zeros)(3)",
        "torch.arange(0.5, 3)",
        "torch.arange(n / 2)",
        "map(torch.tensor, rows)",
        "from torch import ones",
        "torch.Tensor([1])",
    ],
)
def test_the_rule_sees(line: str) -> None:
    assert len(without_dtype(line)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "torch.tensor(x, dtype=torch.int64)",
        "(torch.empty if N else torch.zeros)(3, dtype=dtype)",
        "torch.arange(n - 1, device=device)",
        "torch.randint(2**62, (), device=device)",
        "isinstance(x, torch.Tensor)",
        "torch.zeros_like(x)",
        "x.new_zeros(3)",
        "from torch import Tensor",
    ],
)
def test_the_rule_lets_pass(line: str) -> None:
    assert without_dtype(line) == []


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(params=["bfloat16", "float16", "float64"])
def other(request: pytest.FixtureRequest) -> torch.dtype:
    """Return another default dtype. Its name is the parameter: no tensor of a test has to be so."""
    return getattr(torch, request.param)


def assert_same(got: Any, wanted: Any, where: str = "result") -> None:
    """Check two results for the same types, dtypes and bits, at any depth."""
    assert type(got) is type(wanted), f"{where}: {type(got)} for {type(wanted)}"
    if isinstance(wanted, Tensor):
        assert got.dtype == wanted.dtype, f"{where}: {got.dtype} for {wanted.dtype}"
        assert torch.equal(got.nan_to_num(), wanted.nan_to_num()), where
        assert torch.equal(got.isnan(), wanted.isnan()), where
    elif isinstance(wanted, dict):
        assert got.keys() == wanted.keys(), where
        for name, value in wanted.items():
            assert_same(got[name], value, f"{where}[{name!r}]")
    elif isinstance(wanted, list | tuple):
        assert len(got) == len(wanted), where
        for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    elif isinstance(wanted, float) and math.isnan(wanted):
        assert math.isnan(got), where
    else:
        assert got == wanted, f"{where}: {got} for {wanted}"


def assert_independent(prepare: Callable[[], Callable[[], Any]], other: torch.dtype) -> None:
    """Check that what `prepare` returns gives the same result under another default dtype."""
    wanted = prepare()()
    run = prepare()
    with default_dtype(other):
        got = run()
    assert_same(got, wanted)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch_generator(seed))


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return draws(*shape, seed=seed).requires_grad_()


def with_gradients(out: Tensor, *inputs: Tensor) -> list[Tensor]:
    weight = out.detach().abs() + 0.3  # another gradient for each element
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs, retain_graph=True)]


def attention() -> Callable[[], Any]:
    q, k, v = (leaf(2, 3, T, 16, seed=T) for T in (7, 9, 9))
    kv_len = torch.tensor([9, 8])

    def run() -> Any:
        options: list[dict[str, Any]] = [{}, {"scale": 0.3}, {"dropout_p": 0.3, "seed": 5}]
        options.append({"kv_len": kv_len})
        return [with_gradients(ops.attention(q, k, v, **one), q, k, v) for one in options]

    return run


def attention_qkv() -> Callable[[], Any]:
    qkv = leaf(2, 9, 96)

    def run() -> Any:
        drop = {"dropout_p": 0.2, "seed": 3}
        return [with_gradients(ops.attention_qkv(qkv, 2, **one), qkv) for one in ({}, drop)]

    return run


LOSSES = [{}, {"label_smoothing": 0.1, "z_loss": 1e-3}, {"reduction": "sum"}]
LOSSES += [{"reduction": "none"}, {"reduction": "none", "label_smoothing": 0.1}]


def targets() -> list[Tensor]:
    some = random_ids(6, vocab_size=31)
    some[2] = -100
    return [some, torch.full((6,), -100)]


def cross_entropy() -> Callable[[], Any]:
    logits, ys = leaf(6, 31), targets()
    return lambda: [
        with_gradients(ops.cross_entropy(logits, y, **one), logits) for one in LOSSES for y in ys
    ]


def linear_cross_entropy() -> Callable[[], Any]:
    x, w, ys = leaf(6, 16), leaf(31, 16, seed=1), targets()
    return lambda: (
        [
            with_gradients(ops.linear_cross_entropy(x, w, y, **one), x, w)
            for one in LOSSES
            for y in ys
        ]
        + [ops.linear_cross_entropy(x.detach(), w.detach(), y, **one) for one in LOSSES for y in ys]
    )


def linear_and_mlp() -> Callable[[], Any]:
    x, w, b, res = leaf(5, 16), leaf(24, 16, seed=1), leaf(24, seed=2), leaf(5, 24, seed=3)
    norm_w, norm_b, back, bias = leaf(16, seed=4), leaf(16, seed=5), leaf(16, 24), leaf(16, seed=6)
    norm = (norm_w, norm_b, 1e-5)

    def run() -> Any:
        linear = ops.linear(x, w, b, norm=norm, residual=res)
        mlp = ops.mlp(x, w, b, back, bias, norm=norm, residual=True)
        return [
            with_gradients(ops.linear(x, w), x, w),
            with_gradients(linear, x, w, b, norm_w, norm_b, res),
            with_gradients(mlp, x, w, b, back, bias, norm_w, norm_b),
        ]

    return run


def embedding() -> Callable[[], Any]:
    idx, w = random_ids(3, 4, vocab_size=31), leaf(31, 16)

    def run() -> Any:
        x, head = ops.embedding(idx, w)
        return [with_gradients(x, w), with_gradients(x.square() @ head.T, w)]

    return run


def decode_linear() -> Callable[[], Any]:
    x, w, residual = draws(3, 64), draws(48, 64, seed=1), draws(3, 48, seed=2)
    norm = (draws(64, seed=3), draws(64, seed=4), 1e-5)

    def run() -> Any:
        packed, scale = quantize(w)
        more = {"norm": norm, "residual": residual, "gelu": True}
        int8 = ops.decode_linear(x, packed, scale=scale, **more)
        return [ops.decode_linear(x, w, **more), int8, packed, scale]

    return run


ONE = dict(temperature=1.3, top_k=9, top_p=0.9, min_p=0.05, seed=3)
PER_ROW = dict(temperature=[1.3, 0.7, 0.0], top_k=[9, 5, 40], top_p=[0.9, 0.95, 0.3])
PER_ROW |= dict(min_p=[0.05, 0.1, 0.0], seed=[3, 2**62 + 1, 5])


def sampling() -> Callable[[], Any]:
    logits = 2 * draws(3, 211)

    def run() -> Any:
        per_row = Options(**PER_ROW).sampling(3, logits.device)
        drawn = [
            ops.sample(logits, position=i, **given)
            for i in range(6)
            for given in ({}, ONE, per_row, {"temperature": 0.0})
        ]
        return [drawn, per_row]

    return run


def adamw(**options: Any) -> Callable[[], Any]:
    dtype = options.pop("dtype", torch.float32)
    params = [leaf(7, 5).to(dtype).detach().requires_grad_(), leaf(5).to(dtype).detach()]
    grads = [[draws(*p.shape, seed=i + 9).to(dtype) for p in params] for i in range(3)]

    def run() -> Any:
        optimizer = AdamW(params, lr=1.3e-3, betas=(0.9, 0.97), weight_decay=0.03, **options)
        for step in grads:
            for p, grad in zip(params, step, strict=True):
                p.grad = grad
            optimizer.step()
        return [params, optimizer.state_dict(), optimizer.grad_norm]

    return run


OPERATIONS = {
    "attention": attention,
    "attention_qkv": attention_qkv,
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
    "linear, mlp": linear_and_mlp,
    "embedding": embedding,
    "decode_linear": decode_linear,
    "sample": sampling,
    "adamw": lambda: adamw(max_norm=1.0),
    "adamw, masters": lambda: adamw(dtype=torch.bfloat16, max_norm=0.5),
    "adamw, stochastic": lambda: adamw(dtype=torch.bfloat16, bf16_update="stochastic", seed=7),
    "adamw, float64": lambda: adamw(dtype=torch.float64),
}
IN_BF16 = ("adamw, masters", "adamw, stochastic")  # which Triton's interpreter does not have


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_operations(name: str, kernels: str, other: torch.dtype) -> None:
    with gptfast.use_backend(kernels):
        assert_independent(OPERATIONS[name], other)


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in IN_BF16])
def test_triton_kernels(name: str, triton: str) -> None:
    """bf16 alone, the coarsest default: the launchers are the same under each, and slow here."""
    assert_independent(OPERATIONS[name], torch.bfloat16)


def language_model(**changes: Any) -> GPT:
    return random_model(**{"vocab_size": 257, "block_size": 32, "std": 0.3} | changes).eval()


def training_step(**options: Any) -> Callable[[], Any]:
    model = language_model(dropout=options.pop("dropout", 0.0)).train()
    model.activation_checkpointing = options.pop("checkpointing", False)
    optimizer = AdamW(model.parameters(), lr=1e-3, max_norm=1.0, **options)
    idx, y = (random_ids(2, 16, vocab_size=257, seed=i) for i in (1, 2))
    y[0, :5] = -100

    def run() -> Any:
        torch.manual_seed(shifted(3))  # the dropout that is not attention's
        logits = model(idx, seed=4).detach()
        loss = model(idx, y, seed=4)
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        return [logits, loss.detach(), grads, model.state_dict(), optimizer.state_dict()]

    return run


def evaluation(engine: bool) -> Callable[[], Any]:
    plain = language_model()
    model = Engine(plain) if engine else plain
    tokens = as_tokens(english()[:500], BYTE)
    x, y = tokens[:48].view(3, 16), tokens[1:49].view(3, 16).clone()
    y[1, 7:] = -100
    loader = gptfast.create_dataloader(tokens, 3, 16, 16, shuffle=False, drop_last=False)

    def run() -> Any:
        found: list[Any] = [token_losses(model, x, y), loader_score(model, loader, BYTE)]
        found.append(sliding_score(model, tokens, BYTE, max_length=16, stride=7))
        return [*found, text_score(model, tokens, BYTE, max_length=16)]

    return run


PROMPTS = [[7, 8, 9], [1, 2, 3, 4, 5, 6], [40]]
LOGPROBS = {"logprobs": True, "top_logprobs": 3}
GENERATION: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 4, "logprobs": True, "length_penalty": 0.7},
    "beams, penalty": {"num_beams": 3, "repetition_penalty": 1.3, "logprobs": True, "eos_id": 9},
    "draws": {**ONE, **LOGPROBS},
    "draws per row": {**PER_ROW, **LOGPROBS},
    "penalty": {"temperature": 1.3, "repetition_penalty": 1.3, **LOGPROBS},
    "penalty per row": {"temperature": 2.0, "repetition_penalty": [1.3, 1.7, 0.7]},
    "temperature per row": {"temperature": [1.004, 1.012, 2.008], **LOGPROBS},
    "top_p per row": {"top_p": [0.6, 0.7, 0.9], "temperature": 2.0},
    "min_p per row": {"min_p": [0.05, 0.1, 0.01], "temperature": 2.0},
    "arrays": {"temperature": np.array([1.3, 0.7, 0.9]), "top_p": (0.9, 0.8, 0.95)},
}


def generation(engine: bool, options: dict[str, Any]) -> Callable[[], Any]:
    plain = language_model()
    model = Engine(plain) if engine else plain
    # 40 tokens: past block_size, where the window slides.
    return lambda: generate(model, PROMPTS, 40, **options)


def streaming(engine: bool) -> Callable[[], Any]:
    plain = language_model()
    model = Engine(plain) if engine else plain
    drawn = {"temperature": 1.3, "top_p": 0.9, "seed": 5}

    def run() -> Any:
        penalised = stream(model, PROMPTS[0], 12, temperature=[1.1], repetition_penalty=[1.3])
        text = generate_text(model, BYTE, ["The ", "A dog"], 9, temperature=[1.3, 0.7], seed=[1, 2])
        pieces = list(stream_text(model, BYTE, "The ", 12, **drawn))
        return [list(stream(model, PROMPTS[0], 12, **drawn, **LOGPROBS)), list(penalised), text] + [
            pieces
        ]

    return run


def rows_of_a_gpu() -> Callable[[], Any]:
    """The engine's rows on a GPU, here on a CPU: a prompt, single tokens, and several at once."""
    rows = gpu_rows(language_model(), "fp32", 2)

    def run() -> Any:
        sampling = list(
            Options(temperature=[1.3, 0.7], top_p=[0.9, 0.8]).sampling(2, rows.device).values()
        )
        both, found = [rows.new(), rows.new()], []
        tokens: list[list[int]] = [[1, 2, 3], [4, 5]]
        for position in range(4, 10):
            logits, ids = rows.forward(both, tokens, None, sampling, [position, position])
            found.append([logits.clone(), ids.clone()])
            tokens = [[i] for i in ids.tolist()]
        return found

    return run


WHOLE: dict[str, Callable[[], Callable[[], Any]]] = {
    "step": training_step,
    "step, dropout": lambda: training_step(dropout=0.1),
    "step, recomputed": lambda: training_step(dropout=0.1, checkpointing=True),
    "evaluation": lambda: evaluation(engine=False),
    "streaming": lambda: streaming(engine=False),
    "rows of a GPU": rows_of_a_gpu,
    **{
        name: lambda options=options: generation(False, options)  # type: ignore[misc]
        for name, options in GENERATION.items()
    },
}
OF_THE_ENGINE: dict[str, Callable[[], Callable[[], Any]]] = {
    "evaluation": lambda: evaluation(engine=True),
    "streaming": lambda: streaming(engine=True),
    "lookup": lambda: generation(True, {"temperature": 0.4, "lookup": True}),
    **{
        name: lambda options=options: generation(True, options)  # type: ignore[misc]
        for name, options in GENERATION.items()
    },
}


@pytest.mark.parametrize("name", WHOLE)
def test_model(name: str, other: torch.dtype) -> None:
    assert_independent(WHOLE[name], other)


@needs_engine
@pytest.mark.parametrize("name", OF_THE_ENGINE)
def test_engine(name: str, other: torch.dtype) -> None:
    assert_independent(OF_THE_ENGINE[name], other)


@needs_engine
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_engine_made_under_another_default(dtype: str, other: torch.dtype, tmp_path: Path) -> None:
    model = language_model()
    model.save_pretrained(tmp_path / "files")
    wanted = Engine(model, dtype).generate(PROMPTS, 12, **PER_ROW, **LOGPROBS)
    with default_dtype(other):
        for source in (model, tmp_path / "files"):
            assert_same(Engine(source, dtype).generate(PROMPTS, 12, **PER_ROW, **LOGPROBS), wanted)


def test_files_keep_their_dtype(other: torch.dtype, tmp_path: Path) -> None:
    """The dtype of a loaded model is that of its files; the default is for new models alone."""
    model = language_model()
    model.save_pretrained(tmp_path / "files")
    with default_dtype(other):
        loaded = GPT.from_pretrained(tmp_path / "files")
        assert_same(loaded.state_dict(), model.state_dict())
        loaded.save_pretrained(tmp_path / "again")
        assert GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8)).wte.weight.dtype == other
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "files" / file).read_bytes()


def test_hellaswag(other: torch.dtype, tmp_path: Path) -> None:
    lines = [
        {"ctx": "The dog", "endings": ["ran on.", "is a stone", "x", "sat"], "label": i % 4}
        for i in range(6)
    ]
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    model = language_model()
    assert_independent(lambda: lambda: hellaswag(model, BYTE, tmp_path / "tasks.jsonl"), other)


def test_data(other: torch.dtype) -> None:
    """Ids, also none of them, and what is refused."""

    def run() -> Any:
        refused = []
        for wrong in ([1.0, 2.0], np.array([1.5]), [-1], [[1]], ["a"]):
            with pytest.raises(ValueError) as error:
                as_tokens(wrong)
            refused.append(str(error.value))
        kinds = ([], [1, 2], range(3), np.array([1, 2], np.uint16), torch.tensor([1, 2]))
        parts = split_tokens(as_tokens(english()[:100], BYTE))
        return [refused, [as_tokens(ids) for ids in kinds], parts]

    assert_independent(lambda: run, other)


RUNS: dict[str, dict[str, Any]] = {
    "fp32": {"accumulation_steps": 2},
    "bf16": {"precision": "bf16"},
    "guarded": {"skip_zscore": 3.0, "schedule": "exponential", "warmup_steps": 2},
}


@pytest.mark.parametrize("kind", RUNS)
def test_training_run(kind: str, other: torch.dtype, tmp_path: Path) -> None:
    """A run that is continued once has the same metrics, samples and weights."""

    def trained(out: Path, default: torch.dtype) -> Any:
        for n in (3, 6):
            trainer = make_trainer(out, max_steps=n, **RUNS[kind])
            with default_dtype(default):
                history = trainer.fit(resume=n > 3)
        samples = [path.read_bytes() for path in sorted(out.rglob("*.txt"))]
        assert history[-1]["step"] == 6 and samples
        return [without_speed(history), trainer.model.state_dict(), samples]

    wanted = trained(tmp_path / "fp32", torch.float32)
    assert_same(trained(tmp_path / "other", other), wanted)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "exponential"])
def test_schedule(schedule: str, other: torch.dtype) -> None:
    config = TrainConfig(schedule=schedule, warmup_steps=3, lr=1.3e-3)
    assert_independent(lambda: lambda: [learning_rate(i, 20, config) for i in range(20)], other)


@pytest.mark.parametrize("labels", ["mean", "items", "evaluating"])
def test_transformers_model(labels: str, other: torch.dtype) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(shifted(0))
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=32, n_embd=24, n_layer=2, n_head=2, attn_pdrop=0.1
    )
    theirs = transformers.GPT2LMHeadModel(config)
    idx = random_ids(2, 16)

    def prepare() -> Callable[[], Any]:
        model = gptfast.accelerate(copy.deepcopy(theirs)).train(labels != "evaluating")

        def run() -> Any:
            torch.manual_seed(3)
            options = {"num_items_in_batch": 7} if labels == "items" else {}
            out = model(idx, labels=idx, **options)
            out.loss.backward()
            grads = {name: p.grad for name, p in model.named_parameters()}
            return [out.loss.detach(), out.logits.detach(), grads]

        return run

    assert_independent(prepare, other)
