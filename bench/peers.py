"""Run llama.cpp, CTranslate2 and transformers with a `gptfast.GPT`'s weights, with one interface.

A `Peer` is a process of its own (this file as a script) that answers commands over a pipe. In one
process with torch, each library would bring an OpenMP runtime, and transformers would share the
threads, the allocator and the settings of the side it is measured against. A command and its answer
take about 0.2 ms, which counts against the peer: 0.1% of the shortest call of a GPT-2 124M. Between
commands the process is stopped (SIGSTOP), so that none of its threads spins while ours runs.

Each peer takes its fastest path. llama.cpp is built for this CPU and called through its C API: one
`llama_decode` a step, then numpy's argmax of the logits (its own greedy sampler copies all of them
first). CTranslate2 has the end token forbidden, so that no text ends early.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from gptfast import GPT

MODULES = {"llama.cpp": "llama_cpp", "CTranslate2": "ctranslate2", "transformers": "transformers"}
SERVER_MODULES = {"llama-cpp-python[server]": "llama_cpp", "starlette_context": "starlette_context"}
PRECISIONS = {
    "llama.cpp": {"fp32": "F32", "bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"},
    "CTranslate2": {"fp32": "float32", "int8": "int8"},
    "transformers": {"fp32": "float32", "bf16": "bfloat16"},
}
"""Each peer's names for our precisions."""
MAX_ROWS = 8


def missing(serve: bool = False) -> list[str]:
    """Return the names of the packages that are not installed: peers and writers of their files.

    serve: those of a server, in place of those that generate.
    """
    needed = {"gguf": "gguf", **(SERVER_MODULES if serve else MODULES)}
    return [name for name, module in needed.items() if find_spec(module) is None]


class Runner(Protocol):
    """The methods of every peer, in its own process."""

    def greedy(self, prompts: list[list[int]], n: int) -> list[list[int]]:
        """Return n greedy ids after each of up to MAX_ROWS prompts of the same length."""

    def prefill(self, prompt: list[int]) -> int:
        """Return the id after a prompt, in the fastest way."""


def write_gguf(
    model: "GPT", path: Path, precision: str, vocabulary: Mapping[str, str] | None = None
) -> None:
    """Write a GGUF file: matrices as `precision`, the rest in F32.

    vocabulary: the text of transformers' files by name; without them the file has no vocabulary.
    """
    import gguf

    from gptfast.weights.gguf import PARTS

    kind, config = gguf.GGMLQuantizationType[precision], model.config
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(model.ln_f.eps)
    writer.add_tokenizer_model("gpt2" if vocabulary else "no_vocab")
    writer.add_vocab_size(config.vocab_size)
    if vocabulary:
        _add_vocabulary(writer, vocabulary)
    for name, parameter in model.state_dict().items():
        layer, part = "", name
        if name.startswith("h."):
            _, i, part = name.split(".", 2)
            layer = f"blk.{i}."
        part, suffix = part.rsplit(".", 1)
        values = parameter.float().numpy()
        if values.ndim == 2 and part != "wpe":
            quantized = gguf.quants.quantize(values, kind)
            writer.add_tensor(f"{layer}{PARTS[part]}.{suffix}", quantized, raw_dtype=kind)
        else:
            writer.add_tensor(f"{layer}{PARTS[part]}.{suffix}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: Any, vocabulary: Mapping[str, str]) -> None:
    """Add GPT-2's vocabulary to a GGUF file, from the text of transformers' files by name."""
    import gguf

    ids = json.loads(vocabulary["vocab.json"])
    end = ids["<|endoftext|>"]
    kinds = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(ids, key=ids.get))
    writer.add_token_types([kinds[i == end] for i in range(len(ids))])
    writer.add_token_merges(vocabulary["merges.txt"].splitlines()[1:])
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)


