// SPDX-License-Identifier: MIT
// Which block makes which tiles of the logits [N, V]: host code, of shapes and the device alone.
//
// A cluster of two blocks has a pair of tiles one below the other, 256 tokens by 192 entries of the
// vocabulary, and walks along the vocabulary, so that what it sums for its tokens stays in
// registers. A sweep is `pairs` pairs of tiles over the whole vocabulary; `columns` clusters share
// a pair, each taking every columns-th tile. All clusters of a sweep work on neighbouring tiles:
// its hidden states stay in the L2 cache, and the classifier is read from memory once a sweep.
#pragma once

#include <algorithm>
#include <cstdint>

namespace ounce::cce {

constexpr int kTileRows = 128, kTileColumns = 192, kDepth = 64;
constexpr int kPairRows = 2 * kTileRows;
constexpr int kBoxColumns = 64;  // of a tile, written at once
constexpr int kLanes = 2;        // warpgroups of a block that take its tiles in turn

struct Sweeps {
  int count = 0, pairs = 0, columns = 0;  // so many sweeps of this form, one after the other

  // Partial sums of one: `columns` x kLanes rows of pairs * 256 elements.
  constexpr int partials() const { return columns * kLanes * pairs * kPairRows; }
};

struct Schedule {
  static constexpr int kForms = 8;
  int clusters = 0;
  int tiles = 0;  // along the vocabulary
  Sweeps forms[kForms];

  int64_t partials() const {
    int64_t sum = 0;
    for (const auto& form : forms) sum += int64_t{form.count} * form.partials();
    return sum;
  }

  // The share of the clusters' time that makes tiles of `rows` tokens.
  double use(int64_t rows) const {
    double rounds = 0;
    for (const auto& form : forms) {
      if (form.count > 0) rounds += form.count * ((tiles + form.columns - 1) / form.columns);
    }
    return static_cast<double>(rows) / kPairRows * tiles / (rounds * clusters);
  }
};

// The share of the clusters' time that is used, less what reading the classifier costs where few
// tokens share it.
inline double worth(int pairs, int clusters, int tiles) {
  const int columns = std::min(clusters / pairs, tiles);
  const int rounds = (tiles + columns - 1) / columns;
  return static_cast<double>(pairs) * tiles / (static_cast<double>(clusters) * rounds) -
         0.1 / pairs;
}

inline Schedule schedule(int64_t rows, int64_t vocab, int64_t dim, int clusters,
                         int64_t cache_bytes) {
  Schedule s;
  s.clusters = clusters;
  s.tiles = static_cast<int>((vocab + kTileColumns - 1) / kTileColumns);
  const auto fits = std::max<int64_t>(1, cache_bytes * 2 / 5 / (kPairRows * dim * 2));
  auto left = static_cast<int>((rows + kPairRows - 1) / kPairRows);
  for (auto& form : s.forms) {
    if (left == 0) break;
    // The last form takes what is left one by one.
    const bool last = &form == s.forms + Schedule::kForms - 1;
    const auto most = last ? 1 : static_cast<int>(std::min<int64_t>({left, clusters, fits}));
    int best = 1;
    for (int pairs = 2; pairs <= most; ++pairs) {
      if (worth(pairs, clusters, s.tiles) >= worth(best, clusters, s.tiles)) best = pairs;
    }
    form = {left / best, best, std::min(clusters / best, s.tiles)};
    left -= form.count * best;
  }
  return s;
}

// Entries of a slab of at most `most` tiles: of the ways to cut the vocabulary evenly, with up to
// twice as many slabs as needed, the one that fills the clusters best. Starting a slab and adding to
// the hidden state's gradient once more takes, measured, as long as some 3 tiles a row.
inline int64_t best_slab(int64_t rows, int64_t vocab, int64_t dim, int64_t most, int clusters,
                         int64_t cache_bytes) {
  const int64_t tiles = (vocab + kTileColumns - 1) / kTileColumns;
  const int64_t fewest = (tiles + most - 1) / most;
  int64_t best = 0;
  double most_worth = 0;
  for (int64_t slabs = fewest; slabs <= std::min(2 * fewest, tiles); ++slabs) {
    const auto cut = (tiles + slabs - 1) / slabs;
    const double use = schedule(rows, cut * kTileColumns, dim, clusters, cache_bytes).use(rows);
    if (const double worth = use * cut / (cut + 3.0); worth > most_worth) {
      best = cut, most_worth = worth;
    }
  }
  return std::min(best * kTileColumns, vocab);
}

}  // namespace ounce::cce
