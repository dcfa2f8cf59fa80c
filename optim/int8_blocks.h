// SPDX-License-Identifier: MIT
// Matrices in 8 bits: each 128 neighbours of a row share a scale, their largest magnitude / 127, so
// that none is off by more than half of it. A block of zeros has scale 0 and stays exact.
#pragma once

#include <ATen/ATen.h>
#include <ounce/optim/rounding_streams.h>

#include <utility>

namespace ounce::optim {

inline int64_t int8_blocks(int64_t columns) { return (columns + kInt8Block - 1) / kInt8Block; }

// x [R, C] -> int8 [R, C] and scales [R, blocks] fp32. What is not finite makes its block's scale
// so.
inline std::pair<at::Tensor, at::Tensor> to_int8_blocks(const at::Tensor& x) {
  const auto rows = x.size(0), columns = x.size(1), blocks = int8_blocks(columns);
  const auto whole = at::constant_pad_nd(x.to(at::kFloat), {0, blocks * kInt8Block - columns})
                         .view({rows, blocks, kInt8Block});
  const auto scales = whole.abs().amax(2) / 127;
  const auto steps = whole / scales.masked_fill(scales == 0, 1).unsqueeze(2);
  const auto bytes = steps.round().clamp(-127, 127).to(at::kChar);
  return {bytes.view({rows, blocks * kInt8Block}).narrow(1, 0, columns).contiguous(), scales};
}

inline at::Tensor from_int8_blocks(const at::Tensor& bytes, const at::Tensor& scales,
                                   at::ScalarType type) {
  const auto spread = scales.to(type).repeat_interleave(kInt8Block, 1);
  return bytes.to(type) * spread.narrow(1, 0, bytes.size(1));
}

}  // namespace ounce::optim
