"""What a path without a readable model is, in words, and what to do about it."""

import re
from collections.abc import Iterator
from pathlib import Path

from gptfast.config import PRESETS
from gptfast.weights.lazy_tensor import CheckpointError, read_json
from gptfast.weights.transformers import FILES, SHARD

_HUB = re.compile(r"(?:hf:/+|(?:https?:/+)?(?:www\.)?(?:huggingface\.co|hf\.co)/)")
_HUB_NAME = re.compile(r"(?:[\w-][\w.-]{0,95}/)?[\w-][\w.-]{0,95}")
_OURS = "gptfast reads safetensors, torch.save's files, GGUF, llm.c's .bin and OpenAI's directory"
# Files of other programs, by their first bytes.
_STARTS = (
    (b"GGML", "it is GGML, of an older llama.cpp"),
    (b"ggjt", "it is GGML, of an older llama.cpp"),
    (b"\x89HDF", "it is HDF5, of TensorFlow or Keras"),
    (b"\x93NUMPY", "it is an array of NumPy"),
    (b"version https://git-lfs", "it is a pointer of Git LFS; run `git lfs pull` beside it"),
    (b"\x1f\x8b", "it is compressed by gzip; unpack it"),
    (b"\x28\xb5\x2f\xfd", "it is compressed by zstd; unpack it"),
    ((20240520).to_bytes(4, "little"), "it is a token file of llm.c, for --data"),
    ((20240522).to_bytes(4, "little"), "it is an evaluation file of llm.c"),
    ((20240327).to_bytes(4, "little"), "it is llm.c's optimizer state; the model_*.bin is beside"),
)
_OTHER_FORMS = {
    "*.onnx": "ONNX",
    "tf_model*.h5": "TensorFlow's tf_model.h5",
    "flax_model*.msgpack": "Flax's flax_model.msgpack",
    "*.h5": "HDF5",
    "*.msgpack": "Flax's msgpack",
    "*.ot": "Rust's rust_model.ot",
    "*.tflite": "TensorFlow Lite",
    "*.mlmodel": "Core ML",
    "*.mlpackage": "Core ML",
    "openvino_model.*": "OpenVINO",
    "*.npz": "NumPy's npz",
}
_FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".gguf")
_MAX_NAMED = 6


def preset_of(name: str) -> str | None:
    """Return which of OpenAI's models a name stands for, also as the hub names it; else None."""
    plain = _HUB.sub("", name).strip("/").removeprefix("openai-community/").lower()
    return plain if plain in PRESETS else None


def nothing(name: str) -> str:
    """Return what to do for a path at which nothing is."""
    plain = _HUB.sub("", name).strip("/")
    a_file = re.search(r"\.[A-Za-z]{1,11}$", plain) and plain == name
    if a_file or not _HUB_NAME.fullmatch(plain) or ".." in plain:
        return "there is no such directory"
    target = plain.rpartition("/")[2]
    return (
        "there is no such directory; if it is a name on Hugging Face, `hf download "
        f"{plain} --local-dir {target}` gets it, then give {target}"
    )


def file(start: bytes) -> str:
    """Return what a file is that begins with these bytes and that no reader takes."""
    if not start:
        return "it is empty"
    for magic, words in _STARTS:
        if start.startswith(magic):
            return f"{words}; {_OURS}"
    if re.match(rb"\s*<(!doctype|html)", start, re.IGNORECASE):
        return "it is a web page, which a download gave in the place of the file; get it again"
    if start[:1] in b"{[" or all(32 <= b < 127 or b in b"\t\r\n" for b in start):
        return "it is text; " + _OURS
    return (
        "it is not a file of safetensors, torch.save or llm.c; give the directory of an OpenAI or "
        "transformers model"
    )


def directory(path: Path) -> str:
    """Return what is in a directory that no reader takes, and which path or command to give."""
    names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    if not names:
        return "it has no config.json with model.safetensors: it is an empty directory"
    for words in (_adapter(path), _distributed(path), _hub_cache(path), _shards(path)):
        if words:
            return words
    if models := _models_in(path):
        some = ", ".join(str(path / name) for name in models[-_MAX_NAMED:])
        if len(models) == 1:
            return f"the model is in {some}; give that"
        return f"it has {len(models)} models or runs, {some}; give one of them, such as the last"
    if files := _weight_files(path):
        one = path / files[0]
        beside = "" if (path / "config.json").is_file() else ", without a config.json"
        return f"it has {_list(files)}{beside}; give the file itself, {one}"
    for pattern, form in _OTHER_FORMS.items():
        if any(path.glob(pattern)):
            remedy = "use the model it was made from, as model.safetensors"
            if "flax" in pattern or "tf_" in pattern:
                remedy = (
                    "transformers 4 loads it (from_tf or from_flax) and saves model.safetensors"
                )
            return f"it has weights as {form} only, which gptfast does not read; {remedy}"
    if any(path.glob("*.index")):
        return "it has a TensorFlow checkpoint, but no hparams.json with its sizes; put it beside"
    if (path / "checkpoints").is_dir():
        return "it is a run that has saved no checkpoint yet"
    if (path / "config.json").is_file():
        return f"it has a config.json, but no weights; put one of {', '.join(FILES)} beside it"
    return (
        "it has no config.json with model.safetensors, and no checkpoints/; there are only "
        f"{_list(names)}"
    )


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


