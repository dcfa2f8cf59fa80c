// SPDX-License-Identifier: MIT
// The DCT-II by Makhoul's way: a Fourier transform of n points of the reordered vector, two vectors
// as real and imaginary part. Three stages of R1 R2 R3 = n points in registers with two exchanges
// through shared memory; a thread keeps the sums of its frequencies over all vectors it sees.
#include <cuda_runtime.h>
#include <ounce/kernels/common/ptx.h>

#include <ounce/optim/dct_rank_parts.h>
#include <ounce/optim/dct_rank_read.h>
#include <ounce/optim/dct_rank_shape.h>
#include <ounce/optim/dct_rank_stages.h>

namespace ounce::optim {
namespace {

// How the first stage gets its points: kStaged from copies of bf16 rows or columns; kDirect from
// two fp32 neighbours an access; kFilled from the exchange, where fill() has put them.
enum class Input { kStaged, kDirect, kFilled };

// Where vectors are columns, blocks that run at the same time take neighbours, so that what one of
// them leaves of a piece of memory is in the cache for the others: the units of `each` a block,
// written in rows, are read in columns.
__device__ int neighbour(int unit, int units, int each) {
  const int full = units / each, rest = units % each, row = unit / each, column = unit % each;
  return column * full + min(column, rest) + row;
}

// The units of one matrix from `unit` to `last`, every G-th.
template <class S, Input input, bool absolutes>
struct Walk {
  const Places<S>& places;
  const RankJob& job;
  int each;
  int phase = 0;