def write_ctranslate2(model: "GPT", directory: Path, precision: str) -> None:
    """Write CTranslate2's directory. Its tokens are spelt "0", "1", …; the last one ends a text."""
    from ctranslate2.specs import common_spec, transformer_spec

    config = model.config
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        config.n_layer, config.n_head, activation=common_spec.Activation.GELUTanh
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False

    # Copies: quantizing changes some of them in place.
    def values(parameter: "Tensor") -> np.ndarray:
        return parameter.detach().numpy().copy()

    def fill(part: object, module: object) -> None:
        part.weight, part.bias = values(module.weight), values(module.bias)

    def norm(part: object, module: object) -> None:
        part.gamma, part.beta = values(module.weight), values(module.bias)

    decoder.embeddings.weight = values(model.wte.weight)
    decoder.position_encodings.encodings = values(model.wpe.weight)
    decoder.projection.weight = values(model.head_weight)
    norm(decoder.layer_norm, model.ln_f)
    for part, block in zip(decoder.layer, model.h, strict=True):
        norm(part.self_attention.layer_norm, block.ln_1)
        fill(part.self_attention.linear[0], block.attn.c_attn)
        fill(part.self_attention.linear[1], block.attn.c_proj)
        norm(part.ffn.layer_norm, block.ln_2)
        fill(part.ffn.linear_0, block.mlp.c_fc)
        fill(part.ffn.linear_1, block.mlp.c_proj)
    spec.register_vocabulary([str(i) for i in range(config.vocab_size)])
    spec.config.bos_token = spec.config.unk_token = "0"
    spec.config.eos_token = str(config.vocab_size - 1)
    spec.validate()
    spec.optimize(quantization=precision)
    directory.mkdir()
    spec.save(str(directory))


def write_transformers(model: "GPT", directory: Path, precision: str) -> None:
    model.save_pretrained(directory)


WRITERS: dict[str, Callable[["GPT", Path, str], None]] = {
    "llama.cpp": write_gguf,
    "CTranslate2": write_ctranslate2,
    "transformers": write_transformers,
}


class LlamaCpp:
    """llama.cpp with one context per number of rows: 1024 tokens a row, 512 tokens a batch."""

    def __init__(self, path: Path, precision: str, threads: int) -> None:
        import llama_cpp

        self.lib, self.threads = llama_cpp, threads
        self.silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.silent, None)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self.model)
        )
        self.contexts: dict[int, int] = {}
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)

    def about(self) -> str:
        return self.lib.llama_print_system_info().decode()

    def context(self, rows: int) -> int:
        """Return an empty context for `rows` sequences."""
        lib = self.lib
        if rows not in self.contexts:
            params = lib.llama_context_default_params()
            params.n_ctx, params.n_seq_max = 1024 * rows, rows
            params.n_batch = params.n_ubatch = 512
            params.n_threads = params.n_threads_batch = self.threads
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
            params.no_perf = True
            self.contexts[rows] = lib.llama_init_from_model(self.model, params)
        context = self.contexts[rows]
        lib.llama_memory_clear(lib.llama_get_memory(context), False)
        return context

    def decode(self, context: int, batch: object, outputs: int) -> np.ndarray:
        """Return the greedy ids (outputs,) after the last token of each row of the batch."""
        if self.lib.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        logits = self.lib.llama_get_logits(context)
        shape = outputs, self.vocab_size
        return np.ctypeslib.as_array(logits, shape).argmax(1)

    def fill(self, rows: list[list[int]], start: int) -> object:
        """Return the batch of all rows' tokens at positions from `start`. It asks for the logits
        of each row's last token."""
        batch, i = self.batch, 0
        for row, tokens in enumerate(rows):
            for position, token in enumerate(tokens, start):
                batch.token[i], batch.pos[i] = token, position
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
                batch.logits[i] = position == start + len(tokens) - 1
                i += 1
        batch.n_tokens = i
        return batch

    def greedy(self, prompts: list[list[int]], n: int) -> list[list[int]]:
        rows = len(prompts)
        context = self.context(rows)
        ids = self.decode(context, self.fill(prompts, 0), rows)
        steps, batch, at = [ids], self.batch, len(prompts[0])
        token = np.ctypeslib.as_array(batch.token, (rows,))
        pos = np.ctypeslib.as_array(batch.pos, (rows,))
        self.fill([[i] for i in ids.tolist()], at)
        for _ in range(n - 1):
            token[:], pos[:] = ids, at
            ids = self.decode(context, batch, rows)
            steps.append(ids)
            at += 1
        return np.stack(steps, 1).tolist()

    def prefill(self, prompt: list[int]) -> int:
        return self.greedy([prompt], 1)[0][0]


