# SPDX-License-Identifier: MIT
"""`ounce ckpt export` writes what the safetensors package loads, and `import` reads what it and h5py
write. The program is the one that OUNCE_PROGRAM names; its libhdf5 is not the one of h5py.
"""
import json
import os
import pathlib
import random
import subprocess
import tempfile
import unittest

import h5py
import numpy as np
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "ckpt" / "golden" / "format1"
STEP = GOLDEN / "step_0000000007"


class Case(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.dir = pathlib.Path(folder.name)

    def ounce(self, *arguments, code=0):
        run = subprocess.run([os.environ["OUNCE_PROGRAM"], "ckpt", *map(str, arguments)],
                             capture_output=True, text=True)
        self.assertEqual(run.returncode, code, run.stderr)
        if code != 0:
            self.assertEqual(run.stderr.count("\n"), 1, run.stderr)
        return run.stderr if code != 0 else run.stdout

    def imported(self, file, *arguments):
        """The tensors that import made of a file, through h5py."""
        out = json.loads(self.ounce("import", file, "--out", self.dir / "imported", "--step", 1,
                                    "--force", "--json", *arguments))
        return h5py.File(pathlib.Path(out["path"]) / "rank00000.h5", "r", locking=False)


class Export(Case):
    def test_the_package_loads_the_model(self):
        self.ounce("export", GOLDEN, "--out", self.dir / "x")
        file = self.dir / "x" / "model.safetensors"
        tensors, arrays = safetensors.torch.load_file(file), safetensors.numpy.load_file(file)
        with h5py.File(STEP / "rank00000.h5", "r", locking=False) as h5:
            self.assertEqual(set(tensors), set(h5["model"]))
            for name, dataset in h5["model"].items():
                np.testing.assert_array_equal(tensors[name].numpy(), dataset[()], name)
                np.testing.assert_array_equal(arrays[name], dataset[()], name)
        with safetensors.safe_open(file, "pt") as opened:
            self.assertEqual(opened.metadata()["format"], "pt")
            self.assertEqual(opened.metadata()["step"], "7")
        # Both names of a tied weight are there: a strict load_state_dict finds every key.
        self.assertTrue(torch.equal(tensors["tied.weight"], tensors["layers.0.weight"]))

    def test_every_dtype(self):
        rng = np.random.default_rng(0)
        wanted = {}
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8,
                      torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
                      torch.uint64, torch.bool, torch.complex64, torch.float8_e4m3fn,
                      torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz):
            size = torch.empty((), dtype=dtype).element_size()
            raw = rng.integers(0, 2 if dtype == torch.bool else 256, (3, 5 * size), dtype=np.uint8)
            wanted[str(dtype)] = torch.from_numpy(raw).view(dtype)
            wanted[str(dtype) + ".scalar"] = wanted[str(dtype)][0, 0].clone()
            wanted[str(dtype) + ".empty"] = torch.empty((2, 0), dtype=dtype)
        safetensors.torch.save_file(wanted, self.dir / "given.safetensors")
        self.imported(self.dir / "given.safetensors").close()
        self.ounce("export", self.dir / "imported", "--out", self.dir / "back.safetensors")
        found = safetensors.torch.load_file(self.dir / "back.safetensors")
        self.assertEqual(set(found), set(wanted))
        for name, value in wanted.items():
            self.assertEqual(found[name].dtype, value.dtype, name)
            self.assertEqual(found[name].shape, value.shape, name)
            self.assertEqual(found[name].reshape(-1).view(torch.uint8).tolist(),
                             value.reshape(-1).view(torch.uint8).tolist(), name)

    def test_shards_and_conversion(self):
        given = {f"w{i}": torch.randn(100) * 10 ** i for i in range(-4, 5)}
        safetensors.torch.save_file(given, self.dir / "given.safetensors")
        self.imported(self.dir / "given.safetensors").close()
        self.ounce("export", self.dir / "imported", "--out", self.dir / "x", "--dtype", "bf16",
                   "--shard-gb", 5e-7)
        index = json.loads((self.dir / "x" / "model.safetensors.index.json").read_text())
        self.assertEqual(index["metadata"]["total_size"], 9 * 200)
        self.assertEqual(len(set(index["weight_map"].values())), 5)
        for name, file in index["weight_map"].items():
            value = safetensors.torch.load_file(self.dir / "x" / file)[name]
            self.assertTrue(torch.equal(value, given[name].bfloat16()), name)
        self.imported(self.dir / "x" / "model.safetensors.index.json").close()
        self.ounce("export", self.dir / "imported", "--out", self.dir / "y.safetensors")
        back = safetensors.torch.load_file(self.dir / "y.safetensors")
        for name, value in given.items():
            self.assertTrue(torch.equal(back[name], value.bfloat16()), name)


