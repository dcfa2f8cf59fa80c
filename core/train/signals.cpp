// SPDX-License-Identifier: MIT
#include <ounce/core/train/signals.h>

#include <array>
#include <csignal>

namespace ounce {

namespace {

volatile std::sig_atomic_t received_signal = 0;

extern "C" void ounce_remember_signal(int signal) { received_signal = signal; }

constexpr std::array kSignals = {SIGINT, SIGTERM};
std::array<struct sigaction, kSignals.size()> earlier;

}  // namespace

SignalGuard::SignalGuard() {
  received_signal = 0;
  for (size_t i = 0; i < kSignals.size(); ++i) {
    sigaction(kSignals[i], nullptr, &earlier[i]);
    if (earlier[i].sa_handler == SIG_IGN) continue;  // a job in the background
    struct sigaction action {};
    action.sa_handler = ounce_remember_signal;
    // SA_RESETHAND gives the second signal its default action.
    action.sa_flags = SA_RESETHAND | SA_RESTART;
    sigaction(kSignals[i], &action, nullptr);
  }
}

SignalGuard::~SignalGuard() {
  for (size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &earlier[i], nullptr);
}

const char* SignalGuard::received() {
  if (received_signal == 0) return nullptr;
  return received_signal == SIGTERM ? "SIGTERM" : "SIGINT";
}

}  // namespace ounce
