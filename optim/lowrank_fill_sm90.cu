// SPDX-License-Identifier: MIT
// What the low-rank products need of each matrix.
#include <ounce/optim/lowrank_tiles.h>

namespace ounce::optim {
namespace lowrank {
namespace {

cudaError_t map_rows(CUtensorMap* map, Element element, const void* data,
                     const LowRankShape& shape) {
  return make_map(map, element, data, shape.longer(), shape.rank, kRowsAtOnce,
                  copies_of(shape.rank, element).wide);
}

}  // namespace
}  // namespace lowrank

cudaError_t fill(const LowRankShape& shape, const ProjectHow& how, const ProjectTensors& tensors,
                 ProjectMatrix* matrix) {
  using namespace lowrank;
  const auto& t = tensors;
  const bool keeps_a = how.adam && how.keep_a;
  const bool aligned = is_aligned(t.gradient) && is_aligned(t.q) && is_aligned(t.out) &&
                       (!keeps_a || is_aligned(t.a)) &&
                       (!how.adam || (is_aligned(t.m) && is_aligned(t.v) && t.step != nullptr));
  if (!is_valid(shape) || !aligned) return cudaErrorInvalidValue;
  const auto out = how.adam ? Element::kBf16 : how.out;
  ProjectMatrix& to = *matrix;
  const auto fp16 = Element::kBf16;
  auto error = make_map(&to.gradient, fp16, t.gradient, shape.rows, shape.columns, kGroupRows);
  const auto then = [&](auto make) {
    if (error == cudaSuccess) error = make();
  };
  then([&] { return make_map(&to.q, fp16, t.q, shape.rank, shape.n(), padded(shape.rank) / 2); });
  then([&] { return map_rows(&to.out, out, t.out, shape); });
  // Every map is one, whether it is used or not.
  to.a = to.m = to.v = to.out;
  if (keeps_a) then([&] { return map_rows(&to.a, fp16, t.a, shape); });
  if (how.adam) {
    then([&] { return map_rows(&to.m, how.state, t.m, shape); });
    then([&] { return map_rows(&to.v, how.state, t.v, shape); });
  }
  to.step = t.step;
  to.seed = t.seed;
  to.source = t.source;
  to.squares = t.squares;
  to.chosen = t.chosen;
  to.out_data = t.out;
  to.a_data = t.a;
  return error;
}

cudaError_t fill(const LowRankShape& shape, Element p, const BackprojectTensors& tensors,
                 BackprojectMatrix* matrix) {
  using namespace lowrank;
  const auto& t = tensors;
  if (!is_valid(shape) || !is_aligned(t.p) || !is_aligned(t.u) || !is_aligned(t.q)) {
    return cudaErrorInvalidValue;
  }
  const auto fp16 = Element::kBf16;
  const bool narrow = p == Element::kInt8;
  auto error = make_map(&matrix->p, narrow ? fp16 : p, t.p, shape.rows, shape.columns, kWarpRows);
  if (error != cudaSuccess) return error;
  matrix->out = matrix->p;  // every map is one
  if (narrow) {
    if (!is_aligned(t.out) || t.scales == nullptr || shape.columns % 16 != 0) {
      return cudaErrorInvalidValue;
    }
    error = make_map(&matrix->out, p, t.out, shape.rows, shape.columns, kWarpRows);
    if (error != cudaSuccess) return error;
  }
  error = make_map(&matrix->u, fp16, t.u, shape.longer(), shape.rank, kFactorRows);
  if (error != cudaSuccess) return error;
  matrix->step = t.step;
  matrix->seed = t.seed;
  matrix->scales = t.scales;
  return make_map(&matrix->q, fp16, t.q, shape.rank, shape.n(), padded(shape.rank) / 2);
}

}  // namespace ounce::optim
