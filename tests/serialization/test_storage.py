"""Folders of tensors and a record are written completely or not at all."""

# ruff: noqa: S311, S603 - draws need not be secret, and the processes are our own

import errno
import hashlib
import io
import json
import math
import os
import pickle
import random
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import pyro_vae as pv
from pyro_vae.serialization import _folder as files
from pyro_vae.serialization import _folder as writing
from pyro_vae.serialization._encoding import DTYPES
from pyro_vae.serialization._folder import UnreadableFile, checksum, read

KIND = "test"
CONTENT = {"step": 3, "weights": torch.arange(6.0).reshape(2, 3), "note": "grey\n\u00e9", "x": 0.1}


def write(folder, content=CONTENT, **options):
    writing.write(folder, content, kind=KIND, **options)


def round_trip(folder, content):
    write(folder, content)
    return read(folder, kind=KIND)


def same(a, b):
    """Return whether two structures are equal in value, type and bits."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        a, b = (torch.from_numpy(each.copy()) for each in (a, b))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        a, b = (each.detach().resolve_conj().contiguous().flatten() for each in (a, b))
        return not a.numel() or torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(type(k) is type(j) and same(a[k], b[j])
                                          for k, j in zip(a, b, strict=True))  # fmt: skip
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return struct.pack(">d", a) == struct.pack(">d", b) if isinstance(a, float) else a == b


def random_structure(draw, depth=0):
    """Return a random structure of all supported types."""
    words = ["", "a", "$tensor", "$x", "__metadata__", "a/b", "ü\ud800", 'quote"', "content", "0"]
    numbers = [math.nan, -math.nan, math.inf, -math.inf, -0.0, 5e-324, 0.1, 1e308, draw.random()]
    leaves = [
        lambda: None,
        lambda: draw.random() < 0.5,
        lambda: draw.choice([0, -1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 10**5000]),
        lambda: draw.choice(numbers),
        lambda: draw.choice(words),
        lambda: torch.randn([draw.randrange(3) for _ in range(draw.randrange(4))]),
        lambda: np.arange(draw.randrange(5)).astype(draw.choice(["f2", "i8", "u2", "?", "f8"])),
    ]
    if depth > 4 or draw.random() < 0.5:
        return draw.choice(leaves)()
    count = draw.randrange(4)
    parts = [random_structure(draw, depth + 1) for _ in range(count)]
    keys = draw.sample([*words, 0, 1, -5, 10**30], count)
    return draw.choice([parts, tuple(parts), dict(zip(keys, parts, strict=True))])


@pytest.mark.parametrize("seed", range(30))
def test_random_structures_round_trip(tmp_path, seed):
    draw = random.Random(seed)
    content = {key: random_structure(draw) for key in ("a", "$b", 0, -(10**20), "a/b")}
    assert same(round_trip(tmp_path / "run", content), content)


def test_tensors_of_all_dtypes_round_trip(tmp_path):
    content = {str(dtype): torch.randint(0, 2, (3, 2)).to(dtype) for dtype in DTYPES}
    whole = torch.randn(4, 6)
    content["views"] = [whole, whole, whole[:2], whole.T, whole[::2, 1:3], whole[0, 0]]
    content["parameter"] = torch.nn.Parameter(whole)
    content["conjugate"] = torch.randn(3, dtype=torch.complex64).conj()
    content["empty"] = torch.empty(0, 5)
    found = round_trip(tmp_path / "run", content)
    assert same(found, content | {"parameter": whole})
    assert all(each.is_contiguous() for each in found["views"])
    found["views"][0].zero_()  # views do not share memory
    assert same(found["views"][1], whole)


def test_numpy_arrays_round_trip_as_arrays(tmp_path):
    whole = np.random.default_rng(0).normal(size=(4, 6))
    fixed = whole.copy()
    fixed.flags.writeable = False
    content = {"views": (whole[::-1], whole.T, whole[1:, ::2], fixed), "point": np.array(2.5),
               "swapped": np.arange(3, dtype=">i4"), "empty": np.empty((0, 2))}  # fmt: skip
    found = round_trip(tmp_path / "run", content)
    assert same(found, content | {"swapped": np.arange(3, dtype="i4")})
    assert type(found["point"]) is np.ndarray


def test_subclasses_of_plain_types_are_read_as_plain_types(tmp_path):
    content = {"shape": torch.Size([2, 3]), "number": np.float64(0.1)}
    assert same(round_trip(tmp_path / "run", content), {"shape": (2, 3), "number": 0.1})


def test_optimizer_state_round_trips(tmp_path):
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    found = round_trip(tmp_path / "run", {"optimizer": optimizer.state_dict()})
    assert same(found["optimizer"], optimizer.state_dict())


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (lambda: 0, r"^optimizer\[0\]\['f'\] is a function"),
        (object(), "is an object"),
        ({1, 2}, "is a set"),
        (b"x", "is a bytes"),
        (1j, "is a complex"),
        (np.complex64(3), "is a numpy.complex64"),
        (np.array(["a"]), "an array of <U1"),
        (np.array([None]), "an array of object"),
        (np.ma.array([1.0]), "MaskedArray"),
        (torch.zeros(2, dtype=torch.complex128), "a tensor of torch.complex128"),
        (torch.zeros(2).to_sparse(), "torch.sparse_coo tensor"),
        (torch.zeros(2, device="meta"), "meta"),
        ({True: 1}, "the key True"),
        ({(0, 1): 1}, r"the key \(0, 1\)"),
    ],
)
def test_unsupported_types_raise_with_their_path(tmp_path, thing, message):
    with pytest.raises(TypeError, match=message):
        write(tmp_path / "run", {"optimizer": [{"f": thing}]})
    assert not list(tmp_path.iterdir())


def test_recursive_and_too_deep_structures_are_refused(tmp_path):
    endless = []
    endless.append(endless)
    with pytest.raises(ValueError, match="more than 100 deep, or contains itself"):
        write(tmp_path / "run", {"a": endless})
    deep = 0
    for level in range(98):
        deep = (lambda x, level: [[x], (x,), {0: x}][level % 3])(deep, level)
    assert same(round_trip(tmp_path / "run", {"a": deep}), {"a": deep})


def test_record_is_plain_json_and_safetensors(tmp_path):
    write(tmp_path / "run", {"lengths": {0: 2}, "net": {"weight": torch.ones(2)}})
    record = json.loads((tmp_path / "run/record.json").read_text())
    assert record["kind"] == KIND
    assert record["content"]["net"] == {"weight": {"$tensor": "net/weight"}}
    tensors = safetensors.torch.load_file(tmp_path / "run/tensors.safetensors")
    assert torch.equal(tensors["net/weight"], torch.ones(2))


# Existing folders


def test_existing_folder_needs_overwrite(tmp_path):
    run = tmp_path / "new/run"
    write(run)
    with pytest.raises(FileExistsError, match="exists: pass overwrite"):
        write(run, {"other": 1})
    assert same(read(run, kind=KIND), CONTENT)
    write(run, {"other": 1}, overwrite=True)
    assert read(run, kind=KIND) == {"other": 1}
    assert [path.name for path in run.parent.iterdir()] == ["run"]


def test_overwrite_replaces_only_folders_of_the_same_kind(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    write(mine)  # an empty folder may be replaced
    (mine / "thesis.tex").write_text("x")
    other, file, link = tmp_path / "other", tmp_path / "file", tmp_path / "link"
    writing.write(other, CONTENT, kind="another")
    file.write_text("x")
    write(tmp_path / "target")
    link.symlink_to(tmp_path / "target")
    for place in (mine, other, file, link):
        with pytest.raises(FileExistsError, match="is not replaced"):
            write(place, {"new": 1}, overwrite=True)
    assert (mine / "thesis.tex").exists()
    assert same(read(tmp_path / "target", kind=KIND), CONTENT)
    with pytest.raises(OSError, match=f"could not write {file}/run"):
        write(file / "run")


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("call", range(6))
@pytest.mark.parametrize("name", ["fsync", "rename"])
def test_full_disk_leaves_the_old_folder(tmp_path, monkeypatch, name, call, overwrite):
    """Fail at each of the first calls in turn."""
    run = tmp_path / "run"
    if overwrite:
        write(run)
    original, calls = getattr(os, name), iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(
            os, name, lambda *a, **k: full_disk() if next(calls) == call else original(*a, **k)
        )
        try:
            write(run, {"new": 1}, overwrite=overwrite)
            failed = False
        except OSError as error:
            failed = error.errno == errno.ENOSPC
            failed &= f"could not write {run}: No space left" in str(error)
    assert failed == (next(calls) > call)
    names = [path.name for path in tmp_path.iterdir()]
    if failed and not overwrite:
        assert names == []
    else:
        assert names == ["run"]
        assert same(read(run, kind=KIND), CONTENT if failed else {"new": 1})


def test_write_that_fails_midway_leaves_no_files(tmp_path, monkeypatch):
    class Full(io.FileIO):
        def write(self, data):
            super().write(data[:10])
            full_disk()

    monkeypatch.setattr("builtins.open", lambda path, mode: Full(path, mode))
    with pytest.raises(OSError, match="No space left") as error:
        write(tmp_path / "run")
    assert error.value.filename == str(tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_permission_error_names_the_folder(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "mkdir", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)  # pathlib of Python 3.10 keeps os.mkdir
    with pytest.raises(PermissionError, match=r"could not write .*run: Permission denied"):
        write(tmp_path / "run")


# Dead writers


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_temporary_folders_of_dead_writers_are_removed(tmp_path):
    def leave(name, host, pid, purpose):
        path = tmp_path / f".{name}.{host}.{pid}.0a1b2c3d.{purpose}"
        path.mkdir()
        (path / "part").write_text("x")
        return path

    host, dead = files._host(), dead_process()
    stale = [leave("run", host, dead, purpose) for purpose in ("writing", "replaced")]
    kept = [leave("run", host, os.getpid(), "writing"), leave("run", "elsewhere", dead, "writing"),
            leave("run2", host, dead, "writing"), leave("r.n", host, dead, "writing"),
            leave("run", host, dead, "writings")]  # fmt: skip
    write(tmp_path / "other")
    assert all(path.exists() for path in stale)
    stale[1].rename(tmp_path / "away")
    write(tmp_path / "run")
    (tmp_path / "away").rename(stale[1])
    write(tmp_path / "run", overwrite=True)
    assert not any(path.exists() for path in stale)
    assert all(path.exists() for path in kept)


def test_folder_moved_aside_by_a_dead_writer_is_restored(tmp_path):
    run = tmp_path / "run"
    write(run)
    run.rename(tmp_path / f".run.{files._host()}.{dead_process()}.0a1b2c3d.replaced")
    assert same(read(run, kind=KIND), CONTENT)
    with pytest.raises(FileExistsError, match="exists"):
        write(run, {"new": 1})
    assert same(read(run, kind=KIND), CONTENT)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# One process forks and kills the writers, because each new process would import torch.
WRITERS = """
import os, random, signal, sys, time, torch
from pyro_vae.serialization._folder import read
from pyro_vae.serialization._folder import write