class ImportHdf5(Case):
    def write(self, fill, **options):
        path = self.dir / "given.h5"
        with h5py.File(path, "w", **options) as h5:
            fill(h5)
        return path

    def test_reads_what_h5py_wrote(self):
        wanted = {}
        for name in ("float16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64",
                     "uint16", "uint32", "uint64", "bool", "complex64", "complex128"):
            wanted["layer/" + name] = (np.arange(12).reshape(3, 4) % 7).astype(name)
        wanted["scalar"] = np.float32(2.5)
        wanted["empty"] = np.zeros((0, 3), np.int32)
        wanted["größe\nand more"] = np.arange(3.0)
        def fill(h5):
            for name, value in wanted.items():
                if name != "tied":
                    h5[name] = value
            h5["tied"] = h5["layer/float32"]
            h5["layer"].attrs["about"] = "nothing"
        wanted["tied"] = wanted["layer/float32"]
        for options in ({}, {"libver": ("v110", "v110")}, {"userblock_size": 1024}):
            with self.imported(self.write(fill, **options)) as h5:
                for name, value in wanted.items():
                    found = h5["model/" + name]
                    self.assertEqual(found.dtype, value.dtype, name)
                    np.testing.assert_array_equal(found[()], value, name)
                self.assertEqual(h5["model/tied"], h5["model/layer/float32"])

    def test_the_attribute_names_what_the_type_cannot(self):
        raw = np.arange(8, dtype=np.uint8)
        def fill(h5):
            h5["eight"] = raw
            h5["eight"].attrs["torch_dtype"] = "float8_e5m2"
            h5["fixed"] = raw
            h5["fixed"].attrs["torch_dtype"] = np.bytes_("float8_e4m3fn")
            h5["list"] = raw
            h5["list"].attrs["torch_dtype"] = ["float8_e5m2", "int8"]
            h5["plain"] = raw
        self.imported(self.write(fill)).close()
        self.ounce("export", self.dir / "imported", "--out", self.dir / "x.safetensors")
        found = safetensors.torch.load_file(self.dir / "x.safetensors")
        for name, dtype in (("eight", torch.float8_e5m2), ("fixed", torch.float8_e4m3fn),
                            ("list", torch.uint8), ("plain", torch.uint8)):
            self.assertEqual(found[name].dtype, dtype, name)
            self.assertEqual(found[name].view(torch.uint8).tolist(), raw.tolist(), name)

    def test_refuses_by_name_what_does_not_lie_in_one_piece(self):
        values = np.arange(1000, dtype=np.float32)
        def fill(h5):
            h5["fine"] = values
            h5.create_dataset("chunks", data=values, chunks=(100,))
            h5.create_dataset("packed", data=values, compression="gzip")
            h5.create_dataset("unwritten", (10,), np.float32)
            h5.create_dataset("outside", (10,), np.float32, external=[("x.raw", 0, 40)])
            h5["text"] = "words"
            h5["ragged"] = np.array([np.arange(2), np.arange(3)], dtype=h5py.vlen_dtype(int))
            h5["big"] = values.astype(">f4")
            h5["wrong"] = values
            h5["wrong"].attrs["torch_dtype"] = "bfloat16"
            h5["nothing"] = h5py.Empty("f4")
            h5["soft"] = h5py.SoftLink("/fine")
            h5["line\nbreak"] = h5py.SoftLink("/fine")
            h5["elsewhere"] = h5py.ExternalLink("/etc/passwd", "/x")
            layout = h5py.VirtualLayout((1000,), np.float32)
            layout[:] = h5py.VirtualSource("other.h5", "x", (1000,))
            h5.create_virtual_dataset("virtual", layout)
            compact = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            compact.set_layout(h5py.h5d.COMPACT)
            h5py.h5d.create(h5.id, b"compact", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((4,)),
                            compact)
        error = self.ounce("import", self.write(fill), "--out", self.dir / "i", "--step", 1, code=4)
        for part in ("'chunks' is chunked,", "'packed' is chunked and compressed", "'unwritten' has had",
                     "'outside' has its values in other files", "'text' holds texts", "'ragged' holds",
                     "'big' is of a type", "'wrong' is of a type", "'nothing' has no shape",
                     "'soft' is a link", "'line?break' is a link", "'elsewhere' is a link", "'virtual' has its values elsewhere",
                     "'compact' has its values in its header", "h5repack"):
            self.assertIn(part, error)
        self.assertNotIn("'fine'", error)
        self.assertFalse((self.dir / "i").exists())

    def test_an_empty_file_is_told(self):
        error = self.ounce("import", self.write(lambda h5: h5.create_group("a")), "--out",
                           self.dir / "i", "--step", 1, code=3)
        self.assertIn("no tensor", error)

    def test_damaged_files_of_h5py_crash_nothing(self):
        """Its default format has no sums: what comes of a flipped bit may be wrong, but never a
        crash of the program."""
        def fill(h5):
            for i in range(8):
                h5[f"group{i % 3}/w{i}"] = np.full((7, i + 1), i, np.float32)
        path = self.write(fill)
        whole = path.read_bytes()
        rng = random.Random(3)
        codes = {}
        for sample in range(60):
            spoiled = bytearray(whole)
            for _ in range(rng.choice((1, 4, 30, 200))):
                spoiled[rng.randrange(len(spoiled))] = rng.randrange(256)
            if sample % 10 == 9:
                del spoiled[rng.randrange(len(spoiled)):]
            path.write_bytes(spoiled)
            run = subprocess.run([os.environ["OUNCE_PROGRAM"], "ckpt", "import", str(path), "--out",
                                  str(self.dir / "i"), "--step", str(sample)],
                                 capture_output=True, text=True, errors="replace")
            self.assertIn(run.returncode, (0, 2, 3, 4), run.stderr)
            self.assertLessEqual(run.stderr.count("\n"), 1, run.stderr)
            codes[run.returncode] = codes.get(run.returncode, 0) + 1
        print("exit codes of 60 damaged files:", codes)


if __name__ == "__main__":
    unittest.main()
