"""Hints for flags and commands that do not exist: near spellings, and what other programs say.

Also the names of flags in messages of the functions that commands call.
"""

import difflib
import re
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptfast.cli.flags import Flag

# What nanoGPT, transformers, llama.cpp, vLLM and others call what we have. The first entries of a
# line that a command has are suggested; one that begins without a dash is advice for any command.
_FLAGS_ELSEWHERE = """
temp: --temperature
t: --threads | --temperature
n-threads: --threads
threads-batch: --threads
num-threads: --threads
num-workers: --workers
num-proc: --workers
l: --lr
learning-rate: --lr
max-lr: --lr
min-learning-rate: --min-lr
max-iters: --max-steps
num-iterations: --max-steps
num-steps: --max-steps
n-steps: --max-steps
iterations: --max-steps
steps: --max-steps
lr-decay-iters: --max-steps
lr-decay-steps: --decay-steps
max-train-steps: --max-steps
max-epochs: --epochs
num-train-epochs: --epochs
num-epochs: --epochs
n-epochs: --epochs
e: --epochs
warmup-iters: --warmup-steps
num-warmup-steps: --warmup-steps
warmup-ratio: --warmup-steps
warmup: --warmup-steps
lr-scheduler-type: --schedule
lr-scheduler: --schedule
scheduler: --schedule
decay-lr: --schedule constant
b: --batch-size
bs: --batch-size
per-device-train-batch-size: --batch-size
per-device-eval-batch-size: --batch-size
train-batch-size: --batch-size
eval-batch-size: --batch-size
gradient-accumulation-steps: --accumulation-steps
grad-accum-steps: --accumulation-steps
grad-accum: --accumulation-steps
wd: --weight-decay
adam-beta1: --beta1
adam-beta2: --beta2
grad-clip: --max-norm
max-grad-norm: --max-norm
clip-grad: --max-norm
gradient-checkpointing: --activation-checkpointing
torch-compile: --compile
bf16: --precision bf16 | --dtype bf16
fp16: --precision bf16 | --dtype bf16
mixed-precision: --precision bf16
amp: --precision bf16
tf32: --matmul-precision high
allow-tf32: --matmul-precision high
load-in-8bit: --dtype int8
load-in-4bit: --dtype int4
int8: --dtype int8
int4: --dtype int4
quantize: --dtype int8
q: --dtype int8
eval-iters: --eval-batches
eval-steps: --eval-interval
eval-every: --eval-interval
eval-strategy: --eval-interval
logging-steps: --log-interval
log-every: --log-interval
save-steps: --checkpoint-interval
save-every: --checkpoint-interval
save-interval: --checkpoint-interval
save-total-limit: --keep
patience: --early-stopping
early-stopping-patience: --early-stopping
sample-every: --sample-tokens
wandb: --tensorboard
wandb-log: --tensorboard
report-to: --tensorboard
out-dir: --out
output-dir: --out
output: --out
save-dir: --out
logging-dir: --out
overwrite-output-dir: --out (a new directory)
dataset: --data
dataset-name: --data
data-dir: --data
train-file: --data
train-data: --data
input: --data | --prompt
input-file: --data
text: --data | --prompt
validation-file: --split
val-split: --split
test-size: --split
init-from: --init
finetune: --init
pretrained: --init
model-name-or-path: --init
resume-from-checkpoint: --resume
resume-from: --resume
from-checkpoint: --init | --resume
continue: --resume
r: --resume | --stop
n-layers: --n-layer
num-layers: --n-layer
num-hidden-layers: --n-layer
layers: --n-layer
n-heads: --n-head
num-heads: --n-head
num-attention-heads: --n-head
heads: --n-head
hidden-size: --n-embd
d-model: --n-embd
emb-dim: --n-embd
n-embed: --n-embd
embed-dim: --n-embd
width: --n-embd
n-positions: --block-size
n-ctx: --block-size
ctx-size: --block-size
c: --block-size
context-length: --block-size
max-position-embeddings: --block-size
seq-len: --block-size | --max-length
max-seq-length: --block-size | --max-length
sequence-length: --block-size | --max-length
bias: --qkv-bias
resid-pdrop: --dropout
attn-pdrop: --dropout
drop-rate: --dropout
random-seed: --seed
manual-seed: --seed
no-cuda: --device cpu
use-cpu: --device cpu
cpu: --device cpu
gpu: --device cuda
cuda: --device cuda
n-gpu-layers: --device cuda
ngl: --device cuda
model-type: --preset
size: --preset
max-length: --max-new-tokens
max-tokens: --max-new-tokens
max-gen-toks: --max-new-tokens
n-predict: --max-new-tokens
predict: --max-new-tokens
num-tokens: --max-new-tokens
length: --max-new-tokens
tokens: --max-new-tokens
nsamples: --num-samples
n-samples: --num-samples
num-return-sequences: --num-samples
k: --top-k
topk: --top-k
topp: --top-p
minp: --min-p
nucleus: --top-p
do-sample: --temperature (above 0 draws)
greedy: --temperature 0
repeat-penalty: --repetition-penalty
rep-pen: --repetition-penalty
beams: --num-beams
beam-size: --num-beams
start: --prompt
prompt-file: --prompt - < FILE
file: --prompt - < FILE | --data
f: --prompt - < FILE | --data
interactive: gptfast chat
i: gptfast chat
reverse-prompt: --stop
stop-sequence: --stop
stop-strings: --stop
antiprompt: --stop
model-draft: --draft
md: --draft
assistant-model: --draft
speculative-model: --draft
prompt-lookup-num-tokens: --lookup
special: --allow-special
chat-template: --template
dtype: --precision
precision: --dtype
verbose: --stats on
fields: --text-field
column: --text-field
text-column: --text-field
text-key: --text-field
lr-find: --lr-range
n-trials: --trials
dry: --dry-run
"""
# The value of such a flag is a positional argument.
_MODEL = ("m", "model", "model-name", "ckpt", "checkpoint", "model-path", "pretrained", "run")
_COMMANDS_ELSEWHERE = {
    "finetune": "train --init",
    "fine-tune": "train --init",
    "pretrain": "train",
    "fit": "train",
    "resume": "train --resume",
    "sample": "generate",
    "complete": "generate",
    "run": "generate",
    "inference": "generate",
    "infer": "generate",
    "predict": "generate",
    "test": "eval",
    "perplexity": "eval",
    "benchmark": "eval",
    "tokenize": "prepare",
    "preprocess": "prepare",
    "data": "prepare",
    "sweep": "search",
    "tune": "search",
    "export": "convert",
    "quantize": "convert --dtype int8",
    "pack": "convert --dtype int8",
    "pull": "download",
    "get": "download",
    "env": "info",
    "version": "--version",
}
_ELSEWHERE = {
    name: [entry.strip() for entry in entries.split("|")]
    for name, _, entries in (line.partition(":") for line in _FLAGS_ELSEWHERE.split("\n") if line)
}
MAX_SUGGESTIONS = 3


