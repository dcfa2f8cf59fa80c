// SPDX-License-Identifier: MIT
#include <errno.h>
#include <fcntl.h>
#include <ounce/ckpt/child_process.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <fstream>

namespace ounce::ckpt {
namespace {

constexpr size_t kMostText = size_t{256} << 20;
constexpr rlim_t kMostMemory = rlim_t{2} << 30;

void set_limits(unsigned seconds) {
  sigset_t alarms;
  ::sigemptyset(&alarms);
  ::sigaddset(&alarms, SIGALRM);
  ::signal(SIGALRM, SIG_DFL);
  ::sigprocmask(SIG_UNBLOCK, &alarms, nullptr);
  ::alarm(seconds);
  const rlimit no_core = {0, 0};
  ::setrlimit(RLIMIT_CORE, &no_core);
  rlim_t pages = 0;
  if (std::ifstream("/proc/self/statm") >> pages) {
    const auto most = pages * ::sysconf(_SC_PAGESIZE) + kMostMemory;
    const rlimit memory = {most, most};
    ::setrlimit(RLIMIT_AS, &memory);
  }
}

// Never returns: what is above this on the stack belongs to the parent.
[[noreturn]] void be_the_child(int out, const std::function<std::string()>& action,
                               unsigned seconds) {
  try {
    set_limits(seconds);
    const auto text = action();
    for (size_t sent = 0; sent < text.size();) {
      const auto count = ::write(out, text.data() + sent, text.size() - sent);
      if (count < 0 && errno == EINTR) continue;
      if (count <= 0) ::_exit(2);
      sent += count;
    }
    ::_exit(0);
  } catch (...) {
    ::_exit(2);
  }
}

std::string ending_of(int status, unsigned seconds) {
  if (WIFEXITED(status)) return WEXITSTATUS(status) == 0 ? "" : "it gave up";
  if (WTERMSIG(status) == SIGALRM) return "it took more than " + std::to_string(seconds) + " s";
  return std::string("it died: ") + ::strsignal(WTERMSIG(status));
}

}  // namespace

ChildOutput run_in_child(const std::function<std::string()>& action, unsigned seconds) {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) return {"", std::strerror(errno)};
  const auto child = ::fork();
  if (child == 0) be_the_child(ends[1], action, seconds);
  const int fork_error = errno;
  ::close(ends[1]);
  ChildOutput output;
  char buffer[4096];
  for (ssize_t count; child > 0 && (count = ::read(ends[0], buffer, sizeof(buffer))) != 0;) {
    if (count < 0 && errno == EINTR) continue;
    if (count < 0 || output.text.size() > kMostText) {
      ::kill(child, SIGKILL);
      break;
    }
    output.text.append(buffer, count);
  }
  ::close(ends[0]);
  if (child < 0) return {"", std::strerror(fork_error)};
  int status = 0;
  pid_t ended;
  while ((ended = ::waitpid(child, &status, 0)) < 0 && errno == EINTR) continue;
  output.problem = ended < 0 ? std::strerror(errno) : ending_of(status, seconds);
  return output;
}

}  // namespace ounce::ckpt
