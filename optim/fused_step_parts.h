// SPDX-License-Identifier: MIT
// What the fused steps share; included by fused_*_cuda.cpp alone.
#pragma once

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <ounce/optim/adamw_kernels.h>
#include <ounce/optim/dct_rank_kernels.h>
#include <ounce/optim/fused_step.h>
#include <ounce/optim/lowrank_kernels.h>
#include <ounce/optim/momentum_kernels.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <span>
#include <tuple>
#include <utility>

namespace ounce::optim {

using at::Tensor;

inline constexpr int64_t kScratchBytes = int64_t{512} << 20;

inline bool is_known(at::ScalarType type) { return type == at::kFloat || type == at::kBFloat16; }
inline bool is_aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}
inline const float* floats(const Tensor& t) {
  return t.defined() ? t.const_data_ptr<float>() : nullptr;
}

inline Element element_of(const Tensor& t) {
  return t.scalar_type() == at::kFloat ? Element::kFp32 : Element::kBf16;
}
inline RankBasis rank_basis(Basis basis) {
  return basis == Basis::kIdentity ? RankBasis::kIdentity : RankBasis::kDct2;
}

// One field of each, as fields_of(tensors, &FusedTensor::step).
template <class T, class Field>
std::vector<Field> fields_of(std::span<const T> all, Field T::*field) {
  std::vector<Field> fields;
  for (const auto& one : all) fields.push_back(one.*field);
  return fields;
}
inline std::vector<const void*> pointers_of(const std::vector<Tensor>& tensors) {
  std::vector<const void*> all;
  for (const auto& t : tensors) all.push_back(t.const_data_ptr());
  return all;
}

// The i-th of a batch; null of an undefined tensor.
inline void* row(const Tensor& t, size_t i) {
  if (!t.defined()) return nullptr;
  return static_cast<char*>(t.data_ptr()) +
         static_cast<int64_t>(i) * t.stride(0) * t.element_size();
}

// A gradient as the copy engine reads it: itself, or a copy.
inline Tensor read_by_boxes(const Tensor& gradient) {
  const auto whole = gradient.contiguous();
  return is_aligned(whole) ? whole : whole.clone();
}

// So many matrices' scratch, `bytes` each, stays within its limit.
inline int64_t most_at_once(int64_t bytes) { return std::max<int64_t>(1, kScratchBytes / bytes); }

// f(so many of `all`), then f(so many more)
template <class T, class F>
void each_batch(const std::vector<T>& all, int64_t count, const F& f) {
  for (auto from = all.begin(); from < all.end();) {
    const auto end = from + std::min<int64_t>(count, all.end() - from);
    f(std::span<const T>(from, end));
    from = end;
  }
}
// How many of `all` to take at once, about as many each time, up to `most`.
inline int64_t even_count(int64_t all, int64_t most) {
  const auto batches = (all + most - 1) / most;
  return (all + batches - 1) / batches;
}