  __device__ int place(int unit) const {
    return S::kRight ? unit : neighbour(unit, job.units, each);
  }
  __device__ void start(int matrix, int unit, int last) const {
    if (input != Input::kStaged || unit >= last) return;
    if constexpr (S::kRight) {
      stage_rows(places, job, matrix, unit);
    } else {
      ColumnCopy<S> copy(places, job, matrix, place(unit));
      copy.template run<0>(places);
      copy.template run<1>(places);
      copy.template run<2>(places);
    }
  }
  // The second and third stage, among them the copies for unit `next`.
  __device__ void finish(int matrix, int next, int last, Sums<S, absolutes>& sums) const {
    if constexpr (input == Input::kStaged && !S::kRight) {
      if (next < last) {
        ColumnCopy<S> copy(places, job, matrix, place(next));
        copy.template run<0>(places);
        second_stage(places, [&] { copy.template run<1>(places); });
        places.wait();
        copy.template run<2>(places);
        third_stage(places, sums);
        return;
      }
    } else {
      start(matrix, next, last);
    }
    second_stage(places, [] {});
    places.wait();
    third_stage(places, sums);
  }
  template <class Add>
  __device__ void first(int matrix, int unit, const Add& add) {
    if constexpr (input == Input::kStaged) {
      ptx::wait(places.landed, phase);
      phase ^= 1;
      first_stage<S, true>(places, add);
    } else if constexpr (input == Input::kDirect) {
      first_stage_direct(places, job, matrix, place(unit));
    } else {
      fill(places, job, matrix, place(unit));
      first_stage<S, false>(places, add);
    }
  }
  __device__ void run(int matrix, int unit, int last, Sums<S, absolutes>& sums) {
    if constexpr (S::kAdded > 0) {
      Adding<S> adding(places, job.batch, matrix);
      run(matrix, unit, last, sums, adding, [&](int of) { adding.first = int64_t{of} * S::kUnit; });
    } else {
      const auto same = [](uint32_t word, int, int) { return word; };
      run(matrix, unit, last, sums, same, [](int) {});
    }
  }
  // begin(unit): before its first stage.
  template <class Add, class Begin>
  __device__ void run(int matrix, int unit, int last, Sums<S, absolutes>& sums, const Add& add,
                      const Begin& begin) {
    for (; unit < last; unit += S::G) {
      begin(unit);
      first(matrix, unit, add);
      places.wait();
      finish(matrix, unit + S::G, last, sums);
      places.wait();
    }
    // compute-sanitizer follows barriers of groups only where all groups pass as many.
    if (unit - places.group >= last) return;
    for (int i = input == Input::kFilled ? 0 : 1; i < 4; ++i) places.wait();
  }
};

template <class S, Input input, bool absolutes>
__global__ void __launch_bounds__(S::kThreads, 1) rank_of(const __grid_constant__ RankJob job) {
  extern __shared__ __align__(16) unsigned char shared[];
  const Places<S> places(shared);
  if (input == Input::kStaged && threadIdx.x < S::G) {
    ptx::init(ptx::shared_address(shared + S::kBarriers + threadIdx.x * 8), S::kRight ? 1 : S::T);
    ptx::fence_init();
  }
  __syncthreads();
  const int begin = job.first_unit(blockIdx.x);
  int left = job.first_unit(blockIdx.x + 1) - begin;  // units
  int matrix = begin / job.units, first = begin % job.units;
  if constexpr (input == Input::kStaged && S::kRight) {
    if (places.group < min(left, job.units - first)) {
      prefetch_rows(places, job, matrix, first + places.group);
    }
  }
  make_tables<S>(shared);
  __syncthreads();
  let_next_come();
  wait_for_previous();
  Walk<S, input, absolutes> walk = {places, job, min(job.each + 1, job.units)};
  for (; left > 0; ++matrix, first = 0) {
    const int unit = first + places.group, last = min(first + left, job.units);
    Sums<S, absolutes> sums = {};
    walk.start(matrix, unit, last);
    walk.run(matrix, unit, last, sums);
    constexpr int kSums = absolutes ? 2 : 1;
    flush(places, shared, sums, job.slots + (int64_t{blockIdx.x} + matrix) * kSums * S::N);
    left -= last - first;
  }
}

// Lengths with kernels of their own; a block's threads and memory fill one multiprocessor.
template <int n, int r1, int r2, int r3, int right_pairs, int right_groups, int left_pairs,
          int left_groups>
struct Length {
  using Right = Shape<n, r1, r2, r3, true, right_pairs, right_groups>;
  using Left = Shape<n, r1, r2, r3, false, left_pairs, left_groups>;
  template <int added>
  using Adding = Shape<n, r1, r2, r3, true, right_pairs, right_groups, added>;
};
using L512 = Length<512, 8, 8, 8, 1, 15, 8, 2>;
using L768 = Length<768, 16, 6, 8, 4, 5, 8, 2>;
using L1024 = Length<1024, 16, 8, 8, 1, 15, 8, 2>;
using L1536 = Length<1536, 16, 12, 8, 2, 5, 8, 1>;
using L2048 = Length<2048, 16, 16, 8, 1, 8, 8, 1>;
using L4096 = Length<4096, 16, 32, 8, 1, 4, 4, 1>;
using L8192 = Length<8192, 16, 32, 16, 1, 2, 2, 1>;

// The same with addends, for usual widths of models.
template <class Call>
bool with_addends(const RankBatch& batch, Call call) {
  const auto shape = [&]<class L>(L) {
    batch.addends_are_int8 ? call(typename L::template Adding<1>())
                           : call(typename L::template Adding<2>());
    return true;
  };
  switch (batch.length()) {
    case 1024:
      return shape(L1024());
    case 2048:
      return shape(L2048());
    case 4096:
      return shape(L4096());
    default:
      return false;
  }
}

// Calls with the shape of a batch; false where there is none.
template <class Call>
bool with_shape(const RankBatch& batch, Call call) {
  if (batch.addends != nullptr) return with_addends(batch, call);
  const auto side = [&]<class L>(L) {
    batch.right ? call(typename L::Right()) : call(typename L::Left());
    return true;
  };
  switch (batch.length()) {
    case 512:
      return side(L512());
    case 768:
      return side(L768());
    case 1024:
      return side(L1024());
    case 1536:
      return side(L1536());
    case 2048:
      return side(L2048());
    case 4096:
      return side(L4096());
    case 8192:
      return side(L8192());
    default:
      return false;
  }
}

template <class S>
int64_t units_of(const RankBatch& batch) {
  return (batch.vectors() + S::kUnit - 1) / S::kUnit;
}

template <class S, Input input, bool absolutes>
cudaError_t launch(const RankJob& job, cudaStream_t stream) {
  return launch_early(rank_of<S, input, absolutes>, dim3(job.blocks), dim3(S::kThreads), S::kShared,
                      stream, job);
}

template <class S>
cudaError_t launch(const RankJob& job, bool absolutes, cudaStream_t stream) {
  if constexpr (S::kAdded > 0) return launch<S, Input::kStaged, false>(job, stream);
  const RankBatch& batch = job.batch;
  if (absolutes) return launch<S, Input::kFilled, true>(job, stream);
  if (!batch.aligned) return launch<S, Input::kFilled, false>(job, stream);
  return batch.gradient_is_fp32 ? launch<S, Input::kDirect, false>(job, stream)
                                : launch<S, Input::kStaged, false>(job, stream);
}

}  // namespace

bool can_rank(RankBasis basis, int64_t length) {
  if (basis == RankBasis::kIdentity) return length > 0;
  if (length < 2 || length > 8192) return false;
  for (const int factor : {2, 3, 5, 7, 11}) {
    while (length % factor == 0) length /= factor;
  }
  return length == 1;
}

bool can_add(RankBasis basis, const RankBatch& batch, bool absolutes) {
  return basis == RankBasis::kDct2 && batch.right && batch.aligned && !batch.gradient_is_fp32 &&
         !absolutes && with_addends(batch, [](auto) {});
}

int64_t rank_scratch(RankBasis basis, const RankBatch& batch, bool absolutes, int processors) {
  if (!can_rank(basis, batch.length())) return 0;
  int64_t slots = 0;
  if (basis == RankBasis::kIdentity) {
    slots = identity_slots(batch) * batch.count;
  } else if (!with_shape(batch, [&]<class S>(S) {
               slots = blocks_for(batch.count * units_of<S>(batch), processors) + batch.count;
             })) {
    slots = any_length_blocks(batch, absolutes, processors) + batch.count;
  }
  return slots * batch.length() * (absolutes ? 2 : 1) * static_cast<int64_t>(sizeof(float));
}

cudaError_t rank(RankBasis basis, const RankBatch& given, const RankOutput& out, int processors,
                 cudaStream_t stream) {
  if (!can_rank(basis, given.length())) return cudaErrorInvalidValue;
  if (given.count == 0) return cudaSuccess;
  if (given.vectors() < 1) return cudaErrorInvalidValue;
  RankBatch batch = given;
  batch.aligned = given.aligned && given.columns % 8 == 0;
  if (batch.addends != nullptr && !can_add(basis, batch, out.absolutes != nullptr)) {
    return cudaErrorInvalidValue;
  }
  if (basis == RankBasis::kIdentity) return rank_identity(batch, out, stream);
  RankJob job;
  cudaError_t status = cudaSuccess;
  const bool found = with_shape(batch, [&]<class S>(S) {
    job = make_job(batch, units_of<S>(batch), processors, out.scratch);
    status = launch<S>(job, out.absolutes != nullptr, stream);
  });
  if (!found) return rank_any_length(batch, out, processors, stream);
  if (status != cudaSuccess) return status;
  return sum_slots({job, 0, out.squares, out.absolutes}, stream);
}

}  // namespace ounce::optim
