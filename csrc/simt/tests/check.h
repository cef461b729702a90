// A minimal test harness: named cases, checks that throw, sweeps over seeds.
#pragma once

#include <functional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../cuda/portable.cuh"

#ifdef __SANITIZE_ADDRESS__
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

struct Case {
  std::string name;
  std::string report;  // what the sanitizer prints when it stops the case; empty for cases that pass
  std::function<void()> body;
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

struct Registration {
  Registration(const char* name, const char* report, void (*body)()) { cases().push_back({name, report, body}); }
};

/// CASE(name) passes in every build. FATAL(name, report) is stopped by a sanitizer with that report.
#define CASE(name) SIMT_TEST_CASE(name, "")
#define FATAL(name, report) SIMT_TEST_CASE(name, report)
#define SIMT_TEST_CASE(name, report)                                   \
  static void name();                                                  \
  static const Registration name##_registration(#name, report, &name); \
  static void name()

#define CHECK(condition)                                                                                \
  do {                                                                                                  \
    if (!(condition))                                                                                   \
      throw std::logic_error(std::string(__FILE__) + ":" + std::to_string(__LINE__) + ": " #condition); \
  } while (false)

#define CHECK_EQ(got, expected)                                                                     \
  do {                                                                                              \
    const auto got_ = (got);                                                                        \
    const auto expected_ = (expected);                                                              \
    if (!(got_ == expected_)) {                                                                     \
      std::ostringstream message_;                                                                  \
      message_ << __FILE__ << ":" << __LINE__ << ": " #got " is " << got_ << ", not " << expected_; \
      throw std::logic_error(message_.str());                                                       \
    }                                                                                               \
  } while (false)

/// The text contains every part.
inline void check_contains(const std::string& text, const std::vector<std::string>& parts) {
  for (const std::string& part : parts) {
    if (text.find(part) == std::string::npos) throw std::logic_error("no `" + part + "` in: " + text);
  }
}

/// Message of the simt::Error that `run` must throw.
template <class Run>
std::string error_of(Run run) {
  try {
    run();
  } catch (const simt::Error& error) {
    return error.what();
  }
  throw std::logic_error("no simt::Error was thrown");
}

/// Calls run() under `count` seeds.
template <class Run>
void for_seeds(int count, Run run) {
  for (int seed = 0; seed < count; ++seed) {
    simt::set_seed(static_cast<std::uint64_t>(seed));
    run();
  }
}

/// How many of `count` seeds make run() return true.
template <class Run>
int seeds_where(int count, Run run) {
  int hits = 0;
  for_seeds(count, [&] { hits += run() ? 1 : 0; });
  return hits;
}
