"""``python -m ds_lowrank checkpoint`` and ``export``: what they print, and one line for what they refuse."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from ds_lowrank.__main__ import main
from ds_lowrank.checkpoint.disk import sha256
from ds_lowrank.checkpoint.manifest import FILE, Sealed, read_manifest, write_manifest
from ds_lowrank.checkpoint.tensor_file import write_pieces
from ds_lowrank.sharding.layout import Rectangle
from ds_lowrank.sharding.pieces import Piece
from tests.engines import converting
from tests.engines.converting import galore_settings, stock_settings
from tests.engines.pool import run_ranks


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a checkpoint of GaLore's and one of AdamW's, from two ranks."""
    folder = tmp_path_factory.mktemp("made")
    run_ranks(2, converting.low_rank_run, galore_settings(2), str(folder / "ours"), "global_step3")
    run_ranks(2, converting.stock_run, stock_settings(2), str(folder / "stock"))
    return folder


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def command(monkeypatch, capfd):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["ds_lowrank", *map(str, arguments)])
        code = main()
        return code, *capfd.readouterr()

    return call


def sealed_again(checkpoint: Path) -> None:
    """Make a manifest for what is there now."""
    old = read_manifest(checkpoint)
    names = [path.name for path in checkpoint.iterdir() if path.name != FILE]
    files = {n: Sealed(bytes=(checkpoint / n).stat().st_size, sha256=sha256(checkpoint / n)) for n in names}
    write_manifest(checkpoint, old.run, old.progress, files)


def test_list_says_which_checkpoints_are_whole(folder, command):
    shutil.copytree(folder / "ours" / "global_step3", folder / "ours" / "global_step20")
    (folder / "ours" / "global_step20" / "rank_00001.safetensors").write_bytes(b"short")
    (folder / "ours" / "global_step7").mkdir()
    code, out, _ = command("checkpoint", "list", folder / "ours")
    header, first, second, third = out.splitlines()
    assert code == 1 and header.split() == ["checkpoint", "step", "tokens", "saved", "size", "grid", "method", "state"]
    assert first.startswith("global_step3 ") and first.endswith("2 ranks  GaLore  whole")
    assert second.startswith("global_step7 ") and "not a complete checkpoint" in second
    assert third.startswith("global_step20 ") and "rank_00001.safetensors has 5 bytes" in third


def test_list_reads_all_files_if_asked(folder, command):
    file = folder / "ours" / "global_step3" / "rank_00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert command("checkpoint", "list", folder / "ours")[0] == 0
    code, out, _ = command("checkpoint", "list", "--verify", folder / "ours")
    assert code == 1 and "rank_00001.safetensors is not as it was saved" in out
    code, _, error = command("checkpoint", "verify", folder / "ours")
    assert code == 1 and len(error.splitlines()) == 1 and "rank_00001.safetensors is not as it was saved" in error


def test_show_says_what_a_checkpoint_has(folder, command):
    code, out, _ = command("checkpoint", "show", folder / "ours")
    assert code == 0
    assert "step 3" in out and "method: GaLore" in out and "update_proj_gap 4" in out
    # 21 weights of 43 340 elements in fp32; of the 14 matrices that GaLore projects, rank 4 on the shorter side.
    assert "weights 173 kB" in out or "weights 174 kB" in out
    assert "4 projected of 20 x 40, rank 4: model.layers.0.self_attn.k_proj.weight, ..." in out


def test_verify_says_that_all_is_there(folder, command):
    code, out, _ = command("checkpoint", "verify", folder / "ours")
    assert code == 0 and "every element once" in out


def test_verify_finds_elements_that_are_there_twice(folder, command):
    """The number of elements is right, and so are all checksums."""
    checkpoint = folder / "ours" / "global_step3"
    data = torch.zeros(4, dtype=torch.float32)
    rectangles = (Rectangle(0, 0, 1, 2, 0), Rectangle(0, 1, 1, 2, 2))
    write_pieces(checkpoint / "rank_00002.safetensors", [Piece("twice", (4,), rectangles, data)], {})
    sealed_again(checkpoint)
    code, _, error = command("checkpoint", "verify", checkpoint)
    assert code == 1 and "it has some twice, and not all, of the elements of twice" in error


def test_files_that_run_code_are_refused(folder, command):
    checkpoint = folder / "ours" / "global_step3"
    torch.save({"optimizer": print}, checkpoint / "common.pt")
    sealed_again(checkpoint)
    code, _, error = command("checkpoint", "show", checkpoint)
    assert code == 1 and "common.pt" in error and "nothing in it was run" in error


def refused(answer, *words):
    code, out, error = answer
    assert code == 1 and not out and len(error.splitlines()) == 1, error
    for word in words:
        assert word in error


