"""An accelerated transformers model in two processes: under transformers' Trainer, and sharded.

It takes a minute, so it runs with `make test-distributed` only. This file is also the script that
torchrun starts.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

STEPS, ROWS, T, V = 3, 4, 12, 61


def make() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(5)
    sizes = {"vocab_size": V, "n_positions": T, "n_embd": 32, "n_layer": 2, "n_head": 2}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    ends = {"bos_token_id": 0, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(**sizes, **drops, **ends)).train()


def rows() -> list[dict[str, Tensor]]:
    """Return the data; the labels of some tokens are ignored, so that rows weigh differently."""
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(V, (2 * STEPS * ROWS, T), generator=generator)
    labels = [x.masked_fill(torch.arange(T) < i % 7, -100) for i, x in enumerate(ids)]
    return [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]


def trained(ours: bool, world: int, out: Path) -> dict[str, Tensor]:
    """Return the weights after steps of transformers' Trainer, with accumulation and clipping."""
    import transformers

    import gptfast

    model = make()
    args = transformers.TrainingArguments(
        output_dir=str(out), max_steps=STEPS, per_device_train_batch_size=ROWS // world,
        gradient_accumulation_steps=2, max_grad_norm=0.3, learning_rate=1e-3, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, seed=3, weight_decay=0.1,
        **({"ddp_backend": "gloo"} if world > 1 else {}),
    )  # fmt: skip
    optimizer = (gptfast.AdamW if ours else torch.optim.AdamW)(model.parameters(), lr=1e-3)
    trainer = transformers.Trainer(
        gptfast.accelerate(model) if ours else model,
        args,
        train_dataset=rows(),
        optimizers=(optimizer, None),
    )
    trainer.train()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def sharded(shards: bool) -> dict[str, Tensor]:
    """Return the weights after steps on all rows, by plain torch or accelerated and sharded."""
    import gptfast

    model, rank = make(), 0
    if shards:
        import torch.distributed as dist
        from torch.distributed.fsdp import fully_shard

        gptfast.accelerate(model)
        rank = dist.get_rank()
        for module in (*model.transformer.h, model):
            fully_shard(module)
    optimizer = (gptfast.AdamW if shards else torch.optim.AdamW)(model.parameters(), lr=1e-3)
    data = torch.stack([row["input_ids"] for row in rows()]).view(2 * STEPS, ROWS, T)
    for ids in data[:STEPS]:
        mine = ids[2 * rank : 2 * rank + 2] if shards else ids
        optimizer.zero_grad()
        model(input_ids=mine, labels=mine).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
    whole = {name: p.detach() for name, p in model.named_parameters()}
    return {name: p.full_tensor() if shards else p for name, p in whole.items()}


def main() -> None:
    out = Path(sys.argv[1])
    weights = {"trainer": trained(True, 2, out), "sharded": sharded(True)}
    torch.save(weights, out / f"weights-{os.environ['RANK']}.pt")


@pytest.mark.skipif(
    not int(os.environ.get("GPTFAST_TEST_DISTRIBUTED", "0")),
    reason="takes a minute: make test-distributed",
)
def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", __file__, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = {"trainer": trained(False, 1, tmp_path), "sharded": sharded(False)}
    for rank in range(2):
        found = torch.load(tmp_path / f"weights-{rank}.pt")
        for how, weights in expected.items():
            for name, weight in weights.items():
                torch.testing.assert_close(
                    found[how][name], weight, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
                )


if __name__ == "__main__":
    main()
