"""What launch/finetune.py refuses: early, in words, on every rank; and what it makes of labels."""

import json
import shutil

import pytest

from ds_lowrank.data.built_in import BUILT_IN
from ds_lowrank.data.errors import DataError
from ds_lowrank.data.records import Row
from ds_lowrank.finetuning.arguments import parse
from ds_lowrank.finetuning.labels import labels_of
from tests.engines.pool import run_ranks
from tests.training.finetuning import command_line, make_workspace, rows, set_up_error, write_jsonl
from tests.training.runs import deepspeed_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_workspace(tmp_path_factory.mktemp("refusals"))
    (folder / "empty").mkdir()
    for copy in ("without_tokenizer", "without_weights", "damaged"):
        shutil.copytree(folder / "llama", folder / copy)
    for file in (folder / "without_tokenizer").glob("tokenizer*"):
        file.unlink()
    (folder / "without_weights" / "model.safetensors").unlink()
    (folder / "damaged" / "model.safetensors").write_bytes(b"no weights")
    shutil.copytree(folder / "roberta", folder / "mislabelled")
    config = json.loads((folder / "roberta" / "config.json").read_text())
    (folder / "mislabelled" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    write_jsonl(folder / "one_class.jsonl", [row | {"label": "cold"} for row in rows(40)])
    write_jsonl(
        folder / "unlabelled.jsonl", [row | {"label": None if row["label"] == "hot" else "cold"} for row in rows(40)]
    )
    write_jsonl(folder / "few.jsonl", rows(5))
    write_jsonl(folder / "rare.jsonl", [*rows(2), rows(1)[0] | {"text": "a word142"}, *rows(40)])
    write_jsonl(
        folder / "nan.jsonl", [row | {"number": float("nan") if n == 20 else n % 3} for n, row in enumerate(rows(40))]
    )
    write_jsonl(folder / "others.jsonl", [row | {"label": "icy"} for row in rows(9)])
    write_jsonl(folder / "no_text.jsonl", [row | {"text": ""} for row in rows(40)])
    make_wide_tokenizers(folder)
    make_prompts(folder)
    return folder


def make_prompts(folder):
    """Rows of questions and answers, some of which cannot be used, and templates."""
    good = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(12)]
    write_jsonl(folder / "questions.jsonl", good)
    write_jsonl(folder / "mute.jsonl", [*good, {"question": "why?", "answer": " "}])
    write_jsonl(folder / "wordy.jsonl", [*good, *({"question": "why " * n, "answer": "#### 1"} for n in (9, 20))])
    write_jsonl(folder / "unmarked.jsonl", [*good, {"question": "why?", "answer": "1"}])
    write_jsonl(folder / "unasked.jsonl", [*good, {"question": "", "answer": "1"}])
    write_jsonl(folder / "choices.jsonl", [{"question": "?", "choices": ["1", "2"], "answer": 4} for _ in range(12)])
    for name, template in {
        "other": {"prompt": "{query}?", "completion": "{answer}"},
        "optional": {"prompt": ["{hint} {question}", "{question}"], "completion": "{answer}"},
        "half": {"prompt": "{question"},
        "open": {"prompt": "{question", "completion": "{answer}"},
        "fixed": {"prompt": "{question}", "completion": "yes"},
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(template))
    (folder / "broken.json").write_text("{")


def make_wide_tokenizers(folder):
    from transformers import PreTrainedTokenizerFast

    from ds_lowrank.data.tokenizer import load_tokenizer

    bytes_ = load_tokenizer("bytes", lambda: iter(()), cache_dir=folder).tokenizer
    wide = PreTrainedTokenizerFast(tokenizer_object=bytes_.backend_tokenizer, eos_token="<|endoftext|>")
    wide.add_tokens([f"word{number}" for number in range(143)])
    wide.save_pretrained(folder / "wide")
    wide.add_special_tokens({"pad_token": "<pad>"})
    wide.save_pretrained(folder / "padded")