run, draw, last = sys.argv[1], random.Random(0), 0
torch.set_num_threads(1)

def written(number):
    return {"number": number, "z": torch.full((50_000,), float(number))}

began = time.perf_counter()
write(run, written(0), kind="test")
took = time.perf_counter() - began
for _ in range(30):
    writer = os.fork()
    if not writer:
        for number in range(last + 1, 10**6):
            write(run, written(number), kind="test", overwrite=True)
    late = draw.random() < 0.5  # else perhaps at its first
    while late and read(run, kind="test")["number"] == last:
        pass
    time.sleep(3 * took * draw.random())
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    found = read(run, kind="test")
    assert found["number"] >= last
    last = found["number"]
    assert torch.equal(found["z"], written(last)["z"])
print(last, len(os.listdir(os.path.dirname(run))))
"""
WRITER = """
import sys, torch
from pyro_vae.serialization._folder import write
for number in range(10**6):
    content = {"number": number, "z": torch.full((50_000,), float(number))}
    write(sys.argv[1], content, kind="test", overwrite=True)
"""


def test_killed_writers_leave_the_old_or_the_new_folder(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-c", WRITERS, run]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not result.returncode, result.stderr
    last, places = map(int, result.stdout.split())
    assert last > 5
    assert places <= 4  # temporary folders of the last writer remain
    write(run, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_readers_see_the_old_or_the_new_folder_during_replacement(tmp_path):
    run = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", WRITER, run], stdout=subprocess.PIPE) as process:
        while not run.exists():
            time.sleep(0.01)
        numbers = set()
        ends = time.monotonic() + 60
        while len(numbers) < 20 and time.monotonic() < ends:
            found = read(run, kind=KIND)
            numbers.add(found["number"])
            assert found["z"][0] == found["number"]
        process.kill()
    assert len(numbers) == 20


# Damaged and foreign files


class Canary:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def torch_file(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def seal(folder, record=None, tensors=None):
    """Update the checksums of tampered files."""
    path, data = folder / "record.json", folder / "tensors.safetensors"
    record = json.loads(path.read_text()) if record is None else record
    if tensors is not None:
        data.write_bytes(tensors)
    tensors = data.read_bytes()
    record["tensors"] = {
        "bytes": len(tensors),
        "sha256": hashlib.sha256(tensors).hexdigest(),
    }
    record["sha256"] = checksum(record)
    path.write_text(json.dumps(record))


def refused(folder, message, kind=KIND):
    with pytest.raises(UnreadableFile, match=message) as error:
        read(folder, kind=kind)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("name", ["record.json", "tensors.safetensors"])
@pytest.mark.parametrize("foreign", ["pickle", "torch.save", "random", "empty", "zeros"])
def test_foreign_files_are_refused_and_not_run(tmp_path, foreign, name, sealed):
    run, canary = tmp_path / "run", tmp_path / "canary"
    write(run)
    data = {
        "pickle": pickle.dumps(Canary(canary)),
        "torch.save": torch_file(Canary(canary)),
        "random": random.Random(0).randbytes(10_000),
        "empty": b"",
        "zeros": bytes(1000),
    }[foreign]
    (run / name).write_bytes(data)
    if sealed and name == "tensors.safetensors":
        seal(run)
    refused(run, f"{name} (is no|is damaged|has)")
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary))).close()  # noqa: S301 - the canary works
    assert canary.exists()


@pytest.mark.parametrize("name", ["record.json", "tensors.safetensors"])
def test_truncated_files_are_refused(tmp_path, name):
    run = tmp_path / "run"
    write(run)
    whole = (run / name).read_bytes()
    for length in range(0, len(whole), 7):
        (run / name).write_bytes(whole[:length])
        refused(run, name)
    (run / name).write_bytes(whole + b" ")
    if name == "tensors.safetensors":
        refused(run, name)


@pytest.mark.parametrize("name", ["record.json", "tensors.safetensors"])
def test_flipped_bits_are_refused(tmp_path, name):
    run = tmp_path / "run"
    write(run)
    whole = (run / name).read_bytes()
    for bit in random.Random(0).sample(range(8 * len(whole)), 200):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        (run / name).write_bytes(data)
        refused(run, "run")


@pytest.mark.parametrize("name", ["record.json", "tensors.safetensors"])
@pytest.mark.parametrize("kind", ["missing", "link", "fifo", "folder", "device", "socket"])
def test_only_regular_files_are_opened(tmp_path, monkeypatch, kind, name):
    run = tmp_path / "run"
    write(run)
    (run / name).rename(tmp_path / "moved")
    monkeypatch.chdir(run)
    if kind == "link":
        (run / name).symlink_to(tmp_path / "moved")
    elif kind == "fifo":
        os.mkfifo(run / name)
    elif kind == "folder":
        (run / name).mkdir()
    elif kind == "device":
        (run / name).symlink_to("/dev/zero")
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(name)
    refused(run, f"{name} is (missing|not a regular file|a link)")


def test_missing_and_invalid_folders_are_refused(tmp_path):
    refused(tmp_path / "nowhere", "does not exist")
    (tmp_path / "file").write_bytes(pickle.dumps(1))
    refused(tmp_path / "file", "is not a folder")
    refused(tmp_path, "record.json is missing")


def test_other_kinds_and_newer_versions_are_refused(tmp_path):
    run = tmp_path / "run"
    write(run)
    refused(run, "is of the kind 'test', not 'pair'", kind="pair")
    record = json.loads((run / "record.json").read_text())
    seal(run, record | {"format_version": 2})
    refused(run, "Install a newer pyro_vae")
    seal(run, record | {"format_version": 0})
    refused(run, "not a record")
    seal(run, record | {"format": "other"})
    refused(run, "not a record")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"a":' * 200_000,
        '{"format": "pyro_vae", "format_version": 1, "content": NaN}',
        '{"format": "pyro_vae", "format": "pyro_vae"}',
        "1" * 5000,
        '{"format_version": ' + "1" * 5000 + "}",
        "[]",
        "null",
        '"\\ud800"',
        "{}",
    ],
)
def test_hostile_json_is_refused(tmp_path, text):
    write(tmp_path / "run")
    (tmp_path / "run/record.json").write_text(text)
    refused(tmp_path / "run", "record.json")


def test_oversized_record_is_not_read(tmp_path):
    write(tmp_path / "run")
    os.truncate(tmp_path / "run/record.json", 2**40)
    refused(tmp_path / "run", "bytes, not at most 33554432")


def test_tensor_file_larger_than_recorded_is_not_read(tmp_path):
    write(tmp_path / "run")
    os.truncate(tmp_path / "run/tensors.safetensors", 2**40)
    refused(tmp_path / "run", "has 1099511627776 bytes, not")


def safetensors_file(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def entry(shape, offsets, dtype="F32"):
    return {"z": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    "data",
    [
        safetensors_file(entry([2**38], [0, 2**40])),
        safetensors_file(entry([2**38], [0, 4]), bytes(4)),
        safetensors_file(entry([2**63, 2**63, 2**63], [0, 4]), bytes(4)),
        safetensors_file(entry([0, 2**63, 5], [0, 0])),
        safetensors_file(entry([-1], [0, 4]), bytes(4)),
        safetensors_file(entry([1], [4, 0]), bytes(4)),
        safetensors_file(entry([1], [4, 8]), bytes(8)),
        safetensors_file(entry([2], [0, 1], "F4"), bytes(1)),
        safetensors_file(b'{"z":' * 100_000),
        safetensors_file({**entry([1], [0, 4]), "y": entry([1], [0, 4])["z"]}, bytes(4)),
        struct.pack("<Q", 2**40) + bytes(100),
        struct.pack("<Q", 2**64 - 1),
    ],
)
def test_hostile_headers_are_refused(tmp_path, data):
    write(tmp_path / "run", {"z": torch.zeros(1)})
    seal(tmp_path / "run", tensors=data)
    refused(tmp_path / "run", "tensors.safetensors is not a safetensors file")


@pytest.mark.parametrize(
    "content",
    [
        {"z": {"$tensor": "y"}},
        {"z": {"$tensor": "z"}, "again": {"$tensor": "z"}},
        {},
        {"z": {"$tensor": ["z"]}},
        {"z": {"$tensor": "z", "more": 1}},
        {"z": {"$tensor": "z"}, "f": {"$call": "os.system"}},
        {"z": {"$tensor": "z"}, "f": {"$tuple": {"a": 1}}},
        {"z": {"$tensor": "z"}, "f": {"$dict": [[1]]}},
        {"z": {"$tensor": "z"}, "f": {"$dict": [[[1], 2]]}},
        {"z": {"$tensor": "z"}, "f": {"$dict": [[1, 2], [1, 3]]}},
        {"z": {"$tensor": "z"}, "f": {"$int": "z"}},
        {"z": {"$tensor": "z"}, "f": {"$float": "nan"}},
        {"z": {"$array": "z"}},
        [{"$tensor": "z"}],
        {"$tensor": "z"},
    ],
)
def test_records_that_do_not_fit_their_tensors_are_refused(tmp_path, content):
    write(tmp_path / "run", {"z": torch.zeros(1, dtype=torch.bfloat16)})
    record = json.loads((tmp_path / "run/record.json").read_text())
    seal(tmp_path / "run", record | {"content": content})
    refused(tmp_path / "run", "record.json")


def test_unreadable_file_is_public_and_a_value_error():
    assert issubclass(UnreadableFile, ValueError)
    assert pv.serialization.UnreadableFile is UnreadableFile


def test_tensors_larger_than_memory_are_refused_before_reading(tmp_path):
    writing.write(tmp_path / "run", {"x": torch.ones(2)}, kind="test")
    tensors, path = tmp_path / "run/tensors.safetensors", tmp_path / "run/record.json"
    record = json.loads(path.read_text())
    os.truncate(tensors, 2**42)  # a sparse file of the recorded length
    record["tensors"]["bytes"] = 2**42
    record["sha256"] = checksum(record)
    path.write_text(json.dumps(record))
    with pytest.raises(pv.serialization.UnreadableFile, match="bytes, and this machine has"):
        read(tmp_path / "run", kind="test")


def test_record_too_large_to_read_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "MAX_RECORD", 2000)
    with pytest.raises(ValueError, match="store long lists as"):
        writing.write(tmp_path / "run", {"x": [0.125] * 1000}, kind="test")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_folder_and_parent_are_synced_in_order(tmp_path, monkeypatch, overwrite):
    """Otherwise a power cut could lose the checkpoint."""
    run = tmp_path / "run"
    if overwrite:
        write(run, {"old": 1})
    before = run.stat().st_ino if overwrite else None
    synced, sync = [], os.fsync

    def recorded(descriptor):
        sync(descriptor)
        at_its_place = run.exists() and run.stat().st_ino != before
        synced.append((os.fstat(descriptor).st_ino, at_its_place))

    monkeypatch.setattr(os, "fsync", recorded)
    write(run, overwrite=overwrite)
    *of_files, of_folder, of_name = synced
    inodes = {(path.stat().st_ino, False) for path in run.iterdir()}
    assert len(of_files) == 2
    assert set(of_files) == inodes
    assert of_folder == (run.stat().st_ino, False)
    assert of_name == (tmp_path.stat().st_ino, True)