def test_what_does_not_fit_is_refused_in_one_line(folder, command, tmp_path):
    ours, stock, out = folder / "ours", folder / "stock", tmp_path / "out"
    refused(command("checkpoint", "show", tmp_path / "nothing"), "no such folder")
    refused(command("checkpoint", "list", tmp_path), "has no checkpoints")
    refused(command("checkpoint", "show", stock), "DeepSpeed itself", "convert")
    refused(command("checkpoint", "convert", ours, "--to", "ours", out), "one side must be ours")
    refused(command("checkpoint", "convert", stock, "--to", "universal", out), "one side must be ours")
    refused(command("checkpoint", "convert", ours, "--from", "universal", "--to", "ours", out), "no universal")
    refused(command("checkpoint", "convert", ours, "--to", "universal", "--dtype", "float16", out), "--dtype")
    refused(command("checkpoint", "convert", ours, "--to", "universal", "--weights-only", out), "--weights-only")
    refused(command("export", ours, out), "--config")
    refused(command("export", ours, out, "--config", tmp_path / "no.json"), "no.json", "cannot be read")
    assert not out.exists()
    out.mkdir()
    (out / "mine").write_text("")
    refused(command("checkpoint", "convert", ours, "--to", "universal", out), "already exists")
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_the_configuration_of_another_model_is_refused(folder, command, tmp_path):
    from tests.engines.grids import llama_config

    out, config = tmp_path / "out", tmp_path / "config"
    for changes, word in (
        ({"num_hidden_layers": 3}, "has no model.layers.2"),
        ({"num_hidden_layers": 1}, "which this model has not"),
        ({"intermediate_size": 128}, "by the configuration"),
    ):
        llama_config(**changes).save_pretrained(config)
        refused(command("export", folder / "ours", out, "--config", config), word)
    llama_config(num_hidden_layers=3).save_pretrained(config)
    refused(
        command("checkpoint", "convert", folder / "stock", "--to", "ours", out, "--config", config), "another model"
    )
    llama_config(intermediate_size=128).save_pretrained(config)
    refused(
        command("checkpoint", "convert", folder / "stock", "--to", "ours", out, "--config", config),
        "by the configuration",
    )
    assert not out.exists()


def test_the_configuration_of_a_run_with_lora_is_refused(folder, command, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "lora_rank": 4}))
    answer = command("export", folder / "ours", tmp_path / "out", "--config", tmp_path / "config.json")
    refused(answer, "LoRA", "--export")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda tag: (tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink(), "1 of 2 ranks"),
        (lambda tag: (tag / "mp_rank_01_model_states.pt").write_bytes(b""), "tensor parallelism"),
        (lambda tag: (tag / "layer_00-model_states.pt").write_bytes(b""), "pipeline"),
        (lambda tag: (tag / "layer_0_expert_0_mp_rank_00_model_states.pt").write_bytes(b""), "MoE"),
        (lambda tag: (tag / "mp_rank_00_model_states.pt").write_bytes(b"damaged"), "mp_rank_00_model_states.pt"),
        (lambda tag: torch.save({"module": print}, tag / "mp_rank_00_model_states.pt"), "nothing in it was run"),
        (lambda tag: torch.save({"module": {}}, tag / "mp_rank_00_model_states.pt"), "what DeepSpeed 0.19.8 saves"),
    ],
    ids=["missing rank", "tensor", "pipeline", "experts", "damaged", "code", "foreign"],
)
def test_stock_checkpoints_that_cannot_be_read_are_refused(change, word, folder, command, tmp_path):
    change(folder / "stock" / "global_step3")
    refused(command("checkpoint", "convert", folder / "stock", "--to", "ours", tmp_path / "out"), word)
    assert not (tmp_path / "out").exists()


def test_parameters_that_zero_0_only_numbers_are_refused(command, tmp_path):
    run_ranks(1, converting.stock_run, stock_settings(0), str(tmp_path / "stock"), groups=2)
    out = tmp_path / "out"
    refused(command("checkpoint", "convert", tmp_path / "stock", "--to", "ours", out), "--weights-only")
    assert command("checkpoint", "convert", tmp_path / "stock", "--to", "ours", out, "--weights-only")[0] == 0


def test_a_tokenizer_is_put_into_the_export(folder, command, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from tests.engines.grids import llama_config

    llama_config().save_pretrained(tmp_path / "config")
    words = Tokenizer(WordLevel({"ab": 7, "?": 0}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "words")
    more = ("--config", tmp_path / "config", "--tokenizer", tmp_path / "words")
    code, out, _ = command("export", folder / "ours", tmp_path / "out", *more)
    assert code == 0 and "wrote" in out
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab")["input_ids"] == [7]
    refused(command("export", folder / "ours", tmp_path / "no", *more[:3], tmp_path / "nowhere"), "--tokenizer")
