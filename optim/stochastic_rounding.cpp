// SPDX-License-Identifier: MIT
#include <ounce/optim/stochastic_rounding.h>
#include <torch/torch.h>

namespace ounce::optim {

namespace {

using at::Tensor;

constexpr int64_t kMask = 0xFFFFFFFF;

int64_t right(int64_t x, int64_t bits) { return x >> bits; }
Tensor right(const Tensor& x, int64_t bits) { return x.bitwise_right_shift(bits); }

// A permutation of 32 bits that spreads each over all (Wellons' hash-prospector, two rounds). In
// int64, whose products of 32 and 31 bits do not overflow. T: Tensor or int64_t.
template <class T>
T spread(T x) {
  x = ((x ^ right(x, 16)) * int64_t{0x21f0aaad}) & kMask;
  x = ((x ^ right(x, 15)) * int64_t{0x735a2d97}) & kMask;
  return x ^ right(x, 15);
}

}  // namespace

Tensor round_stochastically(const Tensor& x, const Tensor& step, uint64_t seed) {
  const auto key = spread(static_cast<int64_t>(seed & kMask)) ^ static_cast<int64_t>(seed >> 32);
  const auto position = at::arange(x.numel(), x.options().dtype(at::kLong)).view(x.sizes());
  const auto stream = spread(spread(step.to(at::kLong) & kMask) ^ spread(key & kMask));
  const auto odds = spread((position & kMask) ^ spread(right(position, 32) ^ stream)) & 0xFFFF;
  const auto bits = x.contiguous().view(at::kInt) + odds.to(at::kInt);
  const auto rounded = (bits & static_cast<int64_t>(-65536)).view(at::kFloat);
  return at::where(x.isfinite(), rounded, x).to(at::kBFloat16);
}

}  // namespace ounce::optim
