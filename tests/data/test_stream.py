import gzip
import json
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from ds_lowrank.data.errors import DataError
from ds_lowrank.data.sources import open_source
from ds_lowrank.data.stream import StreamReader


def test_documents_are_those_of_the_data_sets_own_split(hf_folder):
    train = open_source(f"hf:{hf_folder}", "train")
    assert list(train.documents()) == [f"shard {shard} document {n}" for shard in range(3) for n in range(100)]
    assert len(list(train.documents())) == 300  # every call starts again
    held_out = open_source(f"hf:{hf_folder}", "validation")
    assert list(held_out.documents()) == [f"held out {n}" for n in range(20)]


def test_named_config_of_a_folder_with_a_card(hf_folder):
    card = {
        "configs": [
            {"config_name": "one", "data_files": [{"split": "train", "path": "train-1.jsonl"}]},
            {"config_name": "two", "data_files": [{"split": "train", "path": "train-2.jsonl"}]},
        ]
    }
    (hf_folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    documents = list(open_source(f"hf:{hf_folder}:two", "train").documents())
    assert documents == [f"shard 2 document {number}" for number in range(100)]
    with pytest.raises(DataError, match=r"cannot be opened as a data set: .*'three' not found.*one.*two"):
        open_source(f"hf:{hf_folder}:three", "train")


def compress_shards(folder: Path) -> None:
    for shard in list(folder.iterdir()):
        (folder / f"{shard.name}.gz").write_bytes(gzip.compress(shard.read_bytes()))
        shard.unlink()


def rewrite_as_parquet(folder: Path) -> None:
    for shard in list(folder.iterdir()):
        texts = [json.loads(line)["text"] for line in shard.read_text().splitlines()]
        table = pyarrow.table({"url": texts, "text": texts})
        pyarrow.parquet.write_table(table, shard.with_suffix(".parquet"), row_group_size=30)
        shard.unlink()


@pytest.mark.parametrize("count", [0, 1, 99, 100, 150, 299, 300])
@pytest.mark.parametrize("rewrite", [lambda folder: None, compress_shards, rewrite_as_parquet])
def test_reader_goes_on_from_any_state(hf_folder, count, rewrite):
    rewrite(hf_folder)
    stream = open_source(f"hf:{hf_folder}", "train")
    reader = StreamReader(stream)
    reader.read(count)
    resumed = StreamReader(stream, StreamReader(stream, reader.state_dict()).state_dict())
    assert resumed.read(1000) == [f"shard {shard} document {n}" for shard in range(3) for n in range(100)][count:]


def test_empty_documents_are_left_out(hf_folder):
    lines = [json.dumps({"text": text}) for text in ("", "a", "", "", "b", "")]
    (hf_folder / "train-0.jsonl").write_text("\n".join(lines))
    assert StreamReader(open_source(f"hf:{hf_folder}", "train")).read(3) == ["a", "b", "shard 1 document 0"]


def test_fingerprint_follows_the_files_and_the_split(hf_folder):
    first = open_source(f"hf:{hf_folder}", "train").fingerprint()
    assert open_source(f"hf:{hf_folder}", "train").fingerprint() == first
    assert open_source(f"hf:{hf_folder}", "validation").fingerprint() != first
    with open(hf_folder / "train-2.jsonl", "a") as file:
        file.write('{"text": "more"}\n')
    assert open_source(f"hf:{hf_folder}", "train").fingerprint() != first


def test_missing_data_and_splits_are_clear_errors(hf_folder, tmp_path):
    with pytest.raises(DataError, match=r"no folder /nowhere"):
        open_source("hf:/nowhere", "train")
    (hf_folder / "validation-0.jsonl").unlink()
    with pytest.raises(DataError, match=r"has no 'validation' split \(it has: train\); add files named validation\*"):
        open_source(f"hf:{hf_folder}", "validation")
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="no data files in the folder"):
        open_source(f"hf:{tmp_path / 'void'}", "train")


def test_unreachable_hub_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"the Hugging Face hub cannot be reached .* HF_HUB_OFFLINE"):
        open_source("hf:allenai/c4:en", "train")


def test_record_without_text_and_damaged_shard_are_clear_errors(hf_folder):
    with pytest.raises(DataError, match=r"no text in the field 'body' \(fields: text\)"):
        list(open_source(f"hf:{hf_folder}", "train", text_field="body").documents())
    (hf_folder / "train-1.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(DataError, match="cannot be read any further"):
        list(open_source(f"hf:{hf_folder}", "train").documents())
