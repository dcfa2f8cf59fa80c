// SPDX-License-Identifier: MIT
// A c10d process group whose ranks are threads of this process, for testing code over several ranks
// without a network:
//
//   ounce::testing::run_ranks(4, [](auto group) { group->allreduce(...)->wait(); });
//
// Collectives complete before they return, reduce in the order of ranks (so that every rank gets
// the same bits), copy through host-visible clones, and time out after a minute. A rank that calls
// another collective than the rest, or brings other shapes, makes all of them throw.
#pragma once

#include <torch/torch.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <tuple>
#include <utility>
#include <vector>

namespace ounce::testing {

// What the ranks share: a meeting point and mailboxes.
class LocalWorld {
 public:
  using Tensors = std::vector<at::Tensor>;
  using Round = std::vector<Tensors>;  // by rank

  explicit LocalWorld(int size) : size_(size), round_(std::make_shared<Meeting>(size)) {}

  int size() const { return size_; }

  // Called by every rank with the same `what`; returns what all brought, once all are there.
  std::shared_ptr<const Round> meet(int rank, const std::string& what, const Tensors& own) {
    Tensors copies;
    for (const auto& tensor : own) copies.push_back(tensor.detach().clone());
    std::unique_lock lock(mutex_);
    const auto meeting = round_;
    if (meeting->arrived == 0) meeting->what = what;
    if (meeting->what != what) {
      meeting->error =
          "rank " + std::to_string(rank) + " calls " + what + " while others call " + meeting->what;
    }
    meeting->tensors->at(rank) = std::move(copies);
    if (++meeting->arrived == size_) {
      round_ = std::make_shared<Meeting>(size_);
      changed_.notify_all();
    }
    const bool complete =
        changed_.wait_for(lock, kTimeout, [&] { return meeting->arrived == size_; });
    TORCH_CHECK(complete, "[local group] ", what, ": only ", meeting->arrived, " of ", size_,
                " ranks came");
    TORCH_CHECK(meeting->error.empty(), "[local group] ", meeting->error);
    return meeting->tensors;
  }

  void put(int from, int to, int tag, const at::Tensor& tensor) {
    const std::lock_guard lock(mutex_);
    mail_[{from, to, tag}].push_back(tensor.detach().clone());
    changed_.notify_all();
  }

  at::Tensor take(int from, int to, int tag) {
    std::unique_lock lock(mutex_);
    auto& box = mail_[{from, to, tag}];
    TORCH_CHECK(changed_.wait_for(lock, kTimeout, [&] { return !box.empty(); }),
                "[local group] rank ", to, " waits for rank ", from, " in vain");
    auto tensor = std::move(box.front());
    box.pop_front();
    return tensor;
  }

 private:
  static constexpr std::chrono::seconds kTimeout{60};
  struct Meeting {
    explicit Meeting(int size) : tensors(std::make_shared<Round>(size)) {}
    int arrived = 0;
    std::string what, error;
    std::shared_ptr<Round> tensors;
  };

  const int size_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::shared_ptr<Meeting> round_;
  std::map<std::tuple<int, int, int>, std::deque<at::Tensor>> mail_;
};

class LocalBackend : public c10d::Backend {
 public:
  using WorkPtr = c10::intrusive_ptr<c10d::Work>;
  using Tensors = std::vector<at::Tensor>;

  LocalBackend(std::shared_ptr<LocalWorld> world, int rank)
      : c10d::Backend(rank, world->size()), world_(std::move(world)) {}

  const std::string getBackendName() const override { return "local"; }

  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    const auto all = meet("allreduce", options.reduceOp, tensors);
    for (size_t i = 0; i < tensors.size(); ++i) {
      tensors[i].copy_(reduce_over_ranks(*all, i, options.reduceOp));
    }
    return done(tensors);
  }

