"""What of a compiled program XLA puts into command buffers, from its list of thunks."""

import pytest

from benchmarks import thunks

LISTED = """\
000: kCommandBuffer [source        | next=003 (1)]
    001: kCustomKernel [source       | sink        ] wrapped_iota grid: [1, 1, 1]
    002: kCopy         [source       | sink        ] kCopy
003: kWhile         [prev=000 (1)  | next=006 (1)]
condition:
    004: kCustomKernel [source | sink] loop_compare_fusion grid: [1, 1, 1]
  body:
    000: kCommandBuffer [source       | next=006 (1)]
        005: kCopy         [source       | sink        ] kCopy
    008: kCustomCall    [prev=000 (1)  | sink        ] kCustomCall
000: kCommandBuffer [prev=003 (1)  | next=007 (1)]
    006: kCustomKernel [source       | sink        ] loop_add_fusion grid: [1, 1, 1]
007: kCustomCall    [prev=000 (1)  | sink        ] kCustomCall
"""


def test_thunks_are_counted_where_they_are_launched_from():
    assert thunks.counted(LISTED) == {
        "command_buffers": 3,
        "in_command_buffers": {"Copy": 2, "CustomKernel": 2},
        "by_the_host": {"CustomCall": 2, "CustomKernel": 1, "While": 1},
    }


def test_a_dump_has_one_list(tmp_path):
    with pytest.raises(FileNotFoundError, match="must hold one file .* not 0"):
        thunks.of_dump(tmp_path)
    (tmp_path / "module_0001.jit_step.thunk_sequence_after_thunk_passes.txt").write_text(LISTED)
    assert thunks.of_dump(tmp_path) == thunks.counted(LISTED)
