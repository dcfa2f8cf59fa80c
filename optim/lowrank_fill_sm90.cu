// SPDX-License-Identifier: MIT
// What the low-rank products need of each matrix.
#include <ounce/optim/lowrank_tiles.h>

namespace ounce::optim {
cudaError_t fill(const LowRankShape& shape, const ProjectTensors& tensors, ProjectMatrix* matrix) {
  using namespace lowrank;
  const auto& t = tensors;
  if (!is_valid(shape) || !is_aligned(t.gradient) || !is_aligned(t.q) || !is_aligned(t.out)) {
    return cudaErrorInvalidValue;
  }
  const auto bf16 = Element::kBf16;
  auto error = make_map(&matrix->gradient, bf16, t.gradient, shape.rows, shape.columns, kGroupRows);
  if (error != cudaSuccess) return error;
  error = make_map(&matrix->q, bf16, t.q, shape.rank, shape.n(), padded(shape.rank) / 2);
  if (error != cudaSuccess) return error;
  const bool whole = t.rest != nullptr && !shape.right;  // a lies so in shared memory
  error = make_map(&matrix->out, bf16, t.out, shape.longer(), shape.rank,
                   whole ? kWarpRows : kRowsAtOnce, whole ? 1 : copies_of(shape.rank).wide);
  matrix->rest = matrix->out;  // every map is one
  matrix->scales = t.scales;
  if (error != cudaSuccess || t.rest == nullptr) return error;
  if (!can_keep_rest(shape) || !is_aligned(t.rest) || t.scales == nullptr) {
    return cudaErrorInvalidValue;
  }
  return make_map(&matrix->rest, Element::kInt8, t.rest, shape.rows, shape.columns, kWarpRows);
}

cudaError_t fill(const LowRankShape& shape, Element p, const BackprojectTensors& tensors,
                 BackprojectMatrix* matrix) {
  using namespace lowrank;
  const auto& t = tensors;
  if (!is_valid(shape) || p == Element::kInt8 || !is_aligned(t.p) || !is_aligned(t.u) ||
      !is_aligned(t.q)) {
    return cudaErrorInvalidValue;
  }
  const auto bf16 = Element::kBf16;
  auto error = make_map(&matrix->p, p, t.p, shape.rows, shape.columns, kWarpRows);
  if (error != cudaSuccess) return error;
  error = make_map(&matrix->u, bf16, t.u, shape.longer(), shape.rank, kFactorRows);
  if (error != cudaSuccess) return error;
  matrix->step = t.step;
  matrix->seed = t.seed;
  return make_map(&matrix->q, bf16, t.q, shape.rank, shape.n(), padded(shape.rank) / 2);
}

}  // namespace ounce::optim
