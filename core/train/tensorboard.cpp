// SPDX-License-Identifier: MIT
// TensorBoard event files, written directly: records as TFRecord frames them, each a protocol
// buffer Event (tensorflow/core/util/event.proto). Only the few fields used here are encoded.
#include <fcntl.h>
#include <ounce/core/check.h>
#include <ounce/core/train/append_file.h>
#include <ounce/core/train/sinks.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <string_view>

namespace ounce {

namespace {

static_assert(std::endian::native == std::endian::little);

// CRC-32C (Castagnoli), reflected, bit by bit over a table of bytes.
uint32_t crc32c(std::string_view bytes) {
  static const auto table = [] {
    std::array<uint32_t, 256> entries{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t value = i;
      for (int bit = 0; bit < 8; ++bit) value = value >> 1 ^ (value & 1 ? 0x82f63b78u : 0);
      entries[i] = value;
    }
    return entries;
  }();
  uint32_t crc = ~0u;
  for (const char c : bytes) crc = crc >> 8 ^ table[(crc ^ static_cast<unsigned char>(c)) & 0xff];
  return ~crc;
}

template <class T>
std::string raw(T value) {
  std::string bytes(sizeof value, '\0');
  std::memcpy(bytes.data(), &value, sizeof value);
  return bytes;
}

// Sums of sums do not detect much, so TFRecord masks its own.
uint32_t masked_crc(std::string_view bytes) { return std::rotr(crc32c(bytes), 15) + 0xa282ead8u; }

// length, its sum, the bytes, their sum.
std::string frame(const std::string& bytes) {
  const auto length = raw(static_cast<uint64_t>(bytes.size()));
  return length + raw(masked_crc(length)) + bytes + raw(masked_crc(bytes));
}

// A protocol buffer message under construction.
class Message {
 public:
  Message& varint(int field, uint64_t value) {
    key(field, 0);
    append_varint(value);
    return *this;
  }
  Message& number(int field, double value) {
    key(field, 1);
    bytes_ += raw(value);
    return *this;
  }
  Message& single(int field, float value) {
    key(field, 5);
    bytes_ += raw(value);
    return *this;
  }
  Message& bytes(int field, std::string_view value) {
    key(field, 2);
    append_varint(value.size());
    bytes_.append(value);
    return *this;
  }
  Message& message(int field, const Message& value) { return bytes(field, value.bytes_); }
  const std::string& encoded() const { return bytes_; }

 private:
  void key(int field, int wire_type) {
    append_varint(static_cast<uint64_t>(field << 3 | wire_type));
  }
  void append_varint(uint64_t value) {
    for (; value >= 0x80; value >>= 7) bytes_ += static_cast<char>(value | 0x80);
    bytes_ += static_cast<char>(value);
  }

  std::string bytes_;
};

// Event { wall_time = 1; step = 2; ... }
Message event(int64_t step) {
  const std::chrono::duration<double> now = std::chrono::system_clock::now().time_since_epoch();
  Message result;
  result.number(1, now.count()).varint(2, static_cast<uint64_t>(step));
  return result;
}

// Summary.Value { tag = 1; simple_value = 2 }
Message scalar_value(const std::string& tag, double value) {
  Message result;
  result.bytes(1, tag).single(2, static_cast<float>(value));
  return result;
}

// Summary.Value { tag = 1; tensor = 8 { dtype = 1; shape = 2; string_val = 8 };
// metadata = 9 { plugin_data = 1 { plugin_name = 1 } } }, as TensorBoard's text plugin wants it.
Message text_value(const std::string& tag, const std::string& text) {
  constexpr uint64_t kString = 7;
  Message dimension, shape, tensor, plugin, metadata, result;
  dimension.varint(1, 1);
  shape.message(2, dimension);
  tensor.varint(1, kString).message(2, shape).bytes(8, text);
  plugin.bytes(1, "text");
  metadata.message(1, plugin);
  result.bytes(1, tag).message(8, tensor).message(9, metadata);
  return result;
}

std::string text_of(const Record::Data& data) {
  if (const auto* text = std::get_if<std::string>(&data)) return *text;
  if (const auto* integer = std::get_if<int64_t>(&data)) return std::to_string(*integer);
  char buffer[40];
  std::snprintf(buffer, sizeof buffer, "%.9g", std::get<double>(data));
  return buffer;
}

// A name in `folder` that no file has yet.
std::string new_path(const std::string& folder) {
  char host[256] = "localhost";
  gethostname(host, sizeof host - 1);
  auto seconds = std::chrono::duration_cast<std::chrono::seconds>(
                     std::chrono::system_clock::now().time_since_epoch())
                     .count();
  for (;; ++seconds) {
    char digits[24];
    std::snprintf(digits, sizeof digits, "%010lld", static_cast<long long>(seconds));
    const auto path = folder + "/events.out.tfevents." + digits + "." + host;
    struct stat unused;
    if (stat(path.c_str(), &unused) != 0) return path;
  }
}

class EventFileSink final : public MetricsSink {
 public:
  EventFileSink(const std::string& folder, int64_t resumed_step) : file_(new_path(folder), O_EXCL) {
    constexpr int kFileVersion = 3, kSessionLog = 7;
    constexpr uint64_t kStart = 1;
    put(event(0).bytes(kFileVersion, "brain.Event:2"));
    if (resumed_step >= 0) {
      Message start;
      start.varint(1, kStart);
      put(event(resumed_step + 1).message(kSessionLog, start));
    }
  }

  void write(const Record& record) override {
    constexpr int kSummary = 5;
    Message summary;
    for (const auto& [name, data] : record.fields) {
      if (name == "steps" || name == "eta_s" || name == "ckpt_step") continue;
      const auto tag = record.type + "/" + name;
      if (record.type == "config" || std::holds_alternative<std::string>(data)) {
        summary.message(1, text_value(tag, text_of(data)));
      } else if (const auto* integer = std::get_if<int64_t>(&data)) {
        summary.message(1, scalar_value(tag, static_cast<double>(*integer)));
      } else {
        summary.message(1, scalar_value(tag, std::get<double>(data)));
      }
    }
    put(event(record.step).message(kSummary, summary));
  }

 private:
  void put(const Message& message) { file_.append(frame(message.encoded())); }

  AppendFile file_;
};

}  // namespace

std::unique_ptr<MetricsSink> tensorboard_sink(const std::string& folder, int64_t resumed_step) {
  return std::make_unique<EventFileSink>(folder, resumed_step);
}

}  // namespace ounce
