"""Rows of fine-tuning data: files, the standard library's functions, and `datasets` on local files."""

import json
from collections import Counter
from dataclasses import replace

import datasets
import pytest

from ds_lowrank.data.built_in import BUILT_IN
from ds_lowrank.data.built_in import FUNCTIONS as FUNCTIONS_TASK
from ds_lowrank.data.errors import DataError
from ds_lowrank.data.functions import CLASSES, FUNCTIONS, functions_in, standard_library_functions
from ds_lowrank.data.rows import Splits, open_rows

RECORDS = [{"text": f"text, {number}", "label": number % 2} for number in range(200)]


def opened(spec, validation=None, held_out=0.1, seed=0):
    return open_rows(str(spec), validation, held_out, seed)


def write_jsonl(path, records=RECORDS):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_formats_hold_the_same_rows(tmp_path):
    whole = opened(write_jsonl(tmp_path / "a.jsonl"), write_jsonl(tmp_path / "b.jsonl", RECORDS[:3]))
    assert whole.train == RECORDS and whole.validation == {"": RECORDS[:3]}
    datasets.Dataset.from_list(RECORDS).to_parquet(tmp_path / "a.parquet")
    assert opened(tmp_path / "a.parquet", tmp_path / "b.jsonl") == whole
    datasets.Dataset.from_list(RECORDS).to_csv(tmp_path / "a.csv")
    assert opened(tmp_path / "a.csv", tmp_path / "b.jsonl").train == [r | {"label": str(r["label"])} for r in RECORDS]


def test_every_row_says_where_it_is(tmp_path):
    rows = opened(write_jsonl(tmp_path / "a.jsonl"), write_jsonl(tmp_path / "train.jsonl", RECORDS[:3]))
    assert [row.where for row in rows.validation[""]] == [f"{tmp_path}/train.jsonl, line {line}" for line in (1, 2, 3)]
    held_out = opened(tmp_path / "a.jsonl", held_out=0.5)
    for row in held_out.train:  # the line in the file, not the number in the split
        assert row.where == f"{tmp_path}/a.jsonl, line {int(row['text'].split()[1]) + 1}"
    (tmp_path / "a.csv").write_text('text,label\n"two\nlines",1\n\nthree,2\n')
    assert [row.where for row in opened(tmp_path / "a.csv", tmp_path / "a.csv").train] == [
        f"{tmp_path}/a.csv, line {line}" for line in (3, 5)
    ]
    (tmp_path / "a.jsonl").unlink()
    write_jsonl(tmp_path / "validation.jsonl", RECORDS[:1])
    assert opened(f"hf:{tmp_path}").train[1].where == f"'hf:{tmp_path}', train split, row 1"


def test_the_held_out_share_depends_on_the_seed_and_keeps_equal_rows_together(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS * 2)
    parts = {seed: opened(path, held_out=0.2, seed=seed) for seed in (0, 1)}
    held_out = {seed: {row["text"] for row in part.validation[""]} for seed, part in parts.items()}
    assert held_out[0] != held_out[1]
    for seed, part in parts.items():
        assert 20 < len(held_out[seed]) < 60 and len(part.validation[""]) == 2 * len(held_out[seed])
        assert not held_out[seed] & {row["text"] for row in part.train}
        assert len(part.train) + len(part.validation[""]) == 400


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "text,label\nhalf of, a sentence,1\n",
            "a.csv, line 2: not as many values as columns in the first",
        ),
        ("a.csv", "text,label\nno label\n", "a.csv, line 2: not as many values"),
        ("a.jsonl", '{"text": "a"}\n[', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", "3\n", "a.jsonl, line 1: expected an object with columns, found int"),
        ("a.jsonl", "", "holds no rows to train on"),
        ("a.parquet", "no parquet", "cannot be read as parquet"),
        ("a.csv", "text,text\na,b\n", "a.csv: several columns are called 'text'"),
        ("a.csv", 'text,label\na,b\n"open,c\nd,e\n', "a.csv, line 4: not CSV"),
        ("a.csv", 'text,label\n"a" b,c\n', "a.csv, line 2: not CSV"),
        ("a.txt", "text", "not a format with columns; give .jsonl, .json, .parquet, .csv"),
    ],
)
def test_unusable_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        opened(tmp_path / name)


def test_an_empty_file_of_validation_rows_is_named(tmp_path):
    for name, content in (("a.jsonl", '{"text": "a"}'), ("b.jsonl", "\n")):
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=r"--validation '.*b.jsonl' holds no rows"):
        opened(tmp_path / "a.jsonl", validation=tmp_path / "b.jsonl")


