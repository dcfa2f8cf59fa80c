// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>
#include <ounce/core/check.h>
#include <ounce/core/train/format.h>
#include <ounce/core/train/sinks.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>

namespace {

namespace fs = std::filesystem;
using ounce::Record;

// A folder of its own, removed at the end.
class Folder {
 public:
  Folder() {
    std::string pattern = (fs::temp_directory_path() / "ounce_sinks_XXXXXX").string();
    path_ = mkdtemp(pattern.data());
  }
  ~Folder() { fs::remove_all(path_); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  std::string operator/(const std::string& name) const { return (path_ / name).string(); }
  std::string path() const { return path_.string(); }

 private:
  fs::path path_;
};

std::string content(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

TEST(Format, Bytes) {
  EXPECT_EQ(ounce::format_bytes(0), "0 B");
  EXPECT_EQ(ounce::format_bytes(1023), "1023 B");
  EXPECT_EQ(ounce::format_bytes(1024), "1.0 KiB");
  EXPECT_EQ(ounce::format_bytes(1024 * 1024 - 1), "1.0 MiB");
  EXPECT_EQ(ounce::format_bytes(8697308774), "8.1 GiB");
  EXPECT_EQ(ounce::format_bytes(std::numeric_limits<int64_t>::max()), "8.0 EiB");
  EXPECT_EQ(ounce::format_bytes(-2048), "-2.0 KiB");
}

TEST(Format, Counts) {
  EXPECT_EQ(ounce::format_count(0), "0");
  EXPECT_EQ(ounce::format_count(999), "999");
  EXPECT_EQ(ounce::format_count(999.7), "1k");
  EXPECT_EQ(ounce::format_count(1234), "1.23k");
  EXPECT_EQ(ounce::format_count(142345), "142k");
  EXPECT_EQ(ounce::format_count(999999), "1M");
  EXPECT_EQ(ounce::format_count(123.6e6), "124M");
  EXPECT_EQ(ounce::format_count(std::nan("")), "nan");
}

TEST(Format, Durations) {
  EXPECT_EQ(ounce::format_duration(0.42), "0.4s");
  EXPECT_EQ(ounce::format_duration(9.97), "10s");
  EXPECT_EQ(ounce::format_duration(59.6), "1m00s");
  EXPECT_EQ(ounce::format_duration(82), "1m22s");
  EXPECT_EQ(ounce::format_duration(7500), "2h05m");
  EXPECT_EQ(ounce::format_duration(3 * 86400 + 4 * 3600 + 59), "3d04h");
  EXPECT_EQ(ounce::format_duration(-1), "?");
  EXPECT_EQ(ounce::format_duration(std::numeric_limits<double>::infinity()), "?");
}

TEST(Format, Scientific) {
  EXPECT_EQ(ounce::format_scientific(5.8e-4), "5.8e-4");
  EXPECT_EQ(ounce::format_scientific(1e-3), "1.0e-3");
  EXPECT_EQ(ounce::format_scientific(0), "0");
  EXPECT_EQ(ounce::format_scientific(2.5e11), "2.5e11");
  EXPECT_EQ(ounce::format_scientific(3), "3.0e0");
}

Record train_row(int64_t step) {
  return {"train",
          step,
          {{"loss", 3.4121},
           {"norm", 0.912},
           {"lr", 5.8e-4},
           {"ms", 92.13},
           {"tok_s", 142345.0},
           {"mfu", 0.4131},
           {"eta_s", 82.0},
           {"mem", int64_t{8697308774}},
           {"steps", int64_t{1000}},
           {"ckpt_step", int64_t{100}}}};
}

TEST(ConsoleSink, StepLine) {
  std::ostringstream out;
  const auto sink = ounce::console_sink(out);
  sink->write({"config", 0, {{"torch", "2"}}});
  sink->write(train_row(120));
  EXPECT_EQ(
      out.str(),
      "step 120/1000 | loss 3.412 | norm 0.91 | lr 5.8e-4 | 92.1 ms | 142k tok/s | 41.3% MFU | "
      "8.1 GiB | ckpt 100 durable | eta 1m22s\n");
  out.str("");
  sink->write({"train", 1, {{"loss", std::nan("")}, {"ms", 12345.6}, {"gate", 0.123456}}});
  EXPECT_EQ(out.str(), "step 1 | loss nan | 12.3 s | gate 0.1235\n");
}

TEST(ConsoleSink, OtherRows) {
  std::ostringstream out;
  const auto sink = ounce::console_sink(out);
  sink->write(
      {"eval", 100, {{"val_loss", 1.91234}, {"best", 1.9}, {"bits", 2.7588}, {"seconds", 12.3}}});
  sink->write({"ckpt", 100, {{"seconds", 0.41}, {"bytes", int64_t{25480397}}}});
  sink->write({"sample", 100, {{"text", "two\nlines"}}});
  EXPECT_EQ(out.str(),
            "step 100 | validation loss 1.9123 | best 1.9000 | 2.759 bits | 12s\n"
            "step 100 | checkpoint | 0.4s | 24.3 MiB\n"
            "sample at step 100:\ntwo\nlines\n");
}

TEST(JsonLines, OneObjectALine) {
  const Folder folder;
  const auto path = folder / "metrics.jsonl";
  const auto sink = ounce::jsonl_sink(path, 0);
  sink->write({"train", 1, {{"loss", 0.1}, {"norm", std::nan("")}, {"tokens", int64_t{1} << 53}}});
  EXPECT_EQ(content(path),
            "{\"t\":\"train\",\"step\":1,\"loss\":0.1,\"norm\":null,"
            "\"tokens\":9007199254740992}\n");  // there while the run goes on
  sink->write({"sample", 1, {{"text", "a\"b\n\xff"}}});
  EXPECT_EQ(content(path).substr(content(path).find('\n') + 1),
            "{\"t\":\"sample\",\"step\":1,\"text\":\"a\\\"b\\n\xef\xbf\xbd\"}\n");
}

TEST(JsonLines, ResumingDropsWhatWillBeMadeAgain) {
  const Folder folder;
  const auto path = folder / "metrics.jsonl";
  {
    const auto sink = ounce::jsonl_sink(path, 0);
    sink->write({"config", 0, {}});
    for (int64_t step = 1; step <= 5; ++step) sink->write({"train", step, {{"loss", 1.5}}});
    sink->write({"eval", 5, {}});
  }
  const auto before = content(path);
  std::ofstream(path, std::ios::app) << "{\"t\":\"train\",\"ste";  // killed while writing
  { const auto sink = ounce::jsonl_sink(path, 5); }
  EXPECT_EQ(content(path), before);
  {
    const auto sink = ounce::jsonl_sink(path, 3);
    sink->write({"config", 3, {}});
    sink->write({"train", 4, {{"loss", 2.5}}});
  }
  std::string expected = "{\"t\":\"config\",\"step\":0}\n";
  for (int step = 1; step <= 3; ++step) {
    expected += "{\"t\":\"train\",\"step\":" + std::to_string(step) + ",\"loss\":1.5}\n";
  }
  expected += "{\"t\":\"config\",\"step\":3}\n{\"t\":\"train\",\"step\":4,\"loss\":2.5}\n";
  EXPECT_EQ(content(path), expected);
  EXPECT_FALSE(fs::exists(path + ".tmp"));
  // A whole last row whose newline is missing is kept, and not glued to the next.
  std::ofstream(path, std::ios::app) << "{\"t\":\"train\",\"step\":5}";
  ounce::jsonl_sink(path, 9)->write({"train", 6, {}});
  EXPECT_EQ(content(path),
            expected + "{\"t\":\"train\",\"step\":5}\n{\"t\":\"train\",\"step\":6}\n");
}

TEST(JsonLines, UnwritableIsNamed) {
  try {
    ounce::jsonl_sink("/nonexistent/metrics.jsonl", 0);
    ADD_FAILURE() << "opened";
  } catch (const ounce::Error& error) {
    EXPECT_EQ(error.fault(), ounce::Fault::kData);
    EXPECT_NE(std::string(error.what_without_backtrace()).find("/nonexistent/metrics.jsonl"),
              std::string::npos);
  }
  if (fs::exists("/dev/full")) {
    EXPECT_THROW(ounce::jsonl_sink("/dev/full", 0)->write({"train", 1, {}}), ounce::Error);
  }
}

std::vector<fs::path> event_files(const std::string& folder) {
  std::vector<fs::path> files;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.path().filename().string().starts_with("events.out.tfevents.")) {
      files.push_back(entry.path());
    }
  }
  std::sort(files.begin(), files.end());
  return files;
}

// CRC-32C by its definition, one bit at a time.
uint32_t plain_crc32c(const std::string& bytes) {
  uint32_t crc = 0xffffffff;
  for (const char c : bytes) {
    crc ^= static_cast<unsigned char>(c);
    for (int bit = 0; bit < 8; ++bit) crc = crc & 1 ? crc >> 1 ^ 0x82f63b78u : crc >> 1;
  }
  return crc ^ 0xffffffff;
}

template <class T>
T number_at(const std::string& bytes, size_t offset) {
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof value);
  return value;
}

