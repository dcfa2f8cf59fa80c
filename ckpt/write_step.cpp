// SPDX-License-Identifier: MIT
#include <errno.h>
#include <ounce/ckpt/commit.h>
#include <ounce/ckpt/data_file.h>
#include <ounce/ckpt/write_step.h>
#include <ounce/core/check.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <thread>

namespace ounce::ckpt {
namespace {

std::string data_name(int rank) {
  char name[24];
  std::snprintf(name, sizeof name, "rank%05d.h5", rank);
  return name;
}

class StepWriter {
 public:
  StepWriter(FileSystem& files, Vote& vote, const WriteRequest& request, Capture& capture)
      : files_(files), vote_(vote), request_(request), capture_(capture) {}

  WriteResult run() {
    const auto step = request_.manifest.step;
    check_space(files_, request_.root, step, needed_bytes(request_.manifest));
    enter("create");
    Commit commit(files_, request_.root, step, request_.manifest.uuid, request_.sync);
    auto own = telling([&](const std::string& error) { vote_.prepare(request_.manifest, error); },
                       [&] { return prepared(commit.folder()); });
    auto whole = vote_.prepare(std::move(own), "");
    enter("manifest");
    commit.write_manifest(manifest_text(whole));
    enter("publish");
    telling([&](const std::string& error) { vote_.commit(error); },
            [&] {
              if (!request_.may_publish()) fail_capture();
              commit.publish();
            });
    vote_.commit("");
    commit.write_hint();
    result_.manifest = std::move(whole);
    result_.path = commit.path();
    for (const auto& warning : commit.warnings()) result_.warnings.push_back(warning);
    return std::move(result_);
  }

 private:
  void enter(const char* phase) {
    if (request_.on_phase) request_.on_phase(phase);
  }

  [[noreturn]] void fail_capture() { ounce::fail(Fault::kProblem, capture_.failure()); }

  // What fails here is told to the other ranks, and then as it was to the caller.
  template <class Tell, class Action>
  static auto telling(const Tell& tell, const Action& action) -> decltype(action()) {
    try {
      return action();
    } catch (const std::exception& error) {
      try {
        tell(error.what());
      } catch (const StorageError&) {
        // which is how the vote reports it
      }
      throw;
    }
  }

  // A failed write, sync or close leaves a file in doubt for good (Linux drops the error once
  // reported), so the bytes go to a new file, once, as long as they are all still in the pool.
  Manifest prepared(const std::string& folder) {
    const auto path = folder + "/" + data_name(vote_.rank());
    try {
      return write_data(path);
    } catch (const StorageError& error) {
      if (error.kind() != StorageError::Kind::kIo || is_full(error) || !capture_.rewind()) throw;
      ++result_.retries;
      result_.warnings.push_back("[checkpoint] the data file was written twice, because of this: " +
                                 std::string(error.what()));
    }
    const int removed = files_.unlink(path);
    if (removed != 0 && removed != ENOENT) throw_io("remove", path, removed);
    return write_data(path);
  }

  Manifest write_data(const std::string& path) {
    auto manifest = request_.manifest;
    DataFile file(files_, path, manifest, request_.direct, request_.sync);
    enter("data");
    fill(file);
    enter("sync");
    file.finish();
    return manifest;
  }

  void fill(DataFile& file) {
    std::mutex mutex;
    std::exception_ptr error;
    const auto write = [&] {
      try {
        while (const auto slot = capture_.take()) {
          file.write(capture_.slots()[*slot], capture_.data(*slot));
          capture_.written(*slot);
        }
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!error) error = std::current_exception();
        capture_.stop_taking();
      }
    };
    std::vector<std::thread> others;
    const auto slots = static_cast<int64_t>(capture_.slots().size());
    for (int64_t i = 1; i < std::min(request_.writers, slots); ++i) others.emplace_back(write);
    write();
    for (auto& thread : others) thread.join();
    if (error) std::rethrow_exception(error);
    if (!capture_.failure().empty()) fail_capture();
  }

  FileSystem& files_;
  Vote& vote_;
  const WriteRequest& request_;
  Capture& capture_;
  WriteResult result_;
};

}  // namespace

WriteResult write_step(FileSystem& files, Vote& vote, const WriteRequest& request,
                       Capture& capture) {
  try {
    return StepWriter(files, vote, request, capture).run();
  } catch (const StorageError& error) {
    if (!is_full(error)) throw;
    // What is needed against what is free now that the temporary folder is gone.
    throw_full(files, request.root, request.manifest.step, needed_bytes(request.manifest),
               error.code());
  }
}

}  // namespace ounce::ckpt
