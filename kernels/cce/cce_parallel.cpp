// SPDX-License-Identifier: MIT
#include <ATen/autocast_mode.h>
#include <ounce/kernels/cce/cce_calls.h>
#include <ounce/kernels/cce/cce_parallel.h>
#include <torch/torch.h>

#include <limits>
#include <utility>
#include <vector>

namespace ounce {

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using detail::CceOptions;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kIgnored = -100;
constexpr double kElsewhere = -1;  // the loss of a target that another rank has; others are >= 0
// Up to here the difference of two lse is a log1p, which keeps a loss near 0.
constexpr double kNear = 10;

struct Call : torch::CustomClassHolder {
  Call(CceOptions options_, VocabShard shard_)
      : options(std::move(options_)), shard(std::move(shard_)) {}
  CceOptions options;
  VocabShard shard;

  // Of this rank's rows alone; a target that others have is its first row with weight 0.
  CceOptions local_options() const {
    auto o = options;
    return o.ignore_index(kIgnored)
        .reduction(Reduction::kNone)
        .z_loss(0)
        .validate_targets(false)
        .recompute(Recompute::kAlways);
  }
};

// This rank's piece of each token.
struct Local {
  Tensor counted, here;   // bool: not ignored; with a target among this rank's rows
  Tensor target, weight;  // of the local call

  Local(const Tensor& all_targets, const Tensor& rows, const Call& call) {
    const auto target_here = all_targets - call.shard.first;
    counted = all_targets.ne(call.options.ignore_index());
    if (const auto shift = call.options.shift(); shift > 0) {
      counted.narrow(-1, 0, shift).fill_(false);
    }
    here = target_here.ge(0).logical_and_(target_here.lt(rows.size(0))).logical_and_(counted);
    target = at::where(here, target_here, 0).masked_fill_(counted.logical_not(), kIgnored);
    weight = here.to(detail::compute_type(rows));
  }
};

// Of all ranks, per token.
struct Combined {
  Tensor lse, nll;  // 0 where not counted
  Tensor below;     // this rank's lse - lse
  Tensor lost;      // bool: counted, with a target that not exactly one rank has

  // lse, nll: of the local call
  Combined(const Local& local, const Tensor& lse_here, const Tensor& nll_here, const Call& call) {
    auto mine = at::stack({lse_here, nll_here.masked_fill(local.here.logical_not(), kElsewhere)});
    auto sizes = mine.sizes().vec();
    sizes.insert(sizes.begin(), call.shard.group->getSize());
    auto all = at::empty(sizes, mine.options());
    call.shard.group->_allgather_base(all, mine)->wait();
    const auto lses = all.select(1, 0), nlls = all.select(1, 1);
    const auto owner = nlls.ne(kElsewhere), others = owner.logical_not();
    lost = owner.sum(0).ne(1).logical_and_(local.counted);
    if (call.options.validate_targets()) {
      const auto count = lost.sum().item<int64_t>();
      OUNCE_CHECK(count == 0,
                  "[vocab_parallel_linear_cross_entropy] expected targets on one rank each or "
                  "ignore_index = ",
                  call.options.ignore_index(), ", got ", count, " others");
    }
    const auto lse_of_owner = lses.masked_fill(others, 0).sum(0);
    lse = lses.logsumexp(0);
    const auto rest = (lses - lse_of_owner).exp_().masked_fill_(owner, 0).sum(0);
    const auto far = lse - lse_of_owner;
    const auto above = at::where(far < kNear, rest.log1p(), far);
    const auto ignored = local.counted.logical_not();
    nll = (nlls.masked_fill(others, 0).sum(0) + above).masked_fill_(ignored, 0);
    below = at::where(local.here, above.neg(), lse_here - lse);
    lse = lse.masked_fill(ignored, 0);
  }
};

class VocabParallel : public torch::autograd::Function<VocabParallel> {
 public:
  // loss, lse, z_loss, n_valid, nll
  static variable_list forward(AutogradContext* ctx, const Tensor& hidden, const Tensor& weight,
                               const Tensor& target, const OptionalTensor& bias,
                               const OptionalTensor& token_weight,
                               const c10::intrusive_ptr<Call>& call) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto& o = call->options;
    const Local local(target, weight, *call);
    const auto here = detail::forward({hidden, weight, local.target, bias, local.weight, {}},
                                      call->local_options(), {});
    const auto &lse_here = std::get<1>(here), &nll_here = std::get<6>(here);
    const Combined all(local, lse_here, nll_here, *call);
    auto weights = token_weight ? token_weight->to(all.lse.scalar_type()) : at::ones_like(all.lse);
    // NaN reaches the loss and every gradient that such a token touches.
    weights = weights.masked_fill(local.counted.logical_not(), 0)
                  .masked_fill_(all.lost, std::numeric_limits<double>::quiet_NaN());
    const auto sum = weights.sum();
    const auto denominator = sum.masked_fill(sum.eq(0), 1);
    const auto reduce = [&](const Tensor& rows) {
      if (o.reduction() == Reduction::kNone) return rows;
      return o.reduction() == Reduction::kSum ? rows.sum() : rows.sum() / denominator;
    };
    const auto squared = all.lse.square() * o.z_loss() * weights;
    auto loss = reduce(all.nll * weights + squared);
    const auto n_valid = local.counted.sum();
    if (o.empty_is_nan() && o.reduction() == Reduction::kMean) {
      loss = loss.masked_fill(n_valid.eq(0), std::numeric_limits<double>::quiet_NaN());
    }
    if (o.reduction() == Reduction::kMean) weights = weights / denominator;
    ctx->save_for_backward({hidden, weight, bias.value_or(Tensor()), local.target, local.weight,
                            lse_here, nll_here, weights, all.lse, all.below});
    ctx->saved_data["call"] = c10::IValue::make_capsule(call);
    const auto z_loss = reduce(squared);
    ctx->mark_non_differentiable({z_loss, n_valid, all.nll});
    ctx->set_materialize_grads(false);
    return {loss, all.lse, z_loss, n_valid, all.nll};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list out(6);
    OUNCE_CHECK(!at::GradMode::is_enabled(),
                "[vocab_parallel_linear_cross_entropy] expected create_graph = false: there is no "
                "second derivative");
    if (!grads[0].defined() && !grads[1].defined()) return out;
    const auto saved = ctx->get_saved_variables();
    const auto &hidden = saved[0], &weight = saved[1], &here = saved[4], &weights = saved[7],
               &lse = saved[8], &below = saved[9];
    const auto bias = saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt;
    const auto held = ctx->saved_data["call"].toCapsule();
    const auto& call = static_cast<const Call&>(*held);
    const auto compute = weights.scalar_type();
    const auto of_rows = grads[0].defined() ? grads[0].to(compute) * weights : at::zeros_like(lse);
    // lse_r enters the loss through L, and where the target is here with -1 through its row too.
    const auto share = below.exp();
    auto of_lse = of_rows * at::where(here.ne(0), below.expm1(), share);
    of_lse += of_rows * lse * share * (2 * call.options.z_loss());
    if (grads[1].defined()) of_lse += grads[1].to(compute) * share;
    const detail::CceWanted wanted = {ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                      bias && ctx->needs_input_grad(3)};
    auto [grad_hidden, grad_weight, grad_bias] =
        detail::backward(of_rows, of_lse, {}, {hidden, weight, saved[3], bias, here, {}},
                         {saved[5], saved[6], {}}, call.local_options(), wanted, compute);
    if (wanted[0]) {
      std::vector<Tensor> sum = {grad_hidden};
      call.shard.group->allreduce(sum)->wait();
      out[0] = sum[0].to(hidden.scalar_type());
    }
    const auto& main_grad = call.options.main_grad();
    if (wanted[1] && main_grad.defined()) torch::autograd::impl::bump_version(main_grad);
    if (wanted[1] && !main_grad.defined()) out[1] = grad_weight;
    if (wanted[2]) out[3] = grad_bias;
    return out;
  }
};

