"""The header of a weight file is checked before it is believed: any bytes give tensors or problems."""

import json
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from gpu_worker.model.safetensors_file import MAX_HEADER_BYTES, HeaderError, SafetensorsFile

FUZZ = settings(deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
TENSORS = {"a": torch.arange(6, dtype=torch.float32).view(2, 3), "b": torch.ones(4, dtype=torch.uint8)}
VALID = save(TENSORS)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
sizes = st.integers(-1, 40) | st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**400])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BF16", "U16", "I4", "", "F64"]) | json_values,
        "shape": st.lists(sizes, max_size=10) | json_values,
        "data_offsets": st.lists(sizes, min_size=2, max_size=2) | json_values,
    }
)
headers = st.dictionaries(st.text(max_size=8), entries | json_values, max_size=5)


def write(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = path / "fuzzed.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def read_all(file):
    """Every tensor, read; or the problems."""
    try:
        return {name: tensor.read() for name, tensor in SafetensorsFile(file).tensors.items()}
    except HeaderError as error:
        return error.problems


@FUZZ
@given(headers, st.binary(max_size=64))
def test_any_header_gives_tensors_inside_the_file_or_problems(tmp_path, header, data):
    found = read_all(write(tmp_path, header, data))
    if isinstance(found, dict):
        assert sum(tensor.nbytes for tensor in found.values()) <= len(data)
    else:
        assert found
        assert max(map(len, found)) < 2000


@FUZZ
@given(st.binary(max_size=200))
def test_any_bytes_do(tmp_path, content):
    file = tmp_path / "fuzzed.safetensors"
    file.write_bytes(content)
    read_all(file)


@FUZZ
@given(st.integers(0, len(VALID) - 1), st.integers(0, 255))
def test_a_changed_byte_never_reaches_beyond_the_file(tmp_path, position, value):
    file = tmp_path / "fuzzed.safetensors"
    file.write_bytes(VALID[:position] + bytes([value]) + VALID[position + 1 :])
    found = read_all(file)
    if isinstance(found, dict):
        assert sum(tensor.nbytes for tensor in found.values()) <= len(VALID)


@FUZZ
@given(st.integers(0, len(VALID) - 1))
def test_a_truncated_file_is_named_so(tmp_path, length):
    file = tmp_path / "fuzzed.safetensors"
    file.write_bytes(VALID[:length])
    assert isinstance(read_all(file), list)


def test_a_whole_file_gives_its_tensors(tmp_path):
    file = tmp_path / "whole.safetensors"
    file.write_bytes(VALID)
    found = read_all(file)
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("length", [2**62, MAX_HEADER_BYTES + 1, MAX_HEADER_BYTES])
def test_a_header_that_claims_to_be_huge_allocates_nothing(tmp_path, length):
    file = tmp_path / "huge.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + b"{}")
    tracemalloc.start()
    with pytest.raises(HeaderError, match="header of"):
        SafetensorsFile(file)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_a_pointer_of_git_lfs_is_named_so(tmp_path):
    file = tmp_path / "pointer.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(HeaderError, match="a Git LFS pointer, not the file itself: run `git lfs pull`"):
        SafetensorsFile(file)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            {n: {"dtype": "U8", "shape": [4], "data_offsets": [i, i + 4]} for i, n in ((4, "a"), (8, "b"))},
            "fuzzed.safetensors: the file is truncated: it has 8 bytes of tensors, its header tells of 12; "
            "1 of 2 tensors are not whole, 'b' among them",
        ),
        (
            {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}},
            "needs 16 bytes",
        ),
        (
            {n: {"dtype": "U8", "shape": [4], "data_offsets": [i, i + 4]} for i, n in enumerate("ab")},
            "overlap",
        ),
        (b'{"a": 1, "a": 2}', "a key occurs twice"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "not a JSON object"),
        ({"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, "no list of up to eight sizes"),
        ({"a": {"dtype": "I4", "shape": [1], "data_offsets": [0, 1]}}, "which no tensor of these models has"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, header, message):
    assert any(message in problem for problem in read_all(write(tmp_path, header, bytes(8))))