REFUSED = [
    (["--label-column", "sentiment"], "line 1 has no column 'sentiment' (it has: text, other, label, number)"),
    (["--text-column", "sentence"], "line 1 has no column 'sentence'"),
    (["--text-column", "number"], "column 'number' contains 0.5, which is not text"),
    (["--model", "{}/roberta", "--task", "causal-lm"], "is a RobertaForMaskedLM, which does not predict the next"),
    (["--model", "{}/empty"], "is not a checkpoint: the folder has no config.json"),
    (["--model", "{}/none"], "none: no such folder"),
    (["--model", "{}/none.json"], "no model configuration at"),
    (["--model", "{}/without_tokenizer"], "no tokenizer in"),
    (["--model", "{}/without_weights"], "the weights cannot be read"),
    (["--model", "{}/damaged"], "the weights cannot be read"),
    (["--model", "{}/mislabelled"], "is not a checkpoint of a RobertaForSequenceClassification: it has no fitting"),
    (
        ["--tokenizer", "{}/wide", "--data", "{}/rare.jsonl"],
        "rare.jsonl, line 3 uses token id 399 ('word142'), but the model's vocab_size is 300",
    ),
    (["--tokenizer", "{}/padded"], "the padding of shorter examples uses token id 400 ('<pad>'), but"),
    (["--max-length", "65"], "--max-length 65 is above the limit of 64 tokens of the model"),
    (["--data", "{}/few.jsonl"], "5 training examples are fewer than one batch of 8"),
    (["--data", "{}/none.jsonl"], "no data at"),
    (["--data", "{}/none.txt"], "no data at"),
    (["--data", "{}/one_class.jsonl"], "has only one class, 'cold'"),
    (["--data", "{}/unlabelled.jsonl"], "unlabelled.jsonl, line 2; remove these rows"),
    (["--data", "{}/no_text.jsonl"], "line 1 has no text in text; remove it"),
    (
        ["--validation", "{}/others.jsonl"],
        "others.jsonl, line 1: label 'icy' is not among the classes",
    ),
    (["--data", "stdlib-functions"], "'stdlib-functions' has its own validation split"),
    (["--data", "{}/nan.jsonl", "--label-column", "number"], "nan.jsonl, line 21: label nan is not finite in fp32"),
    (["--best-metric", "f1"], "--best-metric f1: this task measures accuracy, mcc, loss"),
    (["--lora-rank", "4", "--model", "{}/model.json"], "--lora-rank adapts trained weights"),
    (["--lora-rank", "4", "--lora-targets", "nothing"], "--lora-targets ['nothing']: No modules were targeted"),
    (["--resume", "global_step3"], "no checkpoint 'global_step3'"),
]


QUESTIONS = ["--task", "causal-lm", "--data", "{}/questions.jsonl", "--validation", "{}/questions.jsonl"]
ASKED = [*QUESTIONS, "--template", "question-answer"]
GENERATED = [*ASKED, "--max-new-tokens", "8"]
REFUSED += [
    ([*QUESTIONS, "--template", "{}/other.json"], "line 1 has no column 'query' (it has: question, answer), which is"),
    (
        [*QUESTIONS, "--template", "{}/optional.json"],
        "has no column 'hint' (it has: question, answer), which is a place",
    ),
    ([*QUESTIONS, "--template", "{}/half.json"], "expected a JSON object with 'prompt', 'completion' and"),
    ([*QUESTIONS, "--template", "{}/open.json"], "write {column} or {column[0]}, and {{ for a brace"),
    ([*QUESTIONS, "--template", "{}/fixed.json"], "a prompt or completion without a placeholder"),
    ([*QUESTIONS, "--template", "{}/broken.json"], "broken.json cannot be read as JSON"),
    ([*QUESTIONS, "--template", "alpacca"], "--template alpacca: no such file; did you mean alpaca? Known by name"),
    (
        [*ASKED, "--data", "{}/choices.jsonl", "--template", "mmlu"],
        "no list with a value 2, which the template asks for",
    ),
    ([*ASKED, "--data", "{}/mute.jsonl"], "mute.jsonl, line 13 has an empty answer in 'answer'; remove it"),
    (
        [*ASKED, "--data", "{}/wordy.jsonl"],
        "line 13: its prompt has 54 tokens (as in 1 other rows, of up to 98), which leaves no room for an answer in "
        "--max-length 32",
    ),
    ([*ASKED, "--chat"], "has no chat template; use --template"),
    ([*ASKED, "--best-metric", "exact_match"], "--best-metric exact_match: this task measures perplexity, loss"),
    ([*ASKED, "--max-new-tokens", "60"], "are more than the 64 tokens that the model takes: lower --max-new-tokens"),
    (
        [*GENERATED, "--match", "number", "--validation", "{}/unmarked.jsonl"],
        "line 13: --match number finds nothing to compare in the answer ' 1' of 'answer': correct it, or choose",
    ),
    (
        [
            *(*QUESTIONS[:-1], "{}/unasked.jsonl", "--max-new-tokens", "8"),
            *("--prompt-column", "question", "--completion-column", "answer"),
        ],
        "unasked.jsonl, line 13 has no prompt to generate an answer to; remove it",
    ),
]


