// SPDX-License-Identifier: MIT
// What a table of counts can do: the losses that a language model of bytes has to beat before it
// has learned anything that its last few bytes do not say.
#pragma once

#include <string_view>
#include <vector>

namespace ounce::data {

inline constexpr int kCountModelOrders = 4;

// Mean negative log likelihood, in nats a byte, of valid[1 ..] under models of order 0 to 3 that
// were counted on `train`: order k predicts a byte from the k before it. Interpolated Witten-Bell
// smoothing (Bell, Cleary and Witten 1990, method C; Chen and Goodman 1998, section 2.6):
//   p_k(x | c) = (count(c x) + distinct(c) p_{k-1}(x | c')) / (count(c) + distinct(c)),
// c' without the oldest byte of c, p_{-1} = 1/256, and p_k = p_{k-1} where c was never seen. Both
// texts are taken to follow NUL bytes. valid.size() >= 2. Time and memory: one pass over the texts
// with a hash table of the distinct runs of four bytes.
std::vector<double> count_model_losses(std::string_view train, std::string_view valid);

}  // namespace ounce::data
