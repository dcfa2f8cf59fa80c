// SPDX-License-Identifier: MIT
// How the ranks of a job agree that a step is whole: PREPARE, when a rank's own files are durable
// or have failed, then COMMIT, when the step has its name or never will. The commit protocol asks
// only this; one rank votes with itself. No Torch here.
#pragma once

#include <ounce/ckpt/manifest.h>

#include <memory>
#include <string>

namespace ounce::ckpt {

class Vote {
 public:
  virtual ~Vote() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;

  // Every rank says what it has written, in `own`, or why it has not, in `error`. Returns when all
  // have spoken or the time is up: the manifest of the whole step, or StorageError with the reason
  // of the first rank that failed, on every rank alike.
  virtual Manifest prepare(Manifest own, const std::string& error) = 0;

  // Rank 0 has published the step ("" in `error`) or could not; the others learn which. Throws
  // StorageError on all of them when it could not.
  virtual void commit(const std::string& error) = 0;
};

std::shared_ptr<Vote> vote_of_one();

}  // namespace ounce::ckpt