def set_up_errors(command_lines):
    return [set_up_error(arguments) for arguments in command_lines]


def test_what_cannot_be_trained_is_refused_on_both_ranks(folder):
    starts = [command_line(folder, "refused", *(flag.format(folder) for flag in flags)) for flags, _ in REFUSED]
    for messages in run_ranks(2, set_up_errors, starts):
        for (flags, expected), message in zip(REFUSED, messages, strict=True):
            assert expected in message, flags
    assert not (folder / "refused").exists()


def test_tokens_beyond_the_model_that_the_data_do_not_use_are_no_reason_to_refuse(folder):
    # 400 tokens for a model of 300.
    (message,) = run_ranks(1, set_up_error, command_line(folder, "wide", "--tokenizer", str(folder / "wide")))
    assert message == "nothing refused"


@pytest.mark.slow
def test_built_in_tasks_need_no_other_flag_and_are_the_same_on_both_ranks(folder):
    by_file = [name for name, task in BUILT_IN.items() if task.held_out_by == "file"]
    starts = [command_line(folder, name, "--data", name) for name in by_file]
    for start in starts:
        validation = start.index("--validation")
        del start[validation : validation + 2]
    assert run_ranks(2, set_up_errors, starts) == [["nothing refused"] * len(by_file)] * 2


def set_up_error_of_own_command(command_lines):
    from torch import distributed

    return set_up_error(command_lines[distributed.get_rank()])


def test_what_one_rank_finds_wrong_ends_both(folder):
    starts = [command_line(folder, "alone"), command_line(folder, "alone", "--model", str(folder / "empty"))]
    for message in run_ranks(2, set_up_error_of_own_command, starts):
        assert "is not a checkpoint: the folder has no config.json" in message


def test_two_kinds_of_adapters_are_refused(folder):
    config = deepspeed_config()
    config["optimizer"] = {"type": "GradNormLoRP", "params": {"lr": 0.01, "parametrization": "adapter"}}
    (message,) = run_ranks(1, set_up_error, command_line(folder, "twice", "--lora-rank", "4", config=config))
    assert "--lora-rank and parametrization 'adapter' are two kinds of adapters" in message


