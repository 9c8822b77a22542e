"""The nine tasks of GLUE on stand-ins of their data sets, their scores, and proteins: classifiers by one command."""

import json
import types

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from ds_lowrank.commands import glue
from ds_lowrank.data.glue import GLUE
from ds_lowrank.errors import ConfigError
from tests.engines.pool import run_ranks
from tests.training.finetuning import command_line, finetune, make_checkpoints, write_jsonl
from tests.training.runs import deepspeed_config

CLASSES = {task: ["no", "yes"] for task in GLUE} | {"mnli": ["entailment", "neutral", "contradiction"]}


def stand_in(task):
    """Splits with the columns and the kind of labels of the hub's data set; -1 as in its unlabelled test split."""
    import datasets

    columns = GLUE[task].columns
    names = CLASSES[task]
    label = datasets.Value("float32") if task == "stsb" else datasets.ClassLabel(names=names)
    features = datasets.Features({**dict.fromkeys(columns, datasets.Value("string")), "label": label})

    def split(start, count, hidden=False):
        numbers = range(start, start + count)
        labels = [float(n % 6) * 0.9 if task == "stsb" else -1 if hidden else n % len(names) for n in numbers]
        rows = [{**{c: f"{c} {n % 6}" for c in columns}, "label": x} for n, x in zip(numbers, labels, strict=True)]
        return datasets.Dataset.from_list(rows, features=features)

    validation = dict.fromkeys(GLUE[task].validation.values())
    return {"train": split(0, 8), "test": split(20, 4, hidden=True)} | {name: split(10, 12) for name in validation}


def finetune_all(command_lines):
    """Every task, one after the other, with the hub's loader replaced."""
    import datasets

    datasets.load_dataset = lambda name, config: {"nyu-mll/glue": stand_in(config)}[name]
    return {task: finetune(arguments) for task, arguments in command_lines.items()}


