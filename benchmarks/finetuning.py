"""Fine-tuning with every optimizer: accuracy on the default task after equal steps, bytes of state, time.

python -m benchmarks.finetuning

launch/pretrain.py first makes a checkpoint from the standard library's source, as ``make pretrain`` does. The task is
to tell which package a function comes from. Every contender runs with all its learning rates and all seeds, on one rank
and one core, two runs at a time, and is judged by the mean accuracy at its best rate. The accuracy is that of the last
evaluation, not the best one.

*state bytes* covers all moments and bases: for the matrices of a low-rank method, what the method reports; for every
other trained element, two fp32 moments.
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
from ds_lowrank.placement.parameter_names import tag_of, tag_parameters

MODEL = runs.ROOT / "ds_configs/models/llama_quickstart.json"
QUICKSTART = runs.ROOT / "ds_configs/galore_zero2.json"
RANK = 8
GAP = 50
MOMENTS = 2 * 4  # bytes of state per element that AdamW trains


@dataclass(frozen=True, eq=False)
class Contender:
    """An optimizer, its options, and the learning rates it is tried with.

    Attributes:
        name: The label in the table.
        type: DeepSpeed's ``optimizer.type``.
        params: DeepSpeed's ``optimizer.params``, without ``lr``.
        lrs: Learning rates.
        flags: Arguments of launch/finetune.py in addition to those that all contenders share.
    """

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
"""All ranks equal LoRA's, except for an adapter's factors, which have no more columns than that and get half of it.
AdamW, LoRA and GaLore have the best of three learning rates that were tried with one seed, GradNormLoRP has GaLore's.
"""


@dataclass(frozen=True)
class Setting:
    """One run: a contender, one of its learning rates, and a seed."""

    contender: Contender
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """The name of the run's files."""
        return f"{self.contender.name.replace(' ', '_')}_lr{self.lr:g}_seed{self.seed}"


Found = dict[Setting, dict[str, Any]]
"""The summary.json of each run, with the bytes of the low-rank state."""


def pretrain(work: Path, arguments: argparse.Namespace) -> Path:
    """Return the checkpoint that all runs start from, after making it if ``work`` has none."""
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
    """Return the summary of a run; one that is finished in ``work``, with the same optimizer, is not repeated."""
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
    """Count the elements of the matrices that a low-rank method projects."""
    model = LlamaForSequenceClassification(LlamaConfig(**json.loads(MODEL.read_text()), num_labels=CLASSES))
    if contender.params.get("parametrization") == "adapter":
        add_adapters(model, adapter_rank=contender.params["adapter_rank"])
    tag_parameters(model)
    tagged = [(tag_of(p), p) for p in model.parameters() if p.requires_grad]
    return sum(p.numel() for tag, p in tagged if tag and role_of(tag, tuple(p.shape), None, ()).projected)


def state_bytes(contender: Contender, summary: Mapping[str, Any]) -> int:
    """Return the bytes of all moments and bases of a run."""
    trained = int(summary["trainable_parameters"])
    if summary["lowrank"] is None:
        return MOMENTS * trained
    return int(summary["lowrank"]) + MOMENTS * (trained - projected_numbers(contender))


def table(found: Found) -> Numbers:
    """Return one record per contender and learning rate; the best rate of each is marked."""
    rows: Numbers = []
    for contender in dict.fromkeys(setting.contender for setting in found):
        own: Numbers = []
        for lr in dict.fromkeys(s.lr for s in found if s.contender == contender):
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
    """Parse the command line."""
    parser = options(__doc__)
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the runs here; only missing ones are run")
    parser.add_argument("--pretrain-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=118, help="per run; the default is one epoch")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences")
    parser.add_argument("--max-length", type=int, default=128, help="tokens")
    parser.add_argument("--seeds", type=int, default=2, help="per setting")
    parser.add_argument("--only", nargs="+", help="contenders; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="concurrent runs, one core each")
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(steps=5, pretrain_steps=5, seeds=1)
    return arguments


def main() -> None:
    """Measure and report."""
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