void check_call(const VocabShard& shard, const CceOptions& o) {
  constexpr const char* kName = "[vocab_parallel_linear_cross_entropy] expected ";
  OUNCE_CHECK(shard.group != nullptr && shard.first >= 0, kName, "a process group and first >= 0");
  OUNCE_CHECK(o.label_smoothing() == 0, kName, "label_smoothing = 0, got ", o.label_smoothing());
  OUNCE_CHECK(o.grad_mode() == GradMode::kExact, kName, "no filter");
  OUNCE_CHECK(!o.return_correct() && !o.return_entropy(), kName,
              "neither return_correct nor return_entropy");
  OUNCE_CHECK(o.recompute() != Recompute::kNever, kName, "recompute = auto or always, got never");
}

}  // namespace

LinearCrossEntropyOutput vocab_parallel_linear_cross_entropy(
    const Tensor& hidden, const Tensor& weight, const Tensor& target, const VocabShard& shard,
    const OptionalTensor& bias, const OptionalTensor& token_weight,
    const LinearCrossEntropyOptions& o) {
  check_call(shard, o);
  OUNCE_CHECK(hidden.defined() && weight.defined() && target.defined(),
              "[vocab_parallel_linear_cross_entropy] expected hidden, weight and target, got an "
              "undefined tensor");
  const auto device = hidden.device().type();
  const auto x =
      at::autocast::is_autocast_enabled(device)
          ? at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), hidden, device)
          : hidden;
  const auto bias_ = detail::drop_undefined(bias),
             token_weight_ = detail::drop_undefined(token_weight);
  const detail::CceInputs in{x, weight, target, bias_, token_weight_, {}};
  detail::check_inputs(in, o);
  detail::check_constants(in);
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto out = VocabParallel::apply(x, weight, target, bias_, token_weight_,
                                        c10::make_intrusive<Call>(o, shard));
  LinearCrossEntropyOutput result;
  result.loss = out[0];
  result.n_valid = out[3];
  if (o.return_lse()) result.lse = out[1];
  if (o.return_z_loss()) result.z_loss = out[2];
  if (o.return_log_prob()) result.log_prob = out[4].neg();
  return result;
}

}  // namespace ounce
