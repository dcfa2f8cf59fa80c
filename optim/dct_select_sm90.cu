// SPDX-License-Identifier: MIT
// A block a matrix: the threshold by digits of the keys, then bits of the chosen and of those at
// the threshold, whose running counts give every place.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include <ounce/optim/dct_rank_kernels.h>
#include <ounce/optim/dct_rank_parts.h>

namespace ounce::optim {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kMostWords = 65536 / 32, kWordsOfThread = kMostWords / kThreads;

// Ascending with the key, which is not negative; a NaN above all.
__device__ uint32_t ordered(float key) {
  return key != key ? ~0u : key > 0 ? __float_as_uint(key) : 0;
}

// The sum over the threads before this one; all threads.
__device__ int sum_before(int value, int* warps) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = value;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += other;
  }
  __syncthreads();
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  return __reduce_add_sync(~0u, lane < warp ? warps[lane] : 0) + sum - value;
}

__device__ float sum_over_block(float value, float* warps) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += warps[w];
  return sum;
}

struct Threshold {
  uint32_t key;  // of the last that is chosen
  int equal;     // how many of that key are
};

// One digit of 8 bits after the other, from the highest.
__device__ Threshold find_threshold(const float* keys, int n, int rank, int* counts, int* warps) {
  __shared__ int digit_found, rest_found;
  const int lane = threadIdx.x % 32;
  Threshold found = {0, rank};
  for (int shift = 24; shift >= 0; shift -= 8) {
    __syncthreads();
    if (threadIdx.x < 256) counts[threadIdx.x] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i - lane < n; i += kThreads) {
      const uint32_t key = i < n ? ordered(keys[i]) : 0;
      const bool counts_now =
          i < n && (shift == 24 || key >> (shift + 8) == found.key >> (shift + 8));
      // Most keys of a matrix are of one size: a warp counts them together.
      const int digit = counts_now ? static_cast<int>(key >> shift & 255) : -1;
      const uint32_t alike = __match_any_sync(~0u, digit);
      if (digit >= 0 && __ffs(static_cast<int>(alike)) - 1 == lane) {
        atomicAdd(counts + digit, __popc(alike));
      }
    }
    __syncthreads();
    const int digit = 255 - static_cast<int>(threadIdx.x);  // of the first 256 threads
    const int count = digit >= 0 ? counts[digit] : 0, above = sum_before(count, warps);
    if (digit >= 0 && above < found.equal && above + count >= found.equal) {
      digit_found = digit;
      rest_found = found.equal - above;
    }
    __syncthreads();
    found.key |= static_cast<uint32_t>(digit_found) << shift;
    found.equal = rest_found;
  }
  return found;
}

