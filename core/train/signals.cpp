// SPDX-License-Identifier: MIT
#include <ounce/core/train/signals.h>

#include <csignal>

namespace ounce {

namespace {

volatile std::sig_atomic_t received_signal = 0;

extern "C" void ounce_remember_signal(int signal) { received_signal = signal; }

void install(void (*handler)(int), int flags) {
  struct sigaction action {};
  action.sa_handler = handler;
  action.sa_flags = flags;
  for (const int signal : {SIGINT, SIGTERM}) sigaction(signal, &action, nullptr);
}

}  // namespace

SignalGuard::SignalGuard() {
  received_signal = 0;
  // SA_RESETHAND gives the second signal its default action.
  install(ounce_remember_signal, SA_RESETHAND | SA_RESTART);
}

SignalGuard::~SignalGuard() { install(SIG_DFL, 0); }

const char* SignalGuard::received() {
  if (received_signal == 0) return nullptr;
  return received_signal == SIGTERM ? "SIGTERM" : "SIGINT";
}

}  // namespace ounce
