"""Fine-tuning with every optimizer: accuracy on the default task after equal steps, bytes of state, time.

python -m benchmarks.finetuning

The checkpoint is one that launch/pretrain.py makes first, as `make pretrain` does, on the standard library's source;
the task is to tell the package of a function. Every contender is run with all its rates and all seeds, on one rank and
one core, two runs at a time, and judged by the mean accuracy of its best rate. The accuracy is the last one, not the
best.

*state bytes* are those of all moments and bases: of a low-rank method's matrices as it reports them, and two fp32
moments for every other trained number.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from transformers import LlamaConfig, LlamaForSequenceClassification

from benchmarks import runs
from benchmarks.common import Numbers, options, report
from ds_lowrank import add_adapters
from ds_lowrank.data.functions import CLASSES
from ds_lowrank.optimizer.roles import role_of
from ds_lowrank.placement.parameter_names import tag_from_name

MODEL = runs.ROOT / "ds_configs/models/llama_quickstart.json"
QUICKSTART = runs.ROOT / "ds_configs/galore_zero2.json"
RANK = 8
GAP = 50
MOMENTS = 2 * 4  # bytes of state for a number that AdamW trains


@dataclass(frozen=True, eq=False)
class Contender:
    """``flags``: of launch/finetune.py, beside those that all share."""

    name: str
    type: str
    params: Mapping[str, Any]
    lrs: tuple[float, ...]
    flags: Mapping[str, Any] = field(default_factory=dict)


ADAMW = {"torch_adam": True}
CONTENDERS: tuple[Contender, ...] = (
    Contender("AdamW", "AdamW", ADAMW, (1e-3,)),
    Contender("LoRA", "AdamW", ADAMW, (5e-3,), {"lora-rank": RANK, "lora-alpha": 2 * RANK}),
    Contender("GaLore", "GaLore", {"rank": RANK, "update_proj_gap": GAP, "scale": 1.0}, (4e-3,)),
    Contender(
        "GradNormLoRP", "GradNormLoRP", {"rank": RANK, "update_proj_gap": GAP, "scale": 1.0}, (4e-3,)
    ),
    Contender(
        "GradNormLoRP adapter", "GradNormLoRP",
        {"rank": RANK // 2, "update_proj_gap": GAP, "scale": 1.0, "parametrization": "adapter",
         "adapter_rank": RANK, "adapter_alpha": 2.0 * RANK}, (5e-3, 1e-2),
    ),
    Contender("Lorenza", "Lorenza", {"rank": RANK, "update_proj_gap": GAP}, (4e-3, 8e-3)),
)  # fmt: skip
"""One line a method; ranks are LoRA's, but half of it for the factors of an adapter, which are no wider. The single
rates of AdamW, LoRA and GaLore are the best of three that were tried with one seed; GradNormLoRP has GaLore's."""


@dataclass(frozen=True)
class Setting:
    contender: Contender
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.contender.name.replace(' ', '_')}_lr{self.lr:g}_seed{self.seed}"


Found = dict[Setting, dict[str, Any]]
"""What summary.json says of each run, and the low-rank state's bytes."""


def pretrain(work: Path, arguments: argparse.Namespace) -> Path:
    """The checkpoint that all runs start from; made once in ``work``."""
    output = work / f"pretrained_steps{arguments.pretrain_steps}"
    config = json.dumps({"gradient_clipping": 1.0, "optimizer": json.loads(QUICKSTART.read_text())["optimizer"]})
    file = work / f"{output.name}.json"
    if not runs.finished(output, file, config):
        shutil.rmtree(output, ignore_errors=True)
        file.write_text(config)
        flags = {
            "deepspeed_config": file, "model": MODEL, "output": output, "cache": work / "cache",
            "sequence-length": arguments.max_length, "steps": arguments.pretrain_steps, "save-interval": 0,
            "global-batch-size": arguments.batch_size, "micro-batch-size": arguments.batch_size,
        }  # fmt: skip
        runs.launch("pretrain.py", flags, "--export")
    return output / "export"