def write_summary(folder, found):
    from ds_lowrank.training.output import write_results

    write_results(folder, found["records"][-1]["step"], {key: found[key] for key in ("data", "best")})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run of each task, of one step."""
    folder = tmp_path_factory.mktemp("glue")
    make_checkpoints(folder)
    model = ("--model", str(folder / "roberta"), "--epochs", "1")
    lines = {task: with_data(command_line(folder, task, *model), f"glue:{task}") for task in GLUE}
    (results,) = run_ranks(1, finetune_all, lines)
    for task, found in results.items():
        write_summary(folder / task, found)
    return folder, results


def with_data(arguments, data):
    at, of = arguments.index("--data"), arguments.index("--validation")
    return [*arguments[:at], "--data", data, *arguments[of + 2 :]]


@pytest.mark.slow
def test_every_task_measures_its_own_metrics(runs):
    folder, results = runs
    for task, found in results.items():
        last = found["records"][-1]
        names = {f"{prefix}{name}" for prefix in GLUE[task].validation for name in ("loss", *GLUE[task].metrics)}
        assert {key for key in last if key.startswith("eval_")} == {f"eval_{name}" for name in names}
        model = AutoModelForSequenceClassification.from_pretrained(folder / task / "best")
        assert [*model.config.id2label.values()] == (["value"] if task == "stsb" else CLASSES[task])


@pytest.mark.slow
def test_the_table_has_all_nine_and_both_averages(runs):
    folder, results = runs
    lines = glue.table([folder / task for task in reversed(GLUE)], all_nine=True)
    assert [line.split()[0] for line in lines] == ["task", *GLUE, "average", "average"]
    decisive = {task: 100 * found["best"]["value"] for task, found in results.items()}
    for line in lines[1:-2]:
        assert float(line.split()[1]) == pytest.approx(decisive[line.split()[0]], abs=0.05 + 1e-9)  # one decimal
    eight = [value for task, value in decisive.items() if task != "wnli"]
    assert float(lines[-2].split()[1]) == pytest.approx(sum(eight) / 8, abs=0.05 + 1e-9)
    assert float(lines[-1].split()[1]) == pytest.approx(sum(decisive.values()) / 9, abs=0.05 + 1e-9)
    assert lines[-2].endswith("of 8 of 8 tasks without wnli") and lines[-1].endswith("of 9 of 9 tasks")


def write_run(folder, task, step, records, **summary):
    folder.mkdir()
    summary = {"data": task, "finished": True, "step": 9, "best": {"metric": "m", "value": 0, "step": step}} | summary
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_scores_by_hand(tmp_path):
    """Of the best step, not the last; the mean of two metrics, and of both splits of MNLI."""
    mrpc = write_run(
        tmp_path / "a",
        "glue:mrpc",
        3,
        [{"step": 3, "eval_f1": 0.9, "eval_accuracy": 0.85}, {"step": 9, "eval_f1": 0.1, "eval_accuracy": 0.2}],
    )
    record = {"step": 9, "eval_accuracy": 0.8, "eval_mismatched_accuracy": 0.84}
    mnli = write_run(tmp_path / "b", "glue:mnli", 9, [record])
    with pytest.raises(ConfigError, match="no runs on: cola, sst2, stsb, qqp, qnli, rte, wnli; without --all-nine"):
        glue.table([mnli, mrpc], all_nine=True)
    assert glue.table([mnli, mrpc]) == [
        "task     score  mean  step  metrics",
        "mrpc     90.0   87.5  3     f1 90.0, accuracy 85.0",
        "mnli     80.0   82.0  9     accuracy 80.0, mismatched_accuracy 84.0",
        "average  85.0   84.8        of 2 of 8 tasks without wnli",
        "no runs on: cola, sst2, stsb, qqp, qnli, rte, wnli",
    ]


def test_other_runs_are_refused_in_one_line(tmp_path, capsys):
    good = write_run(tmp_path / "good", "glue:rte", 9, [{"step": 9, "eval_accuracy": 0.5}])
    again = write_run(tmp_path / "again", "glue:rte", 9, [{"step": 9, "eval_accuracy": 0.5}])
    other = write_run(tmp_path / "other", "stdlib-functions", 9, [])
    short = write_run(tmp_path / "short", "glue:rte", 9, [], finished=False)
    for folders, message in [
        ([tmp_path / "none"], "is not the output of a run that has ended: it has no summary.json"),
        ([good, again], "are both runs on glue:rte: give one of them"),
        ([other], "is a run on stdlib-functions, and no GLUE task"),
        ([short], "has not finished: it is at step 9; resume it first"),
    ]:
        with pytest.raises(ConfigError, match=message):
            glue.table(folders)
    assert glue.run(types.SimpleNamespace(runs=[other], all_nine=False)) == 1
    assert capsys.readouterr().err.count("\n") == 1


ACIDS = "LAGVSERTIDPKQNFYMHWC"


def make_esm(folder):
    """An ESM of two layers with its own tokenizer, which has a token for each amino acid."""
    from transformers import EsmConfig, EsmForMaskedLM, EsmTokenizer

    folder.mkdir()
    vocabulary = ["<cls>", "<pad>", "<eos>", "<unk>", *ACIDS, "X", "B", "U", "Z", "O", ".", "-", "<null_1>", "<mask>"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    EsmTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = EsmConfig(
        vocab_size=64,  # more than the tokens: ``finetune`` ends with a batch of larger ids
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=66,
        pad_token_id=1,
        mask_token_id=len(vocabulary) - 1,
        position_embedding_type="rotary",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    EsmForMaskedLM(config).save_pretrained(folder)


def proteins(start, count):
    """Sequences that are rich in tryptophan or in cysteine."""
    return [
        {
            "sequence": f"M{(ACIDS[n % 7 :] + ACIDS)[: 12 + n % 5]}" + "WC"[n % 2] * 6,
            "family": ("kinase", "ligase")[n % 2],
        }
        for n in range(start, start + count)
    ]


@pytest.mark.slow
def test_proteins_are_classified_alike_at_two_stages(tmp_path):
    """From a masked language model of proteins, on two ranks."""
    make_esm(tmp_path / "esm")
    data = ("--data", str(write_jsonl(tmp_path / "proteins.jsonl", proteins(0, 32))))
    more = ("--validation", str(write_jsonl(tmp_path / "held_out.jsonl", proteins(50, 10))))
    columns = ("--text-column", "sequence", "--label-column", "family")
    flags = ("--model", str(tmp_path / "esm"), *data, *more, *columns, "--lr", "0.003")
    two, three = (
        run_ranks(
            2,
            finetune,
            command_line(tmp_path, f"out{stage}", *flags, config=deepspeed_config(zero_stage=stage), epochs=5),
        )[0]
        for stage in (2, 3)
    )
    assert two["records"][0]["lowrank/projected_matrices"] == 2 * 6
    assert two["best"]["value"] == three["best"]["value"] == 1.0
    for ours, theirs in zip(three["records"], two["records"], strict=True):
        assert ours["loss"] == pytest.approx(
            theirs["loss"], rel=1e-3, abs=1e-5
        )  # 20 steps of fp32 sums in other orders
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out3" / "best")
    assert type(model).__name__ == "EsmForSequenceClassification"
    assert model.config.id2label == {0: "kinase", 1: "ligase"}