uint32_t masked(const std::string& bytes) {
  const auto crc = plain_crc32c(bytes);
  return (crc >> 15 | crc << 17) + 0xa282ead8u;
}

// Two sittings: steps 1 to 4, then again from step 2. With OUNCE_EVENTS_DIR the files stay there,
// for tests/python/test_tensorboard.py to read.
TEST(EventFiles, FramesAreWhole) {
  ASSERT_EQ(plain_crc32c("123456789"), 0xe3069283u);  // the check value of CRC-32C
  const Folder temporary;
  const char* given = std::getenv("OUNCE_EVENTS_DIR");
  const std::string folder = given != nullptr ? given : temporary.path();
  {
    const auto sink = ounce::tensorboard_sink(folder);
    sink->write({"config", 0, {{"device", "CPU"}, {"parameters", int64_t{12345}}}});
    for (int64_t step = 1; step <= 4; ++step) {
      auto row = train_row(step);
      row.fields[0].second = static_cast<double>(10 + step);
      sink->write(row);
    }
  }
  {
    const auto sink = ounce::tensorboard_sink(folder, 2);
    sink->write({"train", 3, {{"loss", 23.0}, {"norm", std::nan("")}}});
    sink->write({"sample", 3, {{"text", std::string(300, 'x') + " \xc3\xa9"}}});
    sink->write({"eval", 3, {{"val_loss", 1.25}}});
  }
  const auto files = event_files(folder);
  ASSERT_EQ(files.size(), 2u);
  const size_t frames[] = {1 + 1 + 4, 2 + 3};
  for (size_t f = 0; f < 2; ++f) {
    const auto bytes = content(files[f].string());
    size_t offset = 0, count = 0;
    for (; offset + 16 <= bytes.size(); ++count) {
      const auto length = number_at<uint64_t>(bytes, offset);
      ASSERT_LE(offset + 16 + length, bytes.size());
      EXPECT_EQ(number_at<uint32_t>(bytes, offset + 8), masked(bytes.substr(offset, 8)));
      EXPECT_EQ(number_at<uint32_t>(bytes, offset + 12 + length),
                masked(bytes.substr(offset + 12, length)));
      offset += 16 + length;
    }
    EXPECT_EQ(offset, bytes.size());
    EXPECT_EQ(count, frames[f]);
    EXPECT_NE(bytes.find("brain.Event:2"), std::string::npos);
  }
}

}  // namespace
