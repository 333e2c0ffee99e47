"""Texts and JSON that others wrote: any encoding mark is understood or refused in one sentence, and
absurd sizes are refused."""

import codecs
from pathlib import Path
from typing import Any

import pytest

from refusals import refuses
from spear.data.readers.lerobot import open_lerobot
from spear.labels.models.annotations import load_annotations
from spear.labels.rgbd import read_matrix
from spear.models.weights.load import read_model_type
from spear.tokens import CoordinateTokenizer
from spear.util.files import read_json, read_json_as
from spear.util.json_text import parse_json, read_json_lines

DEEP_LIST = b"[" * 100_000 + b"]" * 100_000  # deeper than Python's recursion limit
LONG_INTEGER = b"9" * 400  # too large for a float
ABSURD_VALUES = [DEEP_LIST, LONG_INTEGER, b"9" * 10_000]
ABSURD_IDS = ["nested", "400 digits", "10,000 digits"]
SENTENCE_OF_ABSURDITY = "recursion limit exceeded|an integer of [0-9]+ digits"
"""A pattern of the messages about `ABSURD_VALUES`."""


def read_written(tmp_path: Path, data: bytes) -> dict[str, Any]:
    """Write a file and read its JSON object."""
    path = tmp_path / "file.json"
    path.write_bytes(data)
    return read_json(path, advice="replace it")


def write_lines(tmp_path: Path, data: bytes) -> Path:
    """Write a file of JSON lines, and return its path."""
    path = tmp_path / "lines.jsonl"
    path.write_bytes(data)
    return path


class TestObjects:
    """A file with a single JSON object."""

    def test_a_byte_order_mark_is_skipped(self, tmp_path: Path) -> None:
        assert read_written(tmp_path, codecs.BOM_UTF8 + b'{"a": 1}') == {"a": 1}

    def test_line_ends_of_windows_are_read(self, tmp_path: Path) -> None:
        assert read_written(tmp_path, b'{\r\n"a": 1\r\n}\r\n') == {"a": 1}

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
    def test_utf_16_is_named(self, tmp_path: Path, encoding: str) -> None:
        data = '{"a": 1}'.encode(encoding)

        refuses(r"file\.json .*UTF-16\. Save it in UTF-8", read_written, tmp_path, data)

    def test_a_syntax_error_has_line_and_column(self, tmp_path: Path) -> None:
        refuses("line 2 column 7", read_written, tmp_path, b'{"a": 1,\n "b": }')

    def test_an_encoding_error_has_line_and_column(self, tmp_path: Path) -> None:
        refuses("line 1 column 8", read_written, tmp_path, b'{"a": "\xff"}')

    @pytest.mark.parametrize("value", ABSURD_VALUES, ids=ABSURD_IDS)
    def test_absurd_values_are_refused(self, tmp_path: Path, value: bytes) -> None:
        data = b'{"a": ' + value + b"}"

        refuses(SENTENCE_OF_ABSURDITY, read_written, tmp_path, data)

    def test_a_long_integer_has_line_and_column(self, tmp_path: Path) -> None:
        data = b'{"a": 1,\n "b": -' + LONG_INTEGER + b"}"

        refuses("400 digits at line 2 column 7", read_written, tmp_path, data)

    @pytest.mark.parametrize("template", [b'"\\"%s"', b"0.%s", b"-%s.5", b"1.%se-2"])
    def test_many_digits_of_texts_and_fractions_are_read(
        self, tmp_path: Path, template: bytes
    ) -> None:
        value = template % (b"1" * 100)
        data = b'{"a": ' + value + b"}"

        assert "a" in read_written(tmp_path, data)

    def test_a_seed_of_128_bits_is_read(self, tmp_path: Path) -> None:
        assert read_written(tmp_path, b'{"a": %d}' % (2**128 - 1)) == {"a": 2**128 - 1}

    def test_a_large_file_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "file.json"
        path.write_bytes(b'{"a": 1}' + b" " * 3 * 2**20)

        refuses("more than 2 MiB", read_json, path, advice="replace it", max_bytes=2 * 2**20)

    def test_a_file_without_end_is_refused(self) -> None:
        zeros = Path("/dev/zero")
        refuses("more than 1 MiB", read_json_as, list, zeros, advice="replace it", max_bytes=2**20)