def hint_for(
    word: str, command: str, flags: Sequence["Flag"], commands_with: Callable[[str], list[str]]
) -> str:
    """Return the end of an error about an unknown flag: what was perhaps meant, or "".

    word: the flag without its value. flags: those of the command. commands_with: returns the
    commands that have a flag.
    """
    known = [flag.long for flag in flags if not (flag.hidden or flag.positional)]
    name = word.lstrip("-").replace("_", "-").lower()
    others = commands_with(f"--{name}")[:MAX_SUGGESTIONS]
    # Another command's flag of this very name is likelier than one here that begins with it.
    here = f"--{name}" in known or name in _ELSEWHERE
    if (near := elsewhere(name, known)) and (here or not others):
        return f"; perhaps you meant {' or '.join(near)}"
    if name in _MODEL and any(flag.positional for flag in flags):
        return f"; the model stands without a flag: gptfast {command} MODEL"
    if others:
        typed = ", ".join(f"gptfast {other}" for other in others)
        return f"; {typed} {'has' if len(others) == 1 else 'have'} it"
    refused = [flag for flag in flags if flag.hidden and flag.long.startswith(f"--{name}")]
    near = [] if refused else spelt(name, known)
    return f"; perhaps you meant {near[0]}" if near else ""


def elsewhere(name: str, known: Collection[str]) -> list[str]:
    """Return the flags among `known` that a name without dashes means, likeliest first.

    They have the name, are called so in other programs, or begin with it.
    """
    if (exact := f"--{name}") in known:
        return [exact]
    suggested = [
        entry
        for entry in _ELSEWHERE.get(name, ())
        if not entry.startswith("--") or entry.split()[0] in known
    ]
    begin = [flag for flag in known if flag.startswith(f"--{name}")] if len(name) > 1 else []
    without_no = name.removeprefix("no-")
    if not (suggested or begin) and without_no != name:
        return [f"--no-{flag[2:]}" for flag in elsewhere(without_no, known) if " " not in flag]
    return (suggested or begin)[:MAX_SUGGESTIONS]


def spelt(name: str, known: Collection[str]) -> list[str]:
    """Return the flag among `known` that is spelt nearly as a name without dashes, if one is."""
    return difflib.get_close_matches(f"--{name}", known, n=1, cutoff=0.7) if len(name) > 1 else []


def similar_key(name: str, known: Collection[str]) -> list[str]:
    """Return the keys of a settings file that a name may mean."""
    flags = {f"--{key.replace('_', '-')}": key for key in known}
    name = name.replace("_", "-").lower()
    # Advice on a flag's value is not for a file.
    near = [flag for flag in elsewhere(name, flags) if flag in flags]
    return [flags[flag] for flag in near or spelt(name, flags)]


def with_flags(message: str, flags: Sequence["Flag"]) -> str:
    """Return an error message with the flags of a command in place of their fields' names.

    A function says max_length; who typed a command knows --max-length. Names of one word are words
    of English too: they count where a message begins with them, before "=", and after a flag.
    """
    for flag in flags:
        if not flag.positional:
            name = rf"(?<![\w./='\"-]){flag.name}(?![\w./'\"-])"
            if "_" not in flag.name and flag.name != "lr":
                word = rf"(?<![\w./='\"-]){flag.name}"
                name = rf"^{flag.name}(?= must)|{word}(?==)|(?<= or ){flag.name}(?=, not both)"
            message = re.sub(name, flag.long, message)
    return message


def similar_command(name: str, commands: Collection[str]) -> str:
    """Return the end of an error about an unknown command: what was perhaps meant, or ""."""
    name = name.lower()
    near = difflib.get_close_matches(name, commands, n=1)
    begin = [command for command in commands if name and command.startswith(name)]
    found = _COMMANDS_ELSEWHERE.get(name) or next(iter([*begin, *near]), None)
    if found is None:
        return ""
    return f"; perhaps you meant gptfast {found}"
