// The one error of memory: how much was wanted, and for what. pybind11 makes a MemoryError of it.
#pragma once

#include <cstdint>
#include <new>
#include <string>

namespace mk {

class OutOfMemory : public std::bad_alloc {
 public:
  OutOfMemory(int64_t bytes, const std::string& purpose)
      : message_("memory: expected " + std::to_string(bytes) + " bytes for " + purpose + ", got none from the system") {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

}  // namespace mk