class TestLines:
    """A file with a JSON object per line."""

    def test_marks_line_ends_and_empty_lines_are_skipped(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path, codecs.BOM_UTF8 + b'{"a": 1}\r\n\r\n{"a": 2}\r\n')

        assert read_json_lines(path) == [{"a": 1}, {"a": 2}]

    def test_a_line_separator_in_a_text_is_no_line_end(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path, '{"a": "one\u2028two"}\n'.encode())

        assert read_json_lines(path) == [{"a": "one\u2028two"}]

    def test_a_syntax_error_has_line_and_column(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path, b'{"a": 1}\n\n{"a": }\n')

        with pytest.raises(ValueError, match=r"lines\.jsonl, line 3: .*at column 7"):
            read_json_lines(path)

    @pytest.mark.parametrize("value", ABSURD_VALUES, ids=ABSURD_IDS)
    def test_absurd_values_are_refused(self, tmp_path: Path, value: bytes) -> None:
        path = write_lines(tmp_path, b'{"a": ' + value + b"}\n")

        with pytest.raises(ValueError, match=SENTENCE_OF_ABSURDITY):
            read_json_lines(path)

    def test_utf_16_is_named(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path, '{"a": 1}\n'.encode("utf-16"))

        with pytest.raises(ValueError, match=r"lines\.jsonl: .*UTF-16"):
            read_json_lines(path)


@pytest.mark.parametrize("value", ABSURD_VALUES, ids=ABSURD_IDS)
def test_absurd_texts_in_tables_are_refused(value: bytes) -> None:
    with pytest.raises(ValueError, match=SENTENCE_OF_ABSURDITY):
        parse_json(value.decode())


class TestReaders:
    """Readers of particular files, which must all have these limits."""

    @pytest.mark.parametrize("value", ABSURD_VALUES, ids=ABSURD_IDS)
    def test_absurd_3d_tokens_are_refused(self, tmp_path: Path, value: bytes) -> None:
        path = tmp_path / "coordinates.json"
        path.write_bytes(b'{"unit": "m", "edges": ' + value + b', "representatives": []}')

        refuses(SENTENCE_OF_ABSURDITY, CoordinateTokenizer.load, path)

    def test_nested_edges_of_3d_tokens_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "coordinates.json"
        path.write_text('{"unit": "m", "edges": [[[[0], [1]]]], "representatives": [[[[0]]]]}')

        refuses("is no 3D tokenizer", CoordinateTokenizer.load, path)

    @pytest.mark.parametrize("value", ABSURD_VALUES, ids=ABSURD_IDS)
    def test_absurd_info_of_lerobot_is_refused(self, tmp_path: Path, value: bytes) -> None:
        (tmp_path / "meta").mkdir()
        (tmp_path / "meta/info.json").write_bytes(b'{"fps": ' + value + b"}")

        refuses(f"info.json cannot be read .*({SENTENCE_OF_ABSURDITY})", open_lerobot, tmp_path)

    @pytest.mark.parametrize("height", ABSURD_VALUES, ids=ABSURD_IDS)
    def test_an_absurd_coco_file_is_refused(self, tmp_path: Path, height: bytes) -> None:
        path = tmp_path / "coco.json"
        image = b'{"id": 1, "file_name": "a.jpg", "width": 9, "height": ' + height + b"}"
        path.write_bytes(b'{"images": [' + image + b'], "categories": [], "annotations": []}')

        refuses("coco.json", load_annotations, path)

    @pytest.mark.parametrize("value", ABSURD_VALUES, ids=ABSURD_IDS)
    def test_an_absurd_config_of_a_model_is_refused(self, tmp_path: Path, value: bytes) -> None:
        (tmp_path / "config.json").write_bytes(b'{"a": ' + value + b"}")

        refuses(SENTENCE_OF_ABSURDITY, read_model_type, tmp_path)

    def test_a_matrix_with_a_byte_order_mark_is_read(self, tmp_path: Path) -> None:
        path = tmp_path / "intrinsics.txt"
        path.write_bytes(codecs.BOM_UTF8 + b"100 0 50\r\n0 100 40\r\n0 0 1\r\n")

        assert read_matrix(path).tolist() == [[100, 0, 50], [0, 100, 40], [0, 0, 1]]
