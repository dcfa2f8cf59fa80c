// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include "support/local_process_group.h"

namespace ounce::testing {
namespace {

using Group = c10::intrusive_ptr<c10d::ProcessGroup>;
using Tensors = std::vector<at::Tensor>;

at::Tensor of_rank(int rank, int64_t size = 6) {
  return at::randn({size}, at::make_generator<at::CPUGeneratorImpl>(100 + rank));
}

TEST(LocalProcessGroup, AllReduceGivesEveryRankTheSameBits) {
  constexpr int kRanks = 4;
  std::vector<at::Tensor> results(kRanks);
  run_ranks(kRanks, [&](const Group& group) {
    Tensors tensors{of_rank(group->getRank())};
    for (int i = 0; i < 20; ++i) {  // no round may mix with the next
      group->allreduce(tensors)->wait();
      tensors[0].div_(kRanks).add_(group->getRank());
    }
    tensors[0].sub_(group->getRank());
    results[group->getRank()] = tensors[0];
  });
  auto expected = at::zeros({6});
  for (int rank = 0; rank < kRanks; ++rank) expected += of_rank(rank);
  expected = expected / kRanks;
  for (int i = 1; i < 20; ++i) expected = expected + 1.5;
  for (int rank = 0; rank < kRanks; ++rank) {
    EXPECT_TRUE(results[rank].equal(results[0]));
    EXPECT_LT((results[rank] - expected).abs().max().item<float>(), 1e-4);
  }
}

TEST(LocalProcessGroup, Reductions) {
  run_ranks(3, [](const Group& group) {
    const double r = group->getRank() + 1;
    const std::vector<std::pair<c10d::ReduceOp::RedOpType, double>> cases = {
        {c10d::ReduceOp::SUM, 6},
        {c10d::ReduceOp::AVG, 2},
        {c10d::ReduceOp::MAX, 3},
        {c10d::ReduceOp::MIN, 1},
        {c10d::ReduceOp::PRODUCT, 6}};
    for (const auto& [op, expected] : cases) {
      Tensors tensors{at::full({2}, r, at::kDouble)};
      c10d::AllreduceOptions options;
      options.reduceOp = op;
      group->allreduce(tensors, options)->wait();
      EXPECT_EQ(tensors[0][1].item<double>(), expected);
    }
  });
}

TEST(LocalProcessGroup, BroadcastGatherScatterAndMail) {
  run_ranks(3, [](const Group& group) {
    const int rank = group->getRank();
    Tensors root{of_rank(rank)};
    c10d::BroadcastOptions options;
    options.rootRank = 2;
    group->broadcast(root, options)->wait();
    EXPECT_TRUE(root[0].equal(of_rank(2)));

    Tensors inputs{of_rank(rank)};
    std::vector<Tensors> gathered{{at::empty({6}), at::empty({6}), at::empty({6})}};
    group->allgather(gathered, inputs)->wait();
    for (int r = 0; r < 3; ++r) EXPECT_TRUE(gathered[0][r].equal(of_rank(r)));
    auto flat = at::empty({18});
    group->_allgather_base(flat, inputs[0])->wait();
    EXPECT_TRUE(flat.slice(0, 6, 12).equal(of_rank(1)));

    auto piece = at::empty({2});
    group->_reduce_scatter_base(piece, inputs[0])->wait();
    const auto sum = of_rank(0) + of_rank(1) + of_rank(2);
    EXPECT_TRUE(piece.equal(sum.slice(0, 2 * rank, 2 * rank + 2)));

    group->barrier()->wait();
    if (rank == 0) {
      Tensors letter{of_rank(7)};
      group->send(letter, 2, 5)->wait();
    } else if (rank == 2) {
      Tensors letter{at::empty({6})};
      group->recv(letter, 0, 5)->wait();
      EXPECT_TRUE(letter[0].equal(of_rank(7)));
    }
  });
}

TEST(LocalProcessGroup, MismatchesThrowInsteadOfHanging) {
  EXPECT_THROW(run_ranks(2,
                         [](const Group& group) {
                           Tensors tensors{at::zeros({2})};
                           if (group->getRank() == 0) {
                             group->allreduce(tensors);
                           } else {
                             group->broadcast(tensors);
                           }
                         }),
               c10::Error);
  EXPECT_THROW(run_ranks(2,
                         [](const Group& group) {
                           Tensors tensors{at::zeros({2 + group->getRank()})};
                           group->allreduce(tensors);
                         }),
               c10::Error);
}

}  // namespace
}  // namespace ounce::testing