@pytest.mark.parametrize(
    ("optimizer", "more", "message"),
    [
        ("GaLore", [], "--matrix-lr-scale is not for GaLore: set optimizer.params.scale"),
        ("AdamW", ["--lora-rank", "4"], "--lora-rank leaves the layers' matrices as they are"),
    ],
)
def test_a_rate_of_matrices_that_have_none_is_refused(folder, optimizer, more, message):
    arguments = command_line(folder, "rates", "--matrix-lr-scale", "0.5", *more, config=deepspeed_config(optimizer))
    assert message in run_ranks(1, set_up_error, arguments)[0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompt-column", "text"], "belong together"),
        (["--prompt-column", "a", "--completion-column", "b"], "are for --task causal-lm"),
        (["--text-column", "a", "b", "c"], "one column, or two"),
        (["--held-out", "1"], "fraction between 0 and 1"),
        (
            ["--task", "causal-lm", "--template", "alpaca", "--prompt-column", "a", "--completion-column", "b"],
            "give one",
        ),
        (["--max-new-tokens", "3"], "a classifier neither reads prompts nor generates answers"),
        (["--task", "causal-lm", "--chat"], "--chat needs prompts: give --template, or --prompt-column and"),
        (["--task", "causal-lm", "--template", "alpaca", "--match", "letter"], "give --max-new-tokens too"),
        (["--task", "gsm8k", "--text-column", "a"], "--task gsm8k has a template: leave --prompt-column and"),
        (["--train-split", "a"], "are for --data hf:NAME"),
        (["--steps", "3"], "not allowed with argument --epochs"),
    ],
)
def test_flags_that_contradict_each_other_end_in_usage(folder, more, message, capsys):
    with pytest.raises(SystemExit):
        parse(command_line(folder, "usage", *more))
    assert message in capsys.readouterr().err


def test_a_task_by_name_stands_for_flags_that_can_be_overridden(folder):
    command = ["--deepspeed_config", "a.json", "--model", "m", "--output", "o", "--task"]
    found = parse([*command, "gsm8k"])
    assert (found.task, found.data, found.train_split, found.validation_split) == (
        *("causal-lm", "hf:openai/gsm8k:main", None, "test"),
    )
    assert (found.template, found.match, found.max_new_tokens, found.max_length) == (
        "question-answer",
        "number",
        256,
        512,
    )
    found = parse([*command, "mmlu", "--max-length", "300", "--match", "text"])
    assert (found.template, found.match, found.max_length, found.train_split) == (
        "mmlu",
        "text",
        300,
        "auxiliary_train",
    )
    own = parse([*command, "commonsense", "--data", "own.json"])
    assert (own.data, own.validation_split, own.held_out, own.match) == ("own.json", None, 0.1, "option")


def labelled(values):
    return [Row({"label": value}, f"row {number}") for number, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "names", "classes", "numbers"),
    [
        (["b", "a", "b"], None, ("a", "b"), [1, 0, 1]),
        ([2, 10, 2], None, ("2", "10"), [0, 1, 0]),
        (["2", "10", "2"], None, ("2", "10"), [0, 1, 0]),  # as a CSV file has them
        ([True, False], None, ("false", "true"), [1, 0]),
        ([1, 0], ["not_equivalent", "equivalent"], ("not_equivalent", "equivalent"), [1, 0]),
        ([0.5, 3], None, (), [0.5, 3.0]),
        (["3.800", "5"], None, (), [3.8, 5.0]),
    ],
)
def test_labels_are_classes_or_numbers(values, names, classes, numbers):
    labels = labels_of(labelled(values), "label", names)
    assert labels.classes == classes
    assert [labels.number(value, "row") for value in values] == numbers


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", "b", 1], r"mixes kinds of labels \(int in row 2, str in row 0\)"),
        ([[1], [2]], "mixes kinds"),
        ([1, 1], "one class"),
        (["a", ""], "no label in 1 rows, first in row 1"),
        ([1, float("nan"), 2], "^row 1: label nan is not finite"),
        (["0.5", "inf"], "^row 1: label inf is not finite"),
        ([0.5, 1e39], "^row 1: label 1e"),
        ([0.5, 10**400], "^row 1: label 1000"),
    ],
)
def test_other_labels_are_refused(values, message):
    with pytest.raises(DataError, match=message):
        labels_of(labelled(values), "label", None)


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    from ds_lowrank.data.example_tokenizer import _published as tokenizer_of
    from ds_lowrank.finetuning.model import find_model

    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    own = {"AutoConfig": "own.Config", "AutoTokenizer": ["own.Tokenizer", None]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": own}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Tokenizer", "auto_map": own}))
    for read in (lambda: find_model(str(tmp_path), "classification"), lambda: tokenizer_of(str(tmp_path))):
        with pytest.raises(ValueError, match=str(tmp_path)):
            read()
    assert not (tmp_path / "ran").exists()