class CTranslate2:
    def __init__(self, path: Path, precision: str, threads: int) -> None:
        import ctranslate2

        self.last = json.loads((path / "vocabulary.json").read_text())[-1]
        self.generator = ctranslate2.Generator(
            str(path), device="cpu", compute_type=precision, inter_threads=1, intra_threads=threads
        )

    def about(self) -> str:
        return self.generator.compute_type

    def greedy(self, prompts: list[list[int]], n: int) -> list[list[int]]:
        results = self.generator.generate_batch(
            [list(map(str, prompt)) for prompt in prompts],
            beam_size=1,
            sampling_topk=1,
            min_length=n,
            max_length=n,
            include_prompt_in_result=False,
        )
        return [result.sequences_ids[0] for result in results]

    def prefill(self, prompt: list[int]) -> int:
        return self.greedy([prompt], 1)[0][0]


class Transformers:
    def __init__(self, path: Path, precision: str, threads: int) -> None:
        import torch
        from transformers import GPT2LMHeadModel

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = GPT2LMHeadModel.from_pretrained(
            path, dtype=getattr(torch, precision), attn_implementation="sdpa"
        ).eval()
        # No id ends a text, so that no time goes into looking for it.
        self.model.generation_config.eos_token_id = None

    def about(self) -> str:
        return self.torch.__version__

    def greedy(self, prompts: list[list[int]], n: int) -> list[list[int]]:
        with self.torch.inference_mode():
            idx = self.torch.tensor(prompts)  # (B, T)
            mask = self.torch.ones_like(idx)
            ids = self.model.generate(
                idx, attention_mask=mask, max_new_tokens=n, do_sample=False, use_cache=True
            )
        return ids[:, idx.shape[1] :].tolist()

    def prefill(self, prompt: list[int]) -> int:
        with self.torch.inference_mode():
            idx = self.torch.tensor([prompt])
            logits = self.model(idx, use_cache=False, logits_to_keep=1).logits  # (1, 1, V)
        return logits.argmax().item()


RUNNERS = {"llama.cpp": LlamaCpp, "CTranslate2": CTranslate2, "transformers": Transformers}


class PeerDied(RuntimeError):
    """The process of a peer ended, by an error or by a signal."""


class Peer:
    """A Runner in a process of its own, stopped while it has nothing to do."""

    def __init__(self, name: str, model: "GPT", precision: str, directory: Path) -> None:
        """Write the model for peer `name` into `directory` and load it from there.

        precision: "fp32", "bf16", "int8" or "int4". Raises ModuleNotFoundError for a missing peer.
        """
        import torch

        if find_spec(MODULES[name]) is None:
            raise ModuleNotFoundError(f"{name} is not installed; `make bench-peers` installs it")
        self.name = name
        theirs, path = PRECISIONS[name][precision], directory / f"{name}-{precision}"
        WRITERS[name](model, path, theirs)
        threads = str(torch.get_num_threads())
        self.process = subprocess.Popen(
            [sys.executable, __file__, name, path, theirs, threads],
            env={**os.environ, "OMP_NUM_THREADS": threads},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.about = self._answer()

    def _answer(self) -> object:
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            end = f"code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
            raise PeerDied(f"{self.name} ended with {end}; its error, if it wrote one, is above")
        self.process.send_signal(signal.SIGSTOP)
        return json.loads(line)

    def _ask(self, method: str, *args: object) -> object:
        self.process.send_signal(signal.SIGCONT)
        # A peer that has ended is named by _answer.
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps([method, *args]) + "\n")
            self.process.stdin.flush()
        return self._answer()

    def greedy(self, prompts: list[list[int]], n: int) -> list[list[int]]:
        return self._ask("greedy", prompts, n)

    def prefill(self, prompt: list[int]) -> int:
        return self._ask("prefill", prompt)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def _commands() -> Iterator[list]:
    for line in sys.stdin:
        yield json.loads(line)


def _serve(name: str, path: str, precision: str, threads: str) -> None:
    """Answer each line of stdin, [method, *arguments], with a line of stdout until stdin closes."""
    # stdout is for the answers; a library that prints shall do so to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    runner = RUNNERS[name](Path(path), precision, int(threads))
    print(json.dumps(runner.about()), file=answers, flush=True)
    for method, *args in _commands():
        print(json.dumps(getattr(runner, method)(*args)), file=answers, flush=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
