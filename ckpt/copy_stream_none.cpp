// SPDX-License-Identifier: MIT
#include <ounce/ckpt/copy_stream.h>
#include <ounce/core/check.h>

namespace ounce::ckpt {

std::unique_ptr<CopyStream> open_copy_stream(int) {
  fail(Fault::kUsage, "[checkpoint] this build has no CUDA; a tensor on a GPU cannot be copied");
}

bool register_host_memory(void*, size_t) { return false; }
void unregister_host_memory(void*) {}

}  // namespace ounce::ckpt
