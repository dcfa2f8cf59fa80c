# SPDX-License-Identifier: MIT
"""Reads event files with the real tensorboard.

They are written by the test EventFiles.FramesAreWhole of the program test_train: found in
OUNCE_EVENTS_DIR, or written to a temporary folder by the program that OUNCE_TEST_TRAIN names.
"""

import math
import os
import struct
import subprocess
import tempfile
import unittest

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


class TensorBoardTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = os.environ.get("OUNCE_EVENTS_DIR")
        if folder is None:
            temporary = tempfile.TemporaryDirectory()
            cls.addClassCleanup(temporary.cleanup)
            folder = temporary.name
            subprocess.run(
                [os.environ["OUNCE_TEST_TRAIN"], "--gtest_filter=EventFiles.FramesAreWhole"],
                env={**os.environ, "OUNCE_EVENTS_DIR": folder},
                check=True,
                stdout=subprocess.DEVNULL,
            )
        cls.events = EventAccumulator(folder)
        cls.events.Reload()

    def scalars(self, tag):
        return [(event.step, event.value) for event in self.events.Scalars(tag)]

    def test_resuming_replaces_later_steps(self):
        self.assertEqual(self.scalars("train/loss"), [(1, 11.0), (2, 12.0), (3, 23.0)])

    def test_tags(self):
        tags = self.events.Tags()
        self.assertEqual(
            set(tags["scalars"]),
            {"train/loss", "train/norm", "train/lr", "train/ms", "train/tok_s", "train/mfu",
             "train/mem", "eval/val_loss"},
        )
        self.assertEqual(set(tags["tensors"]), {"config/device", "config/parameters", "sample/text"})

    def test_values(self):
        self.assertEqual(self.scalars("eval/val_loss"), [(3, 1.25)])
        self.assertAlmostEqual(self.scalars("train/mfu")[0][1], 0.4131, places=6)
        self.assertTrue(math.isnan(self.scalars("train/norm")[-1][1]))
        fp32 = struct.unpack("<f", struct.pack("<f", 8697308774))[0]
        self.assertEqual(self.scalars("train/mem")[0][1], fp32)

    def test_texts(self):
        def text(tag):
            return [event.tensor_proto.string_val[0].decode() for event in self.events.Tensors(tag)]

        self.assertEqual(text("sample/text"), ["x" * 300 + " \u00e9"])
        self.assertEqual(text("config/device"), ["CPU"])
        self.assertEqual(text("config/parameters"), ["12345"])
        plugin = self.events.SummaryMetadata("sample/text").plugin_data.plugin_name
        self.assertEqual(plugin, "text")


if __name__ == "__main__":
    unittest.main()
