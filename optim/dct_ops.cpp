// SPDX-License-Identifier: MIT
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ounce/core/check.h>
#include <ounce/optim/dct.h>
#include <ounce/optim/product.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <utility>

namespace ounce::optim {

namespace {

using at::Tensor;

template <class E, size_t count>
using Names = std::array<std::pair<const char*, E>, count>;

constexpr Names<Basis, 5> kBases = {{{"dct2", Basis::kDct2},
                                     {"dct3", Basis::kDct3},
                                     {"identity", Basis::kIdentity},
                                     {"hadamard", Basis::kHadamard},
                                     {"random", Basis::kRandom}}};
constexpr Names<Side, 3> kSides = {
    {{"auto", Side::kAuto}, {"left", Side::kLeft}, {"right", Side::kRight}}};
constexpr Names<Iteration, 3> kIterations = {{{"quintic", Iteration::kQuintic},
                                              {"polar_express", Iteration::kPolarExpress},
                                              {"gram", Iteration::kGram}}};

template <class E, size_t count>
E parse(const char* what, std::string_view name, const Names<E, count>& known) {
  std::string all;
  for (const auto& [candidate, value] : known) {
    if (name == candidate) return value;
    all += (all.empty() ? "" : ", ") + std::string(candidate);
  }
  fail(Fault::kUsage, "[dct] expected ", what, " = ", all, ", got '", name, "'");
}

template <class E, size_t count>
std::string_view text_of(E value, const Names<E, count>& known) {
  for (const auto& [name, candidate] : known) {
    if (value == candidate) return name;
  }
  fail(Fault::kUsage, "[dct] ", static_cast<int>(value), " is not one of its values");
}

at::ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// cos(pi m / (2n)) of integers m, reduced before they are rounded.
Tensor cosines(const Tensor& m, int64_t n) {
  return m.remainder(4 * n).to(at::kDouble).mul_(M_PI / (2 * static_cast<double>(n))).cos_();
}

// c_k sqrt(2/n) D[k, i] for k of one shape and i of another, broadcast.
Tensor dct_entries(const Tensor& k, const Tensor& i, int64_t n) {
  const auto scale = std::sqrt(2 / static_cast<double>(n));
  const auto first = k.eq(0).to(at::kDouble);
  return (cosines(k * (2 * i + 1), n) * scale).mul_(1 - first * (1 - std::sqrt(0.5)));
}

// The sign of row i and column j of Sylvester's matrix: the parity of their common bits.
Tensor hadamard_entries(const Tensor& i, const Tensor& j, int64_t n) {
  auto common = i.bitwise_and(j), parity = at::zeros_like(common);
  for (int64_t bit = 1; bit < n; bit *= 2) parity += common.bitwise_and(bit).ne(0);
  return (1 - 2 * parity.remainder(2)).to(at::kDouble) / std::sqrt(static_cast<double>(n));
}

Tensor random_rotation(int64_t n) {
  const auto gaussian = at::randn({n, n}, at::make_generator<at::CPUGeneratorImpl>(n), at::kDouble);
  const auto [q, r] = at::linalg_qr(gaussian);
  return q * r.diagonal().sign();  // Haar: the decomposition's own choice of signs taken out
}

void check_size(int64_t n, Basis kind) {
  OUNCE_CHECK(n >= 1, "[dct_basis] expected n >= 1, got ", n);
  OUNCE_CHECK(kind != Basis::kHadamard || (n & (n - 1)) == 0,
              "[dct_basis] expected a power of two for a hadamard basis, got n = ", n);
}

// The basis vectors of these numbers [r] int64, a row each: [r, n] fp64.
Tensor basis_rows(Basis kind, const Tensor& indices, int64_t n) {
  const auto row = indices.unsqueeze(1);
  const auto column = at::arange(n, indices.options()).unsqueeze(0);
  switch (kind) {
    case Basis::kDct2:
      return dct_entries(row, column, n);
    case Basis::kDct3:
      return dct_entries(column, row, n);
    case Basis::kIdentity:
      return row.eq(column).to(at::kDouble);
    case Basis::kHadamard:
      return hadamard_entries(row, column, n);
    default:
      return random_rotation(n).to(indices.device()).index_select(0, indices);
  }
}

// Q^T [rank, n] in g's compute dtype.
Tensor vectors(Basis kind, const Tensor& indices, int64_t n, at::ScalarType type) {
  return basis_rows(kind, indices.to(at::kLong), n).to(type);
}

void check_matrix(const char* op, const Tensor& g) {
  OUNCE_CHECK(g.dim() == 2 && g.is_floating_point() && g.numel() > 0, "[", op,
              "] expected a floating matrix [R, C] with entries, got ", g.scalar_type(), " ",
              g.sizes(), "; flatten what has more dimensions");
}

bool is_right(const Tensor& g, Side side) {
  return side == Side::kAuto ? g.sym_size(0) >= g.sym_size(1) : side == Side::kRight;
}

// With the projected side last: everything below is the right side's.
Tensor rightwards(const Tensor& g, Side side) { return is_right(g, side) ? g : g.t(); }

void check_indices(const char* op, const Tensor& indices, const Tensor& g) {
  OUNCE_CHECK(
      indices.dim() == 1 && indices.scalar_type() == at::kInt && indices.device() == g.device(),
      "[", op, "] expected indices [rank] int32 on ", g.device(), ", got ", indices.scalar_type(),
      " ", indices.sizes(), " on ", indices.device());
}

// s [R, n]: g's coordinates.
Tensor coordinates(const char* op, const Tensor& g, Side side, Basis basis) {
  check_matrix(op, g);
  const auto type = compute_type(g);
  const auto x = rightwards(g, side).to(type);
  check_size(x.size(1), basis);
  return at::matmul(x, dct_basis(x.size(1), basis, x.options()).t());
}

Tensor norms(const Tensor& s, int64_t norm) {
  OUNCE_CHECK(norm == 1 || norm == 2, "[dct_rank] expected norm = 1 or 2, got ", norm);
  return norm == 1 ? s.abs().sum(0) : s.square().sum(0).sqrt_();
}

// --- orthonormalisation

struct Quintic {
  double a, b, c;
};
constexpr Quintic kMuon = {3.4445, -4.7750, 2.0315};
// Step by step, then the last one for ever: of the interval [1e-3, 1].
constexpr std::array<Quintic, 8> kPolarExpress = {
    {{8.28721201814563, -23.595886519098837, 17.300387312530933},
     {4.107059111542203, -2.9478499167379106, 0.5448431082926601},
     {3.9486908534822946, -2.908902115962949, 0.5518191394370137},
     {3.3184196573706015, -2.488488024314874, 0.51004894012372},
     {2.300652019954817, -1.6689039845747493, 0.4188073119525673},
     {1.891301407787398, -1.2679958271945868, 0.37680408948524835},
     {1.8750014808534479, -1.2500016453999487, 0.3750001645474248},
     {1.875, -1.25, 0.375}}};
// What is smaller stays small: its squares would underflow, and the norm with them.
constexpr double kSmallestNorm = 1e-15;
// Keeps rounding from pushing a singular value over 1, where the polynomials grow.
constexpr double kRoom = 1.01;

// Of Polar Express all but the last polynomial leave that room once more: in bf16 a value over 1
// would leap.
Quintic step_of(Iteration kind, int64_t step) {
  if (kind != Iteration::kPolarExpress) return kMuon;
  const auto last = kPolarExpress.size() - 1, index = std::min(static_cast<size_t>(step), last);
  const auto& q = kPolarExpress[index];
  if (index == last) return q;
  return {q.a / kRoom, q.b / std::pow(kRoom, 3), q.c / std::pow(kRoom, 5)};
}

Tensor product_of(const Product& p) {
  if (auto fused = fused_product(p); fused.defined()) return fused;
  auto sum = at::bmm(p.a, p.b);
  if (p.alpha != 1) sum.mul_(p.alpha);
  if (p.c.defined()) sum.add_(p.c, p.beta);
  if (p.diagonal != 0) sum.diagonal(0, -2, -1).add_(p.diagonal);
  return sum.to(p.type.value_or(sum.scalar_type()));
}

// The rows of a symmetric second factor are read as its columns.
Tensor symmetric_product(const Tensor& a, const Tensor& b) {
  return product_of({.a = a, .b = b.mT(), .symmetric = true});
}

// a I + b m + c m^2 of symmetric m
Tensor polynomial(const Quintic& q, const Tensor& m) {
  return product_of(
      {.a = m, .b = m.mT(), .c = m, .alpha = q.c, .beta = q.b, .diagonal = q.a, .symmetric = true});
}

// The Gram matrices [batch, n, n] of the smaller side of y, and y multiplied by others there.
struct SmallerSide {
  bool tall;

