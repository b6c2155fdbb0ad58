"""Hostile inputs: which kind is held off by which tests. What somebody else made executes nothing, reads and writes
nothing outside of its folder, and stays within bounded memory.

The tests stand beside what they test; this table names them, so that a kind that nobody holds off is seen.

    file, relative to this folder
        what it tries: the test, or * where it is the subject of the whole file
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent

HELD_OFF = """
panoptic/training/test_checkpoint.py
    checkpoint that executes: test_nothing_in_a_file_is_executed
    checkpoint that is compressed, or whose entries overlap: test_a_compressed_archive_is_not_unpacked
    tensors larger than their bytes, entries of another kind: test_entries_of_another_kind_are_named
    sizes that make no model: test_what_makes_no_model_is_told_with_the_file_in_one_line
    layers without end: test_a_model_is_not_built_without_end
panoptic/convert/test_convert.py
    published weights that execute: test_a_file_cannot_execute_anything
    functions that act, by their names: test_builtins_that_act_are_refused
pipelines/tracking/test_model.py
    logged model that holds a pickle: *
pipelines/data/test_manifest.py
    manifest that names files outside, or is of wrong kinds: *
pipelines/data/test_shard_file.py
    shard that agrees with its manifest and is none: test_a_manifest_that_agrees_does_not_make_a_shard
    shard that was changed: test_no_byte_of_a_row_changes_unseen
    index that is compressed: test_an_index_is_not_inflated
    index whose footer lies: test_the_footer_of_an_index_is_left_alone
pipelines/data/readers/test_coco_json.py
    annotations nested without end, or of wrong kinds: *
pipelines/data/readers/test_coco_instances.py
    masks of any size, polygons far outside: test_masks_that_cannot_be_read_are_a_problem_of_their_image
pipelines/cluster/test_json_file.py
    records of ours that were edited: *
panoptic/test_png.py
    image that states more pixels than are read: *
pipelines/evaluation/test_inputs.py
    image whose name leads outside: *
pipelines/data/readers/test_tree.py
    archive that states what it does not hold: test_what_a_crafted_member_says_of_itself_is_not_believed
    archive whose names lead outside: test_members_that_lead_outside_are_left_out
    archive that is dense: test_a_dense_member_is_unpacked_in_small_pieces
pipelines/tuning/test_search_space.py
    expression of a sweep that executes: *
pipelines/test_config.py
    name of a run that leads outside: *
"""


def entries() -> list[tuple[str, str, str]]:
    """File, what is tried, and the test, of each line."""
    found, file = [], ""
    for line in HELD_OFF.strip().splitlines():
        if not line.startswith(" "):
            file = line
            continue
        what, _, test = line.strip().rpartition(": ")
        found.append((file, what, test))
    return found


@pytest.mark.parametrize(("file", "what", "test"), entries())
def test_the_table_names_tests_that_are_there(file: str, what: str, test: str) -> None:
    tree = ast.parse((TESTS / file).read_text())
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
    assert what and (names if test == "*" else test in names)


def test_the_table_has_every_kind() -> None:
    kinds = ("checkpoint", "manifest", "shard", "annotations", "image", "archive", "model")
    tried = " ".join(what for _, what, _ in entries())
    assert [kind for kind in kinds if not re.search(rf"\b{kind}\b", tried)] == []
