# SPDX-License-Identifier: MIT
"""A checkpoint is an HDF5 file that h5py reads: names, shapes, dtypes, values, attributes.

Checked on the golden checkpoint of tests/ckpt/golden and on the same one written anew, by the program
that OUNCE_TEST_CKPT names.
"""
import json
import os
import pathlib
import shutil
import struct
import subprocess
import tempfile
import unittest

import h5py
import numpy as np

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "ckpt" / "golden" / "format1"


def values(shape, dtype):
    """The values that tests/ckpt/test_golden.cpp writes."""
    index = np.arange(int(np.prod(shape)), dtype=np.float64)
    value = (index * 3 - 5) / 4
    kind = np.dtype(dtype).kind
    if kind == "b":
        value = index % 2
    elif kind in "iu":
        value = np.trunc(value)
        value = np.abs(value) if kind == "u" else value
    elif kind == "c":
        value = value - 1j * value
    return value.astype(dtype).reshape(shape)


class Checks:
    root = GOLDEN

    def setUp(self):
        step = self.root / "step_0000000007"
        self.file = h5py.File(step / "rank00000.h5", "r", locking=False)
        self.addCleanup(self.file.close)
        self.manifest = json.loads((step / "manifest.json").read_text("utf-8"))

    def test_names_and_shapes_are_those_of_the_manifest(self):
        found = {}
        def visit(name, item):
            if isinstance(item, h5py.Dataset):
                found[name] = list(item.shape)
        self.file.visititems(visit)
        tensors = self.manifest["tensors"]
        stored = {t["name"]: t["shape"] for t in tensors if "tied_to" not in t}
        self.assertEqual({k: v for k, v in found.items() if k in stored}, stored)
        self.assertEqual(set(found) - set(stored) - {t["name"] for t in tensors}, set())

    def test_values_of_every_dtype(self):
        plain = ["float32", "float64", "float16", "uint8", "int8", "int16", "int32", "int64",
                 "uint16", "uint32", "uint64", "bool", "complex64", "complex128"]
        for name in plain:
            dataset = self.file["all/" + name]
            self.assertEqual(dataset.dtype, np.dtype(name), name)
            np.testing.assert_array_equal(dataset[()], values((2, 3), name), name)
            self.assertEqual(dataset.attrs["torch_dtype"], name)
            self.assertEqual(dataset.attrs["class"], "step")

    def test_bfloat16_reads_as_float(self):
        dataset = self.file["all/bfloat16"]
        self.assertEqual(dataset.id.get_type().get_size(), 2)
        np.testing.assert_array_equal(dataset.astype("float32")[()], values((2, 3), "float32"))

    def test_eight_bit_floats_are_bytes_with_a_name(self):
        for name, one in (("float8_e4m3fn", 0xB0), ("float8_e5m2", 0xB8)):
            dataset = self.file["all/" + name]
            self.assertEqual(dataset.dtype, np.uint8)
            self.assertEqual(dataset.attrs["torch_dtype"], name)
            self.assertEqual(dataset[0, 1], one)  # -0.5

    def test_tied_tensors_are_one(self):
        self.assertEqual(self.file["model/tied.weight"], self.file["model/layers.0.weight"])
        np.testing.assert_array_equal(self.file["model/tied.weight"][()], values((4, 5), "float32"))

    def test_scalars_and_empty_tensors(self):
        self.assertEqual(self.file["model/scalar"].shape, ())
        self.assertEqual(self.file["model/scalar"][()], np.float32(-1.25))
        self.assertEqual(self.file["model/empty"].shape, (0, 3))

    def test_the_file_says_what_it_is(self):
        about = self.file["_ckpt"]
        self.assertEqual(about.attrs["format"], 1)
        self.assertEqual(about.attrs["step"], 7)
        self.assertEqual(about.attrs["uuid"], self.manifest["uuid"])
        self.assertEqual(about["notes"].attrs["config"], "[model]\ndim = 5\n")
        self.assertEqual(about["metrics"].attrs["loss"], 1.25)
        scalars = about["scalars"].attrs
        self.assertEqual(scalars["state/negative"], -9007199254740993)
        self.assertEqual(struct.pack("<d", scalars["state/best"]), struct.pack("<d", -0.0))
        self.assertEqual(scalars["state/corpus"], "größe")

    def test_offsets_are_where_the_manifest_says(self):
        for tensor in self.manifest["tensors"]:
            if tensor.get("bytes", 0) > 0:
                offset = self.file[tensor["name"]].id.get_offset()
                self.assertEqual(offset, tensor["offset"], tensor["name"])
                self.assertEqual(offset % 4096, 0)


    @unittest.skipUnless(shutil.which("h5dump"), "needs h5dump")
    def test_h5dump_explains_it(self):
        text = subprocess.run(["h5dump", "-d", "/all/bfloat16", self.file.filename], check=True,
                              capture_output=True, text=True).stdout
        for part in ("16-bit little-endian floating-point", "( 2, 3 )", "-1.25, -0.5, 0.25",
                     '"torch_dtype"', '"bfloat16"', '"class"', '"step"'):
            self.assertIn(part, text)


class Golden(Checks, unittest.TestCase):
    pass


class WrittenAnew(Checks, unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.root = pathlib.Path(folder.name)
        # A process of its own: its libhdf5 is not the one of h5py.
        subprocess.run([os.environ["OUNCE_TEST_CKPT"], "--gtest_filter=Golden.*"], check=True,
                       env={**os.environ, "OUNCE_WRITE_GOLDEN": folder.name})


if __name__ == "__main__":
    unittest.main()