@pytest.fixture(scope="module")
def functions():
    return standard_library_functions()


def test_the_standard_library_has_balanced_classes(functions):
    counts = Counter(row["label"] for row in functions)
    assert len(counts) == CLASSES
    assert max(counts.values()) == FUNCTIONS and min(counts.values()) >= FUNCTIONS / 2
    assert not counts.keys() & {"test", "site-packages"}
    assert all(row["text"].startswith(("def ", "async def ")) for row in functions)
    assert functions == standard_library_functions()


def test_no_function_is_in_both_splits(functions, monkeypatch):
    monkeypatch.setitem(BUILT_IN, FUNCTIONS_TASK, replace(BUILT_IN[FUNCTIONS_TASK], rows=lambda: functions))
    found = opened(FUNCTIONS_TASK)
    train, validation = ({row["text"] for row in part} for part in (found.train, found.validation[""]))
    assert len(train) + len(validation) == len(functions)  # each source is there once
    assert not train & validation
    assert 0.15 < len(validation) / len(functions) < 0.25
    assert Counter(row["label"] for row in found.validation[""]).most_common()[0][1] < 0.15 * len(validation)


def test_functions_are_outermost_and_long_enough_and_without_decorators():
    found = functions_in(
        "class A:\n"
        "    @decorated\n"
        "    def method(self):\n"
        "        def inside():\n"
        "            return 1\n\n"
        "        return inside\n"
        "def short():\n"
        "    return 1\n"
        "if True:\n"
        "    async def f(\n"
        "        a,\n"
        "    ):\n"
        "        return a\n"
    )
    assert list(found) == [
        "def method(self):\n    def inside():\n        return 1\n\n    return inside",
        "async def f(\n    a,\n):\n    return a",
    ]
    assert list(functions_in("print 'Python 2'")) == []


def test_a_local_data_set_goes_through_datasets(tmp_path):
    write_jsonl(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match="has no 'validation' split"):
        opened(f"hf:{tmp_path}")
    write_jsonl(tmp_path / "validation.jsonl", RECORDS[:5])
    found = opened(f"hf:{tmp_path}")
    assert found.train == RECORDS and found.validation == {"": RECORDS[:5]} and found.classes == {}
    with pytest.raises(DataError, match="no folder /nowhere"):
        opened("hf:/nowhere")


def test_splits_of_a_data_set_can_be_named(tmp_path):
    for name in ("train", "test"):
        write_jsonl(tmp_path / f"{name}.jsonl", RECORDS if name == "train" else RECORDS[:5])
    spec = f"hf:{tmp_path}"
    found = open_rows(spec, None, 0.1, 0, Splits("test", "train"))
    assert found.train == RECORDS[:5] and found.validation == {"": RECORDS}
    part = open_rows(spec, None, 0.3, 0, Splits("train", "none"))
    assert part.validation[""] and {id(row) for row in part.train}.isdisjoint(map(id, part.validation[""]))
    assert sorted(map(str, (*part.train, *part.validation[""]))) == sorted(map(str, RECORDS))
    with pytest.raises(
        DataError, match=r"has no 'dev' split \(it has: .*choose with --train-split and --validation-sp"
    ):
        open_rows(spec, None, 0.1, 0, Splits("train", "dev"))


def test_glue_is_asked_for_by_task_and_keeps_the_order_of_its_classes(monkeypatch):
    features = datasets.Features(
        {"premise": datasets.Value("string"), "label": datasets.ClassLabel(names=["entailment", "neutral"])}
    )
    split = datasets.Dataset.from_list([{"premise": "a", "label": 1}], features=features)
    asked = []

    def load_dataset(name, config):
        asked.append((name, config))
        return {"train": split, "validation_matched": split, "validation_mismatched": split}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = opened("glue:mnli")
    assert asked == [("nyu-mll/glue", "mnli")]
    assert found.train == [{"premise": "a", "label": 1}] and found.validation.keys() == {"", "mismatched_"}
    assert found.classes == {"label": ["entailment", "neutral"]}
    with pytest.raises(DataError, match="no such task; GLUE has cola"):
        opened("glue:mnlli")
    with pytest.raises(DataError, match="has no 'validation' split"):
        opened("glue:rte")


def test_a_data_set_out_of_reach_is_named(monkeypatch):
    def load_dataset(*_):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"'glue:rte' cannot be loaded \(ConnectionError: no route\)"):
        opened("glue:rte")
