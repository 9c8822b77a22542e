"""``python -m ds_lowrank evaluate`` on tasks made of small files, without a network."""

import argparse
import json
import sys

import pytest

from ds_lowrank.commands import evaluate as command
from ds_lowrank.commands.evaluate import find_model
from ds_lowrank.errors import ConfigError
from tests.engines.pool import run_ranks

CHOICE = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/capitals.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}} "
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
PERPLEXITY = """
task: own_text
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/text.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
"""
WITHOUT_TEXT = PERPLEXITY.replace("own_text", "no_text").replace('doc_to_text: ""\n', "")
OUT_OF_REACH = CHOICE.replace("capitals\n", "far_away\n", 1).replace(
    "dataset_path: json", "dataset_path: no-one/nothing"
)


def make_folder(folder):
    from tests.training.finetuning import make_checkpoints, write_jsonl

    make_checkpoints(folder)
    (folder / "run").mkdir()
    (folder / "llama").rename(folder / "run" / "export")
    (folder / "tasks").mkdir()
    for name, task in (
        ("capitals", CHOICE),
        ("own_text", PERPLEXITY),
        ("far_away", OUT_OF_REACH),
        ("no_text", WITHOUT_TEXT),
    ):
        (folder / "tasks" / f"{name}.yaml").write_text(task.replace("FOLDER", str(folder)))
    questions = [{"question": f"{n}?", "choices": ["a", "bc", "d"], "answer": n % 3} for n in range(7)]
    write_jsonl(folder / "capitals.jsonl", questions)
    write_jsonl(folder / "text.jsonl", [{"text": "one two"}, {"text": "three"}])
    return questions


def evaluate(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(arguments))


def evaluate_all(folder):
    """The exit codes and outputs of several command lines in one process, as lm-eval takes seconds to import."""
    import contextlib
    import io
    import multiprocessing
    import os

    import datasets
    import huggingface_hub
    from lm_eval import evaluator

    # What takes ten seconds: the table is laid out in other processes, and pip is asked for all packages.
    multiprocessing.cpu_count = lambda: 1
    evaluator.add_env_info = lambda results: None
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    os.environ["HF_DATASETS_CACHE"] = datasets.config.HF_DATASETS_CACHE = str(folder / "cache")
    run, tasks = str(folder / "run"), ("--include-path", str(folder / "tasks"))
    found = {}
    for name, more in {
        "both": ("--tasks", "capitals", "own_text", "--batch-size", "2", "--dtype", "float32"),
        "few": ("--tasks", "cap*", "--limit", "3", "--num-fewshot", "1", "--output", str(folder / "few.json")),
        "far": ("--tasks", "far_away"),
        "yaml": ("--tasks", "no_text"),
        "shots": ("--tasks", "capitals", "--num-fewshot", "50"),
        "device": ("--tasks", "capitals", "--device", "cuda:9"),
        "folder": ("--tasks", "capitals", "--include-path", str(folder / "nowhere")),
        "unknown": ("--tasks", "capitols"),
    }.items():
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = evaluate(run, *tasks, *more)
        last = [line for line in err.getvalue().splitlines() if line.startswith("python -m ds_lowrank")]
        found[name] = code, out.getvalue(), last
    return found


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    questions = make_folder(folder)
    (found,) = run_ranks(1, evaluate_all, folder)
    return folder, questions, found


def log_probability(model, tokenizer, before, text):
    import torch

    ids, own = (tokenizer(part, add_special_tokens=False).input_ids for part in (before, text))
    ids = ids or [tokenizer.eos_token_id]  # what lm-eval puts before a text of its own
    with torch.no_grad():
        logits = model(torch.tensor([ids + own])).logits[0].double().log_softmax(-1)
    return sum(float(logits[place - 1, token]) for place, token in enumerate(own, len(ids)))


@pytest.mark.slow
def test_the_results_are_those_of_the_model(evaluated):
    """Accuracy and perplexity by hand."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, questions, found = evaluated
    code, out, _ = found["both"]
    assert code == 0 and "capitals" in out and "byte_perplexity" in out
    path = folder / "run" / "evaluation" / "capitals+own_text.json"
    assert f"evaluating {folder / 'run' / 'export'}" in out and f"results in {path}" in out
    results = json.loads(path.read_text())["results"]
    model, tokenizer = (
        auto.from_pretrained(folder / "run" / "export") for auto in (AutoModelForCausalLM, AutoTokenizer)
    )
    right = 0
    for row in questions:
        scores = [log_probability(model, tokenizer, f"{row['question']} ", choice) for choice in row["choices"]]
        right += scores.index(max(scores)) == row["answer"]
    assert results["capitals"]["acc,none"] == pytest.approx(right / 7)
    nats = sum(log_probability(model, tokenizer, "", text) for text in ("one two", "three"))
    # lm-eval's sums are in fp32.
    assert results["own_text"]["byte_perplexity,none"] == pytest.approx(2.718281828459045 ** (-nats / 12), rel=1e-4)


@pytest.mark.slow
def test_flags_reach_lm_eval(evaluated):
    folder, _, found = evaluated
    assert found["few"][0] == 0
    results = json.loads((folder / "few.json").read_text())
    assert results["n-shot"] == {"capitals": 1} and results["n-samples"]["capitals"] == {"original": 7, "effective": 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("far", "; check the network, or fill the cache of datasets where there is one"),
        ("yaml", "--tasks no_text cannot be loaded (TypeError"),
        ("shots", "lm-eval cannot measure "),
        ("device", "--device cuda:9: this machine has "),
        ("folder", "nowhere: no such folder"),
        ("unknown", "--tasks capitols: lm-eval has no such task; did you mean capitals"),
    ],
)
def test_bad_input_is_one_line(evaluated, name, message):
    code, _, lines = evaluated[2][name]
    assert code == 1 and len(lines) == 1 and message in lines[0]


def test_a_folder_without_a_model_is_refused(tmp_path, capsys):
    classifier = {"architectures": ["LlamaForSequenceClassification"]}
    for name, config, message in [
        ("none", None, "none: no such folder"),
        ("empty", "", "has no model: neither best/, which launch/finetune.py writes, nor export/"),
        ("damaged", "{", "config.json is damaged"),
        (
            "classifier",
            json.dumps(classifier),
            "is a LlamaForSequenceClassification, and lm-eval measures language models",
        ),
        ("mute", json.dumps({"architectures": ["LlamaForCausalLM"]}), "has no tokenizer"),
    ]:
        if config is not None:
            (tmp_path / name / "best").mkdir(parents=True)
        if config:
            (tmp_path / name / "best" / "config.json").write_text(config)
        with pytest.raises(ConfigError, match=message):
            find_model(tmp_path / name)
    assert evaluate(str(tmp_path / "empty"), "--tasks", "piqa") == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_missing_lm_eval_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("ds_lowrank.commands.evaluate.is_importable", lambda module: module != "lm_eval")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert evaluate(str(tmp_path), "--tasks", "piqa", "--device", "cpu") == 1
    assert "lm-eval is missing: pip install '.[train,evaluate]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [("--limit", "0"), ("--limit", "2.5"), ("--batch-size", "0"), ("--num-fewshot", "-1")]
)
def test_numbers_that_make_no_sense_end_in_usage(flags, capsys):
    with pytest.raises(SystemExit):
        evaluate("run", "--tasks", "piqa", *flags)
    assert f"argument {flags[0]}" in capsys.readouterr().err
