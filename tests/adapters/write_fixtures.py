"""Files of tensors as NumPy, `gguf` and `safetensors` write them, for tests/it/readers.rs.

Usage: write_fixtures.py FOLDER. Beside each tensor its values as f32 in `<name>.expected`,
little-endian. CI writes them anew with the pinned packages and reads those.
"""

import pathlib
import sys

import gguf
import ml_dtypes
import numpy
import safetensors.numpy

FOLDER = pathlib.Path(sys.argv[1])
ROWS, WIDTH = 3, 32
VALUES = (numpy.sin(numpy.arange(ROWS * WIDTH)) * 3).astype("<f4").reshape(ROWS, WIDTH)


def main():
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_npy()
    write_npz()
    write_gguf()
    write_safetensors()
    (FOLDER / "raw.bin").write_bytes(VALUES.tobytes())
    expect("raw", VALUES)


def expect(name, values):
    (FOLDER / f"{name}.expected").write_bytes(numpy.asarray(values).astype("<f4").tobytes())


def write_npy():
    for name, kind in [("f2", "<f2"), ("f4", "<f4"), ("f8", "<f8")]:
        numpy.save(FOLDER / f"{name}.npy", VALUES.astype(kind))
        expect(name, VALUES.astype(kind))
    with open(FOLDER / "version2.npy", "wb") as file:
        numpy.lib.format.write_array(file, VALUES, version=(2, 0))
    expect("version2", VALUES)
    # An axis of one element is in both orders, and NumPy calls it neither's.
    numpy.save(FOLDER / "column.npy", VALUES[:, :1].copy())
    expect("column", VALUES[:, :1])
    numpy.save(FOLDER / "codes.npy", VALUES.astype(ml_dtypes.bfloat16).view("<u2"))
    expect("codes", VALUES.astype(ml_dtypes.bfloat16))
    numpy.save(FOLDER / "fortran.npy", numpy.asfortranarray(VALUES))
    numpy.save(FOLDER / "big-endian.npy", VALUES.astype(">f4"))
    nan = VALUES.copy()
    nan[1, 2] = numpy.nan
    numpy.save(FOLDER / "nan.npy", nan)


def write_npz():
    """NumPy writes every member with the sizes of zip64."""
    both = {"hidden": VALUES, "half": VALUES.astype("<f2")}
    numpy.savez(FOLDER / "stored.npz", **both)
    numpy.savez_compressed(FOLDER / "compressed.npz", **both)
    for name in ["stored", "compressed"]:
        # The extra field 1 behind the first local header's name.
        start = (FOLDER / f"{name}.npz").read_bytes()[30 + len("hidden.npy") :]
        assert start[:2] == b"\x01\x00", "these are not the sizes of zip64"
        expect(name, VALUES)


def write_gguf():
    writer = gguf.GGUFWriter(FOLDER / "tensors.gguf", "llama")
    kinds = gguf.GGMLQuantizationType
    writer.add_tensor("f32", VALUES)
    writer.add_tensor("f16", VALUES.astype("<f2"))
    expect("f32", VALUES)
    expect("f16", VALUES.astype("<f2"))
    for kind in [kinds.BF16, kinds.Q8_0, kinds.Q4_0, kinds.Q4_1]:
        blocks = gguf.quantize(VALUES, kind)
        writer.add_tensor(kind.name.lower(), blocks, raw_dtype=kind)
        expect(kind.name.lower(), gguf.dequantize(blocks, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_safetensors():
    kinds = {
        "f32": "<f4",
        "f16": "<f2",
        "bf16": ml_dtypes.bfloat16,
        "e4m3": ml_dtypes.float8_e4m3fn,
        "e5m2": ml_dtypes.float8_e5m2,
    }
    tensors = {name: VALUES.astype(kind) for name, kind in kinds.items()}
    safetensors.numpy.save_file(tensors, FOLDER / "tensors.safetensors")
    for name, tensor in tensors.items():
        expect(name, tensor)


main()
