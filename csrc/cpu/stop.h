// How a pass is interrupted.
#pragma once

#include <atomic>
#include <chrono>
#include <thread>

#include "driver.h"

namespace mk {

// Stops all tasks of a pass once `poll`, which only the thread that made this calls, returns true.
class Stop {
 public:
  explicit Stop(Poll poll) : poll_(poll) {}
  Stop(const Stop&) = delete;

  Interrupt interrupt() { return poll_ ? Interrupt{&asked, this} : Interrupt{nullptr, nullptr}; }
  bool stopped() const { return stopped_.load(std::memory_order_relaxed); }

 private:
  using Clock = std::chrono::steady_clock;

  static bool asked(void* context) {
    Stop& self = *static_cast<Stop*>(context);
    if (self.stopped()) return true;
    if (std::this_thread::get_id() != self.caller_ || Clock::now() < self.next_) return false;
    if (self.poll_()) self.stopped_.store(true, std::memory_order_relaxed);
    self.next_ = Clock::now() + INTERVAL;
    return self.stopped();
  }

  static constexpr std::chrono::milliseconds INTERVAL{100};
  const Poll poll_;
  const std::thread::id caller_ = std::this_thread::get_id();
  Clock::time_point next_ = Clock::now() + INTERVAL;
  std::atomic<bool> stopped_{false};
};

}  // namespace mk