  Tensor gram(const Tensor& y) const {
    const auto t = y.mT();
    return product_of({.a = tall ? t : y, .b = tall ? y : t, .symmetric = true});
  }
  Tensor apply(const Tensor& p, const Tensor& y, at::ScalarType type) const {
    return product_of({.a = tall ? y : p, .b = tall ? p.mT() : y, .type = type});
  }
};

// How many steps from `done` on go by the Gram matrices alone, y being multiplied once. They stray,
// the more so while singular values are far apart; in fp16 two steps, then three, stay nearer to
// the iteration than bf16 does step by step.
int64_t steps_together(Iteration kind, bool half, const Tensor& y, int64_t done, int64_t steps) {
  const auto left = steps - done;
  if (!half) return kind == Iteration::kGram ? left : 1;
  const auto n = std::min(y.size(-2), y.size(-1)), longer = std::max(y.size(-2), y.size(-1));
  if (kind != Iteration::kGram && 2 * longer <= 3 * n) return 1;  // they would be no fewer products
  return std::min<int64_t>(left, done == 0 ? 2 : 3);
}

}  // namespace

std::string_view text(Basis basis) { return text_of(basis, kBases); }
std::string_view text(Side side) { return text_of(side, kSides); }
std::string_view text(Iteration iteration) { return text_of(iteration, kIterations); }
Basis parse_basis(std::string_view name) { return parse("basis", name, kBases); }
Side parse_side(std::string_view name) { return parse("side", name, kSides); }
Iteration parse_iteration(std::string_view name) { return parse("iteration", name, kIterations); }

Tensor dct_basis(int64_t n, Basis kind, const at::TensorOptions& options) {
  check_size(n, kind);
  const auto all = at::arange(n, options.dtype(at::kLong));
  return basis_rows(kind, all, n).to(options.dtype().toScalarType());
}

Tensor dct_rank(const Tensor& g, Side side, int64_t norm, Basis basis) {
  return norms(coordinates("dct_rank", g, side, basis), norm);
}

std::tuple<Tensor, Tensor> dct_select(const Tensor& g, int64_t rank, Side side, int64_t norm,
                                      Basis basis) {
  const auto s = coordinates("dct_select", g, side, basis);
  OUNCE_CHECK(rank >= 1 && rank <= s.size(1), "[dct_select] expected 1 <= rank <= ", s.size(1),
              " for g ", g.sizes(), ", got ", rank);
  const auto order = std::get<1>(norms(s, norm).sort(/*stable=*/true, 0, /*descending=*/true));
  const auto indices = std::get<0>(order.narrow(0, 0, rank).sort());
  const auto energy = s.square().sum(0);
  const auto share = energy.index_select(0, indices).sum() / energy.sum();
  return {indices.to(at::kInt), share.masked_fill(energy.sum() == 0, 0)};
}

Tensor dct_project(const Tensor& g, const Tensor& indices, Side side, Basis basis) {
  check_matrix("dct_project", g);
  check_indices("dct_project", indices, g);
  const auto x = rightwards(g, side);
  check_size(x.size(1), basis);
  const auto q = vectors(basis, indices, x.size(1), compute_type(g));
  const auto a = at::matmul(x.to(q.scalar_type()), q.t()).to(g.scalar_type());
  return is_right(g, side) ? a : a.t().contiguous();
}

Tensor dct_backproject(const Tensor& a, const Tensor& indices, int64_t n, Side side, Basis basis) {
  check_matrix("dct_backproject", a);
  check_indices("dct_backproject", indices, a);
  check_size(n, basis);
  OUNCE_CHECK(side != Side::kAuto, "[dct_backproject] expected side = left or right, got 'auto'");
  const auto x = rightwards(a, side);
  OUNCE_CHECK(x.size(1) == indices.size(0), "[dct_backproject] expected a with ", indices.size(0),
              side == Side::kRight ? " columns" : " rows", ", as many as indices, got ", a.sizes());
  const auto q = vectors(basis, indices, n, compute_type(a));
  const auto g = at::matmul(x.to(q.scalar_type()), q).to(a.scalar_type());
  return side == Side::kRight ? g : g.t().contiguous();
}

Tensor newton_schulz(Tensor x, int64_t steps, Iteration kind) {
  OUNCE_CHECK(x.dim() >= 2 && x.is_floating_point(),
              "[newton_schulz] expected floating matrices [..., R, C], got ", x.scalar_type(), " ",
              x.sizes());
  OUNCE_CHECK(steps >= 0, "[newton_schulz] expected steps >= 0, got ", steps);
  const at::NoGradGuard no_grad;
  const SmallerSide side{x.size(-2) > x.size(-1)};
  const auto sizes = x.sizes().vec();
  const auto result = x.scalar_type(), wide = compute_type(x);
  // A GPU multiplies bf16 at first, then fp16, in which all has its place once it is scaled.
  const bool half = x.is_cuda() && result == at::kBFloat16;
  const auto type = half ? at::kHalf : wide;
  auto y = x.reshape({-1, x.size(-2), x.size(-1)}).to(half ? result : wide);
  x.reset();
  auto gram = side.gram(y);
  // The trace is the square of the norm.
  auto norm = gram.diagonal(0, -2, -1).to(wide).sum(-1).sqrt();
  if (kind == Iteration::kPolarExpress) norm *= kRoom;
  const auto scale = norm.clamp_min(kSmallestNorm).reciprocal().view({-1, 1, 1});
  const auto scaled = [&](const Tensor& matrices, const Tensor& by, at::ScalarType to) {
    auto out = at::empty(matrices.sizes(), matrices.options().dtype(to));
    return at::mul_out(out, matrices, by);
  };
  if (steps == 0) return scaled(y, scale, result).view(sizes);
  gram = scaled(gram, scale.square(), type);
  for (int64_t step = 0; step < steps;) {
    const bool first = step == 0;
    if (!first) gram = side.gram(y);
    Tensor factor;
    for (auto left = steps_together(kind, half, y, step, steps); left > 0; --left, ++step) {
      const auto p = polynomial(step_of(kind, step), gram);
      factor = factor.defined() ? symmetric_product(factor, p) : p;
      if (left > 1) gram = symmetric_product(symmetric_product(p, gram), p);
    }
    gram.reset();
    if (first) factor = scaled(factor, scale, y.scalar_type());
    y = side.apply(factor, y, step < steps ? type : result);
  }
  return y.view(sizes);
}

// --- the dispatcher

namespace {

// Inside autocast they compute in their own precision.
using NoAutocast = c10::impl::ExcludeDispatchKeyGuard;

Tensor basis_entry(int64_t n, c10::string_view kind, std::optional<at::ScalarType> type,
                   std::optional<at::Device> device) {
  return dct_basis(n, parse_basis(kind),
                   at::TensorOptions().dtype(type.value_or(at::kFloat)).device(device));
}
Tensor rank_entry(const Tensor& g, c10::string_view side, int64_t norm, c10::string_view basis) {
  const NoAutocast guard(c10::autocast_dispatch_keyset);
  return dct_rank(g, parse_side(side), norm, parse_basis(basis));
}
std::tuple<Tensor, Tensor> select_entry(const Tensor& g, int64_t rank, c10::string_view side,
                                        int64_t norm, c10::string_view basis) {
  const NoAutocast guard(c10::autocast_dispatch_keyset);
  return dct_select(g, rank, parse_side(side), norm, parse_basis(basis));
}
Tensor project_entry(const Tensor& g, const Tensor& indices, c10::string_view side,
                     c10::string_view basis) {
  const NoAutocast guard(c10::autocast_dispatch_keyset);
  return dct_project(g, indices, parse_side(side), parse_basis(basis));
}
Tensor backproject_entry(const Tensor& a, const Tensor& indices, int64_t n, c10::string_view side,
                         c10::string_view basis) {
  const NoAutocast guard(c10::autocast_dispatch_keyset);
  return dct_backproject(a, indices, n, parse_side(side), parse_basis(basis));
}
Tensor newton_schulz_entry(const Tensor& x, int64_t steps, c10::string_view kind) {
  const NoAutocast guard(c10::autocast_dispatch_keyset);
  return newton_schulz(x, steps, parse_iteration(kind));
}

// Shapes and dtypes of tensors without values.

Tensor rank_meta(const Tensor& g, c10::string_view side, int64_t, c10::string_view) {
  return at::empty_symint({g.sym_size(is_right(g, parse_side(side)) ? 1 : 0)},
                          g.options().dtype(compute_type(g)));
}
std::tuple<Tensor, Tensor> select_meta(const Tensor& g, int64_t rank, c10::string_view, int64_t,
                                       c10::string_view) {
  return {at::empty({rank}, g.options().dtype(at::kInt)),
          at::empty({}, g.options().dtype(compute_type(g)))};
}
Tensor project_meta(const Tensor& g, const Tensor& indices, c10::string_view side,
                    c10::string_view) {
  const auto rank = indices.sym_size(0);
  return is_right(g, parse_side(side)) ? at::empty_symint({g.sym_size(0), rank}, g.options())
                                       : at::empty_symint({rank, g.sym_size(1)}, g.options());
}
Tensor backproject_meta(const Tensor& a, const Tensor&, int64_t n, c10::string_view side,
                        c10::string_view) {
  return parse_side(side) == Side::kRight ? at::empty_symint({a.sym_size(0), n}, a.options())
                                          : at::empty_symint({n, a.sym_size(1)}, a.options());
}
Tensor newton_schulz_meta(const Tensor& x, int64_t, c10::string_view) {
  return at::empty_symint(x.sym_sizes(), x.options());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ounce, m) {
  m.def(
      "dct_basis(int n, str kind='dct2', *, ScalarType? dtype=None, Device? device=None) -> Tensor",
      basis_entry);
  m.def("dct_rank(Tensor g, str side='auto', int norm=2, str basis='dct2') -> Tensor");
  m.def(
      "dct_select(Tensor g, int rank, str side='auto', int norm=2, str basis='dct2') -> "
      "(Tensor indices, Tensor energy)");
  m.def("dct_project(Tensor g, Tensor indices, str side='auto', str basis='dct2') -> Tensor");
  m.def("dct_backproject(Tensor a, Tensor indices, int n, str side, str basis='dct2') -> Tensor");
  m.def("newton_schulz(Tensor x, int steps=5, str kind='quintic') -> Tensor");
}

TORCH_LIBRARY_IMPL(ounce, CompositeExplicitAutograd, m) {
  m.impl("dct_rank", rank_entry);
  m.impl("dct_select", select_entry);
  m.impl("dct_project", project_entry);
  m.impl("dct_backproject", backproject_entry);
  m.impl("newton_schulz", newton_schulz_entry);
}
TORCH_LIBRARY_IMPL(ounce, Meta, m) {
  m.impl("dct_rank", rank_meta);
  m.impl("dct_select", select_meta);
  m.impl("dct_project", project_meta);
  m.impl("dct_backproject", backproject_meta);
  m.impl("newton_schulz", newton_schulz_meta);
}

}  // namespace ounce::optim
