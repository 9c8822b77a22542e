"""The role table that a grid logs at start."""

from __future__ import annotations

from tests.engines.grids import Grid, role_table_of, settings_of
from tests.engines.pool import run_ranks


def test_the_role_table_shows_all_stages_and_names_copies():
    grid = Grid(1, 2, 2, 1)
    texts = run_ranks(4, role_table_of, grid, settings_of(grid), tie_word_embeddings=True)
    assert texts[1:] == ["", "", ""]
    table = texts[0]
    assert "14 of 21 parameters are projected" in table  # the tied embedding is on both stages
    for line, text in (
        ("model.layers.*.self_attn.q_proj.weight", "2      projected "),
        ("model.norm.weight", "AdamW (1-D), replicated on 2 tensor-parallel ranks"),
        ("model.embed_tokens.weight", "AdamW (embedding), tied: a copy on this stage"),
    ):
        assert any(row.startswith(line) and text in row for row in table.splitlines()), table
    assert "State over 4 ranks" in table and "are copies on other tensor-parallel ranks" in table