def _adapter(path: Path) -> str | None:
    """Return what to do with an adapter of peft."""
    if not (path / "adapter_config.json").is_file():
        if (path / "adapter_model.safetensors").is_file():
            return "it is an adapter of peft without adapter_config.json; put that beside it"
        return None
    try:
        base = str(read_json(path / "adapter_config.json").get("base_model_name_or_path"))
    except CheckpointError:
        base = "its base model"
    return (
        f"it is an adapter of peft for {base:.100} without adapter_model.safetensors; save it "
        "again in Python: peft.AutoPeftModelForCausalLM.from_pretrained("
        f"{str(path)!r}).save_pretrained(DIR), then give DIR"
    )


def _distributed(path: Path) -> str | None:
    """Return what to do with a checkpoint of several processes."""
    if any(path.glob("*.distcp")):
        return (
            "it is a distributed checkpoint of torch; `python -m torch.distributed.checkpoint."
            f"format_utils dcp_to_torch {path} model.pt` makes a file of it"
        )
    if any(path.glob("*zero_pp_rank_*")) or (path / "zero_to_fp32.py").is_file():
        return (
            f"it is a checkpoint of DeepSpeed; `python {path}/zero_to_fp32.py {path} DIR` makes "
            "files of it"
        )
    return None


def _hub_cache(path: Path) -> str | None:
    """Return the newest snapshot in a directory of Hugging Face's cache."""
    snapshots = path / "snapshots"
    if not snapshots.is_dir():
        return None
    found = sorted(snapshots.iterdir(), key=lambda entry: entry.stat().st_mtime)
    main = path / "refs" / "main"
    if main.is_file() and (named := snapshots / main.read_text().strip()).is_dir():
        found.append(named)
    if not found:
        return "it is a directory of Hugging Face's cache with nothing in its snapshots"
    return f"it is a directory of Hugging Face's cache; give its snapshot, {found[-1]}"


def _shards(path: Path) -> str | None:
    """Return which of a model's shards are missing."""
    found = {m[0]: m for entry in path.iterdir() if (m := SHARD.fullmatch(entry.name))}
    if not found:
        return None
    first = next(iter(found.values()))
    total = int(first[2])
    pattern = re.sub(r"-\d{5}-", "-{:05}-", first[0])
    missing = [name for i in range(1, total + 1) if (name := pattern.format(i)) not in found]
    if missing:
        return f"it has {len(found)} of the {total} shards of a model; {_list(missing)} are missing"
    return f"it has the {total} shards of a model, but no config.json; put it beside them"


def _models_in(path: Path) -> list[str]:
    """Return the subdirectories that hold a model or a run, the latest or last last."""

    def holds(entry: Path) -> bool:
        files = (*FILES, "hparams.json", "ckpt.pt", "adapter_config.json")
        return any((entry / name).is_file() for name in files) or any(
            entry.glob("checkpoints/step-*")
        )

    found = [entry.name for entry in path.iterdir() if entry.is_dir() and holds(entry)]
    return sorted(found, key=_by_number)


def _by_number(name: str) -> tuple[str, int]:
    """Return a key that sorts checkpoint-10 behind checkpoint-2."""
    number = re.search(r"(\d{1,18})$", name)
    return (name[: number.start()], int(number[1])) if number else (name, -1)


def _weight_files(path: Path) -> list[str]:
    """Return the files that may hold weights, variants of model.safetensors first."""
    skipped = ("optimizer", "scheduler", "training_args", "rng_state", "scaler", "tokenizer")

    def files() -> Iterator[str]:
        for suffix in _FILE_SUFFIXES:
            for entry in path.glob(f"*{suffix}"):
                if entry.is_file() and not entry.name.startswith(skipped):
                    yield entry.name

    return sorted(files(), key=lambda name: (not name.startswith(("model", "pytorch")), name))