// Bits of an ascending list, and how many bits are set before each word.
__device__ void mark_previous(const int* previous, int rank, int n, uint32_t* bits, int* before,
                              int* warps) {
  const int words = (n + 31) / 32;
  for (int w = threadIdx.x; w < words; w += kThreads) bits[w] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < rank; i += kThreads) {
    const int index = previous[i];
    if (index >= 0 && index < n) atomicOr(bits + index / 32, 1u << index % 32);
  }
  __syncthreads();
  const int first = threadIdx.x * kWordsOfThread;
  int count = 0;
  for (int w = first; w < min(first + kWordsOfThread, words); ++w) count += __popc(bits[w]);
  count = sum_before(count, warps);
  for (int w = first; w < min(first + kWordsOfThread, words); ++w) {
    before[w] = count;
    count += __popc(bits[w]);
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads) select_of(const __grid_constant__ Selection s) {
  __shared__ uint32_t above[kMostWords], equal[kMostWords], old_bits[kMostWords];
  __shared__ int old_before[kMostWords], counts[256], warps[kWarps];
  __shared__ float float_warps[kWarps];
  let_next_come();
  wait_for_previous();
  const int64_t list = int64_t{blockIdx.x} * s.rank;
  int* previous = s.lists == nullptr ? nullptr : s.lists[blockIdx.x];
  int* source = s.source == nullptr ? nullptr : s.source + list;
  if (s.skip != nullptr && *s.skip != 0) {
    for (int i = threadIdx.x; i < s.rank; i += kThreads) {
      if (previous != nullptr) s.indices[list + i] = previous[i];
      if (source != nullptr) source[i] = i;
    }
    return;
  }
  const float* keys = s.keys + int64_t{blockIdx.x} * s.n;
  const float* squares = s.squares + int64_t{blockIdx.x} * s.n;
  const int words = (s.n + 31) / 32;
  if (previous != nullptr) mark_previous(previous, s.rank, s.n, old_bits, old_before, warps);
  const auto threshold = find_threshold(keys, s.n, s.rank, counts, warps);
  for (int w = threadIdx.x / 32; w < words; w += kWarps) {
    const int i = w * 32 + threadIdx.x % 32;
    const uint32_t key = i < s.n ? ordered(keys[i]) : 0;
    const uint32_t over = __ballot_sync(~0u, i < s.n && key > threshold.key);
    const uint32_t same = __ballot_sync(~0u, i < s.n && key == threshold.key);
    if (threadIdx.x % 32 == 0) above[w] = over, equal[w] = same;
  }
  __syncthreads();

  // Every thread some words in a row: first which equals they take, then where their list begins.
  const int first = threadIdx.x * kWordsOfThread, last = min(first + kWordsOfThread, words);
  int equals = 0, chosen = 0;
  for (int w = first; w < last; ++w) equals += __popc(equal[w]);
  int left = threshold.equal - sum_before(equals, warps);
  for (int w = first; w < last; ++w) {
    for (uint32_t bits = equal[w]; bits != 0 && left > 0; bits &= bits - 1, --left) {
      above[w] |= bits & -bits;
    }
    chosen += __popc(above[w]);
  }
  int place = sum_before(chosen, warps);
  float kept = 0, all = 0;
  for (int w = first; w < last; ++w) {
    for (uint32_t bits = above[w]; bits != 0; bits &= bits - 1, ++place) {
      const int index = w * 32 + __ffs(static_cast<int>(bits)) - 1;
      const uint32_t bit = bits & -bits;
      s.indices[list + place] = index;
      if (previous != nullptr) previous[place] = index;  // its bits are elsewhere
      kept += squares[index];
      if (source == nullptr) continue;
      const bool was = previous != nullptr && (old_bits[w] & bit) != 0;
      source[place] = was ? old_before[w] + __popc(old_bits[w] & (bit - 1)) : -1;
    }
  }
  if (s.energy == nullptr) return;
  for (int i = threadIdx.x; i < s.n; i += kThreads) all += squares[i];
  kept = sum_over_block(kept, float_warps);
  all = sum_over_block(all, float_warps);
  if (threadIdx.x == 0) s.energy[blockIdx.x] = all == 0 ? 0 : fminf(kept / all, 1);
}

template <class T>
__global__ void gather_of(const T* basis, const int* indices, int64_t rows, int64_t width, T* out) {
  wait_for_previous();
  const int64_t all = rows * width, step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < all; i += step) {
    const int64_t row = i / width;
    out[i] = basis[indices[row] * width + (i - row * width)];
  }
}

}  // namespace

cudaError_t select(const Selection& s, cudaStream_t stream) {
  if (s.rank < 1 || s.rank > s.n || s.n > kMostWords * 32) return cudaErrorInvalidValue;
  if (s.count == 0) return cudaSuccess;
  return launch_early(select_of, dim3(static_cast<unsigned>(s.count)), dim3(kThreads), 0, stream,
                      s);
}

cudaError_t gather_rows(const void* basis, const int* indices, int64_t rows, int64_t n, void* out,
                        cudaStream_t stream) {
  constexpr int kGatherThreads = 256;
  constexpr int64_t kMost = 4096;  // blocks: enough to fill the GPU
  if (rows == 0 || n == 0) return cudaSuccess;
  const int64_t width = n % 8 == 0 ? n / 8 : n;
  const int64_t blocks = (rows * width + kGatherThreads - 1) / kGatherThreads;
  const dim3 grid(static_cast<unsigned>(std::min(blocks, kMost))), block(kGatherThreads);
  using bf16 = __nv_bfloat16;
  return n % 8 == 0 ? launch_early(gather_of<uint4>, grid, block, 0, stream,
                                   static_cast<const uint4*>(basis), indices, rows, width,
                                   static_cast<uint4*>(out))
                    : launch_early(gather_of<bf16>, grid, block, 0, stream,
                                   static_cast<const bf16*>(basis), indices, rows, width,
                                   static_cast<bf16*>(out));
}

}  // namespace ounce::optim
