"""The command `explain`."""

import json
import zipfile

import numpy as np
import pytest
from command_line import cells_of, check_refused

from jaxopt_rules.__main__ import main


def write_header(path, arrays):
    """A file of numpy.savez that ends where the first array's numbers would begin."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, (shape, dtype) in arrays.items():
            header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array_header_1_0(file, header)


def test_the_parameters_of_digits(capsys):
    assert main(["explain", "adamw(3e-4, where='**/w')"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("adamw(0.0003, where='**/w')\n\n")
    shown = {row["leaf"]: row for row in cells_of(printed, "leaf")}
    assert list(shown) == ["hidden/0/b", "hidden/0/w", "output/b", "output/w"]
    assert shown["hidden/0/w"] == {
        "leaf": "hidden/0/w",
        "shape": "(64, 64)",
        "dtype": "float32",
        "group": "",
        "decay": "0.01 (Step)",
        "rate": "1",
        "slots": "adam.m, adam.v",
        "bytes": "32.0 KiB",
    }
    assert shown["output/b"]["decay"] == ""
    memory = {row["slot"]: row["bytes"] for row in cells_of(printed, "slot")}
    assert memory["adam.m"] == memory["adam.v"] == "18.8 KiB"
    assert memory["total"] == "37.6 KiB"


def test_shapes_of_a_file_of_numpy(tmp_path, capsys):
    """Of parameters that no machine holds."""
    write_header(
        tmp_path / "x.npz",
        {
            "blocks.0.w": ((10**6, 10**6), np.float16),
            "blocks/1/w": ((3, 4), np.float64),
            "b": ((), np.complex64),
            "n": ((7,), np.int32),
        },
    )
    assert main(["explain", "sgd(0.1, momentum=0.9)", "--params", str(tmp_path / "x.npz")]) == 0
    printed = capsys.readouterr().out
    shown = [(row["leaf"], row["shape"], row["dtype"], row["group"]) for row in cells_of(printed, "leaf")]
    assert shown == [
        ("b", "()", "complex64", ""),
        ("blocks/0/w", "(1000000, 1000000)", "float16", ""),
        ("blocks/1/w", "(3, 4)", "float64", ""),
        ("n", "(7,)", "int32", "absent"),
    ]
    assert "3.6 TiB" in printed


def test_shapes_of_a_safetensors_file(tmp_path, capsys):
    files = pytest.importorskip("safetensors.numpy")
    import ml_dtypes

    arrays = {"h.0.attn.w": np.zeros((8, 4), ml_dtypes.bfloat16), "h.0.ln": np.zeros(4, np.float16)}
    files.save_file(arrays, tmp_path / "x.safetensors")
    assert main(["explain", "adafactor(1e-2)", "--params", str(tmp_path / "x.safetensors")]) == 0
    shown = [(row["leaf"], row["shape"], row["dtype"]) for row in cells_of(capsys.readouterr().out, "leaf")]
    assert shown == [("h/0/attn/w", "(8, 4)", "bfloat16"), ("h/0/ln", "(4,)", "float16")]


def test_damaged_safetensors_files_are_refused(tmp_path, capsys):
    pytest.importorskip("safetensors")
    path = tmp_path / "x.safetensors"
    for content, message in [
        (b"short", "is not a safetensors file, or only a part of one"),
        (safetensors(100, "F32", 25), "is not a safetensors file, or only a part of one"),
        (safetensors(4, "F4", 8), "jax has no dtype for 'w', which is F4"),
    ]:
        path.write_bytes(content)
        check_refused(["explain", "adam()", "--params", str(path)], message, capsys)


def safetensors(size, dtype, count):
    header = json.dumps({"w": {"dtype": dtype, "shape": [count], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(min(size, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adamw(where='**/v')"], "the pattern '**/v' matches none of 'hidden/0/b', 'hidden/0/w', 'output/b'"),
        (["partition({'a': adam()}, by=lambda path, x: 'b')"], "'b'"),
        (["adam()", "--problem", "mnist"], "unknown problem 'mnist'; choose from digits, wine, breast-cancer"),
        (["adam()", "--problem", "wine", "--params", "x.npz"], "--params takes the place of --problem and --data"),
        (["adam()", "--params", "missing.npz"], "cannot read missing.npz: No such file or directory"),
        (["adam()", "--params", "."], "--params takes a file *.safetensors or *.npz, not ."),
        (["adam()", "--params", "text.npz"], "text.npz is no file of arrays that numpy.savez wrote: File is not a zip"),
        (["adam()", "--params", "zip.npz"], "zip.npz is no file of arrays that numpy.savez wrote: "),
        (["adam()", "--params", "same.npz"], "same.npz has names that differ in . and / alone"),
    ],
)
def test_what_cannot_be_explained_is_refused_in_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.npz").write_text("text")
    with zipfile.ZipFile("zip.npz", "w") as archive:
        archive.writestr("readme.txt", "text")
    write_header("same.npz", {"a.b": ((2,), np.float32), "a/b": ((2,), np.float32)})
    check_refused(["explain", *arguments], message, capsys)
