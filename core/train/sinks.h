// SPDX-License-Identifier: MIT
// Where the numbers of a run go: a terminal, metrics.jsonl, TensorBoard; all behind one interface.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace ounce {

// One row. The names that the console knows, in a train row: loss, norm, lr, ms (a step), tok_s,
// mfu (a fraction), mem (bytes), ckpt_step (newest durable step), eta_s, and steps (where the run
// stops); in an eval row val_loss, best, bits, seconds; in a sample row text; in a ckpt row
// seconds, bytes.
struct Record {
  using Data = std::variant<double, int64_t, std::string>;
  using Field = std::pair<std::string, Data>;

  std::string type;  // config | train | eval | sample | ckpt
  int64_t step = 0;  // steps finished
  std::vector<Field> fields;
};

class MetricsSink {
 public:
  virtual ~MetricsSink() = default;
  // Fault::kData when a file cannot be written.
  virtual void write(const Record& record) = 0;
};

// Lines for people; `out` has to outlive the sink. A train row reads
//   step 120/1000 | loss 3.412 | norm 0.91 | lr 5.8e-4 | 92.1 ms | 142k tok/s | 41.3% MFU | 8.1 GiB
//   | ckpt 100 durable | eta 1m22s
// on one line; what the row lacks is left out, numbers it does not know follow as "name value".
// Config rows are not shown.
std::unique_ptr<MetricsSink> console_sink(std::ostream& out);

// One JSON object a line: {"t":"train","step":120,"loss":3.412,...}, fields in the order given;
// numbers that are not finite are null, broken UTF-8 becomes U+FFFD. Each row is one write(),
// appended: a reader sees whole lines. An existing file is continued: rows of steps beyond
// `resumed_step`, which the run is about to make again, and a line that a crash cut short are
// dropped first, by replacing the file atomically.
std::unique_ptr<MetricsSink> jsonl_sink(const std::string& path, int64_t resumed_step);

// TensorBoard's event files: a new events.out.tfevents.<seconds>.<host> in `folder` for each
// sitting. Numbers become the scalars "<type>/<name>" (steps, eta_s and ckpt_step do not), texts
// and all of a config row become text. With resumed_step >= 0 the file begins with a session start
// that makes TensorBoard drop what older files of the folder hold beyond that step.
std::unique_ptr<MetricsSink> tensorboard_sink(const std::string& folder, int64_t resumed_step = -1);

}  // namespace ounce
