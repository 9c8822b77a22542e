"""Old checkpoints are deleted beside training: they have lost their names at once, and the next save finds none."""

from __future__ import annotations

from ds_lowrank.checkpoint.folder import prepare, prune
from ds_lowrank.checkpoint.manifest import Progress, seal, write_manifest


def test_old_checkpoints_are_deleted_before_the_next_save(tmp_path):
    for step in range(3):
        folder = tmp_path / f"global_step{step}"
        folder.mkdir()
        (folder / "file").write_bytes(bytes(10**5))
        write_manifest(folder, {}, Progress(step), {"file": seal(folder / "file")})
    prune(tmp_path, 1, in_background=True)
    assert not (tmp_path / "global_step0").exists() and not (tmp_path / "global_step1").exists()
    prepare(tmp_path, "global_step3")
    assert {path.name for path in tmp_path.iterdir()} == {"global_step2", ".global_step3.partial"}