inline bool is_capturing() {
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

// What launches read of each tensor. It is uploaded again only where something moved. A CUDA graph
// has tables of its own, copied from the host at every launch, which live as long as this.
class Table {
 public:
  // Of `pointers`, which say whether it changed; make() gives the entries.
  template <class Entry, class F>
  const Entry* upload(std::vector<const void*> pointers, const at::Device& device, const F& make) {
    if (is_capturing() || pointers != pointers_) {
      const std::vector<Entry> entries = make();
      const auto bytes = static_cast<int64_t>(entries.size() * sizeof(Entry));
      const auto host = at::empty({bytes}, at::TensorOptions(at::kByte).pinned_memory(true));
      std::memcpy(host.data_ptr(), entries.data(), entries.size() * sizeof(Entry));
      const auto make_there = [&] {
        return at::empty({bytes}, at::TensorOptions(at::kByte).device(device));
      };
      if (is_capturing()) {
        const auto there = make_there();
        C10_CUDA_CHECK(cudaMemcpyAsync(there.data_ptr(), host.const_data_ptr(), host.nbytes(),
                                       cudaMemcpyHostToDevice, c10::cuda::getCurrentCUDAStream()));
        captured_.insert(captured_.end(), {host, there});
        return static_cast<const Entry*>(there.const_data_ptr());
      }
      // In place where it fits, so that scratch has the same addresses at every step.
      if (!device_.defined() || device_.numel() != bytes) device_ = make_there();
      device_.copy_(host, /*non_blocking=*/true);
      pointers_ = std::move(pointers);
    }
    return static_cast<const Entry*>(device_.const_data_ptr());
  }

 private:
  std::vector<const void*> pointers_;
  Tensor device_;
  std::vector<Tensor> captured_;
};

// Of matrices of one shape: the chosen columns.
struct Choice {
  Tensor indices, source;  // [count, rank]; the second undefined where columns stay
  Tensor squares, keys;    // [count, n], where columns were chosen now; by keys
  Tensor q;                // [count, rank, n] bf16

  // fp32: the squares, times `scale` squared, that the columns hold, and all of them, [count, 2];
  // with `source` also how many columns are new, [count, 3].
  Tensor measured(const Tensor& scale = {}) const;
};

// Of matrices like `first`.
inline LowRankShape shape_of(const Tensor& first, bool transposed, int64_t rank, size_t count) {
  return {.rows = first.size(0),
          .columns = first.numel() / first.size(0),
          .right = !transposed,
          .rank = static_cast<int>(rank),
          .count = static_cast<int>(count)};
}

// What keeps tensors from any fused step; "" = nothing.
inline std::string refusal_of(const Tensor& parameter, const Tensor& gradient,
                              const Tensor& state) {
  const auto device = parameter.device();
  if (!device.is_cuda()) return c10::str("tensors on ", device);
  if (at::cuda::getDeviceProperties(device.index())->major != 9) {
    return "a GPU that is not of the Hopper generation";
  }
  if (!is_known(parameter.scalar_type())) return c10::str("weights in ", parameter.scalar_type());
  if (!is_known(state.scalar_type())) return c10::str("moments in ", state.scalar_type());
  if (gradient.defined() && gradient.scalar_type() != parameter.scalar_type()) {
    return c10::str("gradients in ", gradient.scalar_type());
  }
  return parameter.is_contiguous() ? "" : "weights that are not contiguous";
}
// What keeps matrices of this shape from a fused ranking and projection; "" = nothing.
inline std::string refusal_of(const LowRankShape& shape, Basis basis) {
  constexpr int64_t kMostRank = 256, kMostProjected = 8192, kMostLonger = int64_t{1} << 30;
  if (basis != Basis::kDct2 && basis != Basis::kIdentity) return c10::str("basis ", text(basis));
  if (shape.rank % 16 != 0 || shape.rank > kMostRank) {
    return c10::str("rank ", shape.rank, ", which is not 16 n up to ", kMostRank);
  }
  const auto n = shape.n();
  if (shape.columns % 8 != 0 || n % 8 != 0) {
    return c10::str("sides ", shape.rows, " and ", shape.columns, ", which are not 8 n");
  }
  if (n > kMostProjected || !can_rank(rank_basis(basis), n)) {
    return c10::str("a projected side of ", n, ", over ", kMostProjected,
                    " or with a prime factor over 11");
  }
  return shape.longer() < kMostLonger && shape.rows * shape.columns < int64_t{1} << 32
             ? ""
             : "a matrix of 2^32 weights";
}
inline constexpr const char* kNotAligned = "tensors that are not aligned to 16 bytes";

struct FusedSteps::Impl {
  // Tables by the first tensor's memory and by what they are for.
  enum class Use {
    kCount,
    kAdam,
    kRank,
    kLists,
    kAdd,
    kProject,
    kProjectedAdam,
    kBackproject,
    kMomentum,
    kMove
  };
  std::map<std::pair<const void*, Use>, Table> tables;
  std::map<std::tuple<Basis, int64_t, int>, Tensor> bases;  // of a device

  Table& table(const Tensor& first, Use use) { return tables[{first.const_data_ptr(), use}]; }
  // On their device, where tensors of type T are.
  template <class T>
  T* const* places_of(const std::vector<Tensor>& tensors, Use use) {
    const auto& first = tensors[0];
    return table(first, use).upload<T*>(pointers_of(tensors), first.device(), [&] {
      std::vector<T*> all;
      for (const auto& t : tensors) all.push_back(t.data_ptr<T>());
      return all;
    });
  }

  // What is ranked of matrices, fp32 or bf16; `key` is the same at every step.
  RankBatch batch_of(const LowRankShape& shape, const Tensor& key,
                     const std::vector<Tensor>& matrices);
  // Gradients are as read_by_boxes() gives them, here and in add().
  // momentum = keep (momentum + gradient), and the directions [count, ...] where they are defined.
  void add_gradients(std::span<const FusedMomentum> matrices, const FusedSettings& s, double keep,
                     bool nesterov, uint64_t seed, const Tensor& directions);
  // Gradients are added to momenta of bf16; with those of fp32 and int8 (with `scales`) elsewhere,
  // of int8 in the gradients where these are consumed.
  struct Sums {
    std::vector<Tensor> all;  // bf16; written by rank() where batch.addends is not null
    RankBatch batch;          // of them, where they are ranked
  };
  Sums add(const LowRankShape& shape, std::span<const FusedMomentum> matrices,
           const std::vector<Tensor>& scales, Basis basis, int64_t norm, bool ranked, uint64_t seed,
           const FusedSettings& s);
  // How large columns are: the squares, and what select() goes by.
  Choice rank(const LowRankShape& shape, const RankBatch& batch, const at::Device& device,
              Basis basis, int64_t norm);
  // The largest ones. previous: each matrix's, which these take the place of, or none; with
  // `rotates` also the source.
  void select(const LowRankShape& shape, Choice& choice, const std::vector<Tensor>& previous,
              bool rotates, const Tensor& skip);
  // indices -> q
  void gather(const LowRankShape& shape, Basis basis, Choice& choice);
  // p = (1 - lr weight_decay) p - factor lr u q; lr undefined = 1
  struct Update {
    float keep = 1, weight_decay = 0, factor = 1;
    Tensor lr, skip;
    Rounding rounding = Rounding::kNearest;
  };
  // Of parameters.
  static Update step_of(const FusedSettings& s, double factor) {
    return {.weight_decay = static_cast<float>(s.weight_decay),
            .factor = static_cast<float>(factor),
            .lr = s.lr,
            .skip = s.skip,
            .rounding = s.stochastic_rounding ? Rounding::kStochastic : Rounding::kNearest};
  }
  // Where what is left of a matrix goes to, in 8 bits.
  struct Narrow {
    std::vector<Tensor> bytes, scales;
  };
  // a = x q^T, [count, longer, rank] bf16, of bf16 matrices, and what it leaves of them where
  // `rest` is asked for; `key` as above. Where *skip is not 0 it is anything.
  Tensor project(const LowRankShape& shape, const Tensor& key, const std::vector<Tensor>& matrices,
                 const Choice& choice, const Tensor& skip = {}, const Narrow& rest = {});
  // seeds, steps: of each; to the seeds comes `stream`.
  void backproject(const LowRankShape& shape, const std::vector<Tensor>& parameters,
                   const Tensor& u, const Tensor& q, const std::vector<Tensor>& steps,
                   const std::vector<uint64_t>& seeds, const Update& update, uint64_t stream = 0);
  void count(const std::vector<Tensor>& steps, const Tensor& skip);
};

}  // namespace ounce::optim