def finetune(setting: Setting, checkpoint: Path, work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The summary of a run; one that ``work`` already holds finished, with the same optimizer, is not repeated."""
    contender = setting.contender
    optimizer = {"type": contender.type, "params": {**contender.params, "lr": setting.lr}}
    config = json.dumps({"gradient_clipping": 1.0, "optimizer": optimizer})
    output = work / f"from{arguments.pretrain_steps}_steps{arguments.steps}" / setting.name
    file = output.parent / f"{setting.name}.json"
    if not runs.finished(output, file, config):
        shutil.rmtree(output, ignore_errors=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(config)
        flags = {
            "deepspeed_config": file, "model": checkpoint, "output": output, "max-length": arguments.max_length,
            "steps": arguments.steps, "seed": setting.seed, "save-interval": 0,
            "global-batch-size": arguments.batch_size, "micro-batch-size": arguments.batch_size,
        }  # fmt: skip
        runs.launch("finetune.py", {**flags, **contender.flags})
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text())
    last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    print(f"{setting.name}: {summary['eval_accuracy']:.4f}", file=sys.stderr, flush=True)
    return {**summary, "lowrank": last.get("lowrank/state_bytes")}


def projected_numbers(contender: Contender) -> int:
    """In the matrices that a low-rank method projects."""
    model = LlamaForSequenceClassification(LlamaConfig(**json.loads(MODEL.read_text()), num_labels=CLASSES))
    if contender.params.get("parametrization") == "adapter":
        add_adapters(model, adapter_rank=contender.params["adapter_rank"])
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return sum(p.numel() for name, p in named if role_of(tag_from_name(name), tuple(p.shape), None, ()).projected)


def state_bytes(contender: Contender, summary: Mapping[str, Any]) -> int:
    trained = int(summary["trainable_parameters"])
    if summary["lowrank"] is None:
        return MOMENTS * trained
    return int(summary["lowrank"]) + MOMENTS * (trained - projected_numbers(contender))


def table(found: Found) -> Numbers:
    """One record for each contender and rate, the best rate of each marked."""
    rows: Numbers = []
    for contender in dict.fromkeys(setting.contender for setting in found):
        own: Numbers = []
        for lr in contender.lrs:
            each = [found[s] for s in found if s.contender == contender and s.lr == lr]
            accuracies = [summary["eval_accuracy"] for summary in each]
            own.append(
                {
                    "optimizer": contender.name,
                    "lr": lr,
                    "accuracy": mean(accuracies),
                    "seeds": ", ".join(f"{accuracy:.3f}" for accuracy in accuracies),
                    "trainable": each[0]["trainable_parameters"],
                    "state bytes": state_bytes(contender, each[0]),
                    "seconds": mean(summary["seconds"] for summary in each),
                }
            )
        highest = max(row["accuracy"] for row in own)
        rows += [{**row, "best": "yes" if row["accuracy"] == highest else ""} for row in own]
    return rows


def parse() -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--work", type=Path, metavar="DIR", help="keeps the runs, and repeats only those missing")
    parser.add_argument("--pretrain-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=118, help="of every run; an epoch")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences")
    parser.add_argument("--max-length", type=int, default=128, help="tokens")
    parser.add_argument("--seeds", type=int, default=2, help="of every setting")
    parser.add_argument("--only", nargs="+", help="contenders; all by default")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(steps=5, pretrain_steps=5, seeds=1)
    return arguments


def main() -> None:
    arguments = parse()
    contenders = [c for c in CONTENDERS if arguments.only is None or c.name in arguments.only]
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    with runs.working_folder(arguments.work) as work:
        checkpoint = pretrain(work, arguments)
        settings = [
            Setting(contender, lr, seed)
            for contender in contenders
            for lr, seed in product(contender.lrs[:1] if arguments.quick else contender.lrs, seeds)
        ]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            summaries = list(pool.map(lambda s: finetune(s, checkpoint, work, arguments), settings))
    report(table(dict(zip(settings, summaries, strict=True))), arguments)


if __name__ == "__main__":
    main()
