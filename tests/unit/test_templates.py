"""Prompts that templates make of rows, and what is compared of answers: texts written out by hand."""

import json
from argparse import Namespace

import pytest

from ds_lowrank.data.errors import DataError
from ds_lowrank.data.records import Row
from ds_lowrank.data.rows import Rows
from ds_lowrank.finetuning.answers import exact_match
from ds_lowrank.finetuning.tasks import make_task
from ds_lowrank.finetuning.templates import load_template, of_columns


def row(**columns):
    return Row(columns, "row 3")


def template(tmp_path, **parts):
    (tmp_path / "template.json").write_text(json.dumps(parts))
    return load_template(str(tmp_path / "template.json"))


def test_alpaca_leaves_the_input_out_where_it_is_empty():
    alpaca = load_template("alpaca")
    with_input = alpaca.prompt_of(row(instruction="Add.", input="1 2", output="3"))
    assert with_input.endswith("request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    for missing in ({"input": " "}, {"input": None}, {}):
        alone = alpaca.prompt_of(row(instruction="Add.", output="3", **missing))
        assert alone.endswith("request.\n\n### Instruction:\nAdd.\n\n### Response:\n") and "paired" not in alone
    assert alpaca.completion_of(row(output="3")) == "3"


def test_a_list_a_number_a_brace_and_text_that_looks_like_a_placeholder(tmp_path):
    found = template(tmp_path, prompt="{{{a b}}} {c[1]}", completion="{n}{t}", names={"n": ["no", "yes"]})
    assert found.prompt_of(row(**{"a b": "{n}", "c": ["x", "y"]})) == "{{n}} y"
    assert found.completion_of(row(n=1, t=True)) == "yestrue"
    assert found.completion_of(row(n="2", t=0.5)) == "20.5"
    with pytest.raises(DataError, match=r"^row 3, column 'n': 2 is none of the numbers 0 to 1, which have names"):
        found.completion_of(row(n=2, t=""))


def test_columns_may_have_any_name():
    found = of_columns("a[0]", "{b}")
    assert found.prompt_of(row(**{"a[0]": "q"})) == "q" and found.completion_of(row(**{"{b}": ""})) == ""
    with pytest.raises(DataError, match="contains 1, which is not text"):
        found.completion_of(row(**{"{b}": 1}))


def test_the_names_of_classes_come_from_the_data_set_or_the_template(tmp_path):
    rows = Rows([row(q="a", label=1, kind=0)], {}, {"label": ["no", "yes"], "kind": ["x"]})
    template(tmp_path, prompt="{q}", completion="{label} {kind}", names={"kind": ["own"]})
    flags = {"template": str(tmp_path / "template.json"), "prompt_column": None, "chat": False, "max_new_tokens": None}
    task = make_task(Namespace(task="causal-lm", data="hf:x", text_column=None, **flags), rows)
    assert list(task.texts(rows.train)) == ["a", "yes own"] and task.metrics == ("perplexity",)


@pytest.mark.parametrize("text", ["{}", "{a!r}", "{a:>3}", "{a[x]}", "{a", "a}"])
def test_what_is_no_placeholder_is_refused(tmp_path, text):
    with pytest.raises(DataError, match=r"write \{column\} or \{column\[0\]\}, and \{\{ for a brace"):
        template(tmp_path, prompt=f"{text} {{q}}", completion="{a}")


@pytest.mark.parametrize(
    ("match", "generated", "answer", "right"),
    [
        ("text", " yes\n", "yes", True),
        ("text", "yes.", "yes", False),
        ("text", "", "yes", False),
        ("number", "so 1,234 it is\n#### 1,234.", "2+2\n#### 1234", True),
        ("number", "#### $-12", "#### -12", True),
        ("number", "#### 12.5", "#### 12", False),
        ("number", "12", "#### 12", False),  # a number that is not marked as the answer
        ("number", "#### .", "#### 12", False),
        ("option", "the correct answer is answer2", "answer2", True),
        ("option", "answer1 or answer2", "the correct answer is answer2", False),  # the first counts
        ("option", "True", "true", False),
        ("letter", " B", "B", True),
        ("letter", "(B) because", "B", True),
        ("letter", "Because of A", "B", False),
        ("letter", "the answer is B", "B", False),
    ],
)
def test_what_is_compared(match, generated, answer, right):
    assert exact_match(match, generated, answer) == right