  WorkPtr allreduce_coalesced(Tensors& tensors,
                              const c10d::AllreduceCoalescedOptions& options) override {
    return allreduce(tensors, options);
  }

  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    const auto all =
        world_->meet(getRank(), "broadcast from " + std::to_string(options.rootRank), tensors);
    for (size_t i = 0; i < tensors.size(); ++i) tensors[i].copy_(all->at(options.rootRank).at(i));
    return done(tensors);
  }

  WorkPtr allgather(std::vector<Tensors>& outputs, Tensors& inputs,
                    const c10d::AllgatherOptions&) override {
    const auto all = world_->meet(getRank(), "allgather", inputs);
    for (size_t i = 0; i < inputs.size(); ++i) {
      for (int rank = 0; rank < getSize(); ++rank) outputs[i][rank].copy_(all->at(rank).at(i));
    }
    return done(outputs.empty() ? Tensors{} : outputs[0]);
  }

  WorkPtr _allgather_base(at::Tensor& output, at::Tensor& input,
                          const c10d::AllgatherOptions&) override {
    const auto all = world_->meet(getRank(), "allgather into one tensor", {input});
    auto pieces = output.view({getSize(), -1});
    for (int rank = 0; rank < getSize(); ++rank) pieces[rank].copy_(all->at(rank)[0].reshape({-1}));
    return done({output});
  }

  WorkPtr reduce_scatter(Tensors& outputs, std::vector<Tensors>& inputs,
                         const c10d::ReduceScatterOptions& options) override {
    for (size_t i = 0; i < outputs.size(); ++i) {
      const auto all = meet("reduce_scatter", options.reduceOp, inputs[i]);
      outputs[i].copy_(reduce_over_ranks(*all, getRank(), options.reduceOp));
    }
    return done(outputs);
  }

  WorkPtr _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                               const c10d::ReduceScatterOptions& options) override {
    const auto all = meet("reduce_scatter of one tensor", options.reduceOp, {input});
    const auto sum = reduce_over_ranks(*all, 0, options.reduceOp).reshape({getSize(), -1});
    output.copy_(sum[getRank()].view_as(output));
    return done({output});
  }

  WorkPtr barrier(const c10d::BarrierOptions&) override {
    world_->meet(getRank(), "barrier", {});
    return done({});
  }

  WorkPtr send(Tensors& tensors, int to, int tag) override {
    for (const auto& tensor : tensors) world_->put(getRank(), to, tag, tensor);
    return done(tensors);
  }

  WorkPtr recv(Tensors& tensors, int from, int tag) override {
    for (auto& tensor : tensors) tensor.copy_(world_->take(from, getRank(), tag));
    return done(tensors);
  }

 private:
  class DoneWork : public c10d::Work {
   public:
    explicit DoneWork(Tensors tensors)
        : c10d::Work(-1, c10d::OpType::UNKNOWN),
          tensors_(std::move(tensors)),
          future_(c10::make_intrusive<c10::ivalue::Future>(
              c10::ListType::create(c10::TensorType::get()))) {
      future_->markCompleted(c10::IValue(tensors_));
      finish();
    }
    bool wait(std::chrono::milliseconds) override { return true; }
    Tensors result() override { return tensors_; }
    c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return future_; }

   private:
    Tensors tensors_;
    c10::intrusive_ptr<c10::ivalue::Future> future_;
  };

  static WorkPtr done(Tensors tensors) { return c10::make_intrusive<DoneWork>(std::move(tensors)); }

  std::shared_ptr<const LocalWorld::Round> meet(const char* what, const c10d::ReduceOp& op,
                                                const Tensors& tensors) {
    return world_->meet(getRank(), std::string(what) + " (op " + std::to_string(op.op_) + ")",
                        tensors);
  }

  static at::Tensor reduce_over_ranks(const LocalWorld::Round& all, size_t index,
                                      const c10d::ReduceOp& op) {
    auto result = all[0].at(index).clone();
    for (size_t rank = 1; rank < all.size(); ++rank) {
      const auto& other = all[rank].at(index);
      TORCH_CHECK(other.sizes() == result.sizes(), "[local group] rank ", rank, " brings ",
                  other.sizes(), ", rank 0 ", result.sizes());
      switch (op.op_) {
        case c10d::ReduceOp::SUM:
        case c10d::ReduceOp::AVG:
          result.add_(other);
          break;
        case c10d::ReduceOp::MAX:
          result = at::maximum(result, other);
          break;
        case c10d::ReduceOp::MIN:
          result = at::minimum(result, other);
          break;
        case c10d::ReduceOp::PRODUCT:
          result.mul_(other);
          break;
        default:
          TORCH_CHECK(false, "[local group] reduction ", int{op.op_}, " is not offered");
      }
    }
    if (op.op_ == c10d::ReduceOp::AVG) result.div_(static_cast<int64_t>(all.size()));
    return result;
  }

  std::shared_ptr<LocalWorld> world_;
};

// Runs `body` on `size` threads, each with its rank's group, and rethrows the first exception.
inline void run_ranks(int size,
                      const std::function<void(c10::intrusive_ptr<c10d::ProcessGroup>)>& body) {
  const auto world = std::make_shared<LocalWorld>(size);
  std::vector<std::exception_ptr> errors(size);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      try {
        auto group = c10::make_intrusive<c10d::ProcessGroup>(rank, size);
        auto backend = c10::make_intrusive<LocalBackend>(world, rank);
        group->setBackend(c10::DeviceType::CPU, c10d::ProcessGroup::BackendType::CUSTOM, backend);
        group->setBackend(c10::DeviceType::CUDA, c10d::ProcessGroup::BackendType::CUSTOM, backend);
        group->setDefaultBackend(c10d::ProcessGroup::BackendType::CUSTOM);
        body(group);
      } catch (...) {
        errors[rank] = std::current_exception();
      }
    });
  }
  for (auto& thread : threads) thread.join();
  for (const auto& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace ounce::testing
