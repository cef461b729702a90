// The messages of the scheduler: who waits where, and for whom.
#include <bit>
#include <map>
#include <sstream>
#include <string>
#include <utility>

#include "scheduler.h"

namespace simt::detail {
namespace {

constexpr unsigned kMaxNamed = 4;  // threads named per line of a report

std::string coordinates(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

}  // namespace

std::string Scheduler::block_name() const {
  return "kernel " + std::string(config_.kernel) + ", block " + coordinates(::blockIdx);
}

Error Scheduler::error(const std::string& what, const Thread& thread) const {
  return Error(block_name() + ", thread " + coordinates(thread.index) + ": " + what);
}

std::string Scheduler::describe(const Wait& wait) {
  std::ostringstream out;
  out << wait.name;
  if (wait.mask != 0) out << " with mask 0x" << std::hex << wait.mask << std::dec;
  out << " (" << wait.site.file_name() << ":" << wait.site.line() << ")";
  return out.str();
}

std::string Scheduler::absent_lanes(const Thread& waiting) const {
  std::string lines;
  unsigned count = 0;
  for (unsigned lanes = waiting.wait.mask; lanes != 0; lanes &= lanes - 1) {
    const auto lane = static_cast<unsigned>(std::countr_zero(lanes));
    const unsigned rank = waiting.warp * 32 + lane;
    std::string why;
    if (rank >= thread_count_) {
      why = "does not exist";
    } else if (thread(rank).exited) {
      why = "has exited";
    } else if (std::string elsewhere = describe(thread(rank).wait); elsewhere != describe(waiting.wait)) {
      why = "waits at " + elsewhere;
    } else {
      continue;
    }
    if (count++ < kMaxNamed) lines += "\n    absent: lane " + std::to_string(lane) + " " + why;
  }
  if (count > kMaxNamed) lines += "\n    absent: " + std::to_string(count - kMaxNamed) + " lanes more";
  return lines;
}

std::string Scheduler::deadlock_report() const {
  struct Group {
    unsigned count = 0;
    std::string threads, absent;
  };
  std::map<std::pair<unsigned, std::string>, Group> groups;  // by warp (0 for block barriers) and call
  unsigned exited = 0;
  for (unsigned rank = 0; rank < thread_count_; ++rank) {
    const Thread& waiting = thread(rank);
    if (waiting.exited) {
      ++exited;
      continue;
    }
    Group& group = groups[{waiting.wait.mask == 0 ? 0 : waiting.warp, describe(waiting.wait)}];
    if (group.count == 0) group.absent = absent_lanes(waiting);
    if (group.count++ < kMaxNamed) group.threads += " " + coordinates(waiting.index);
  }

  std::ostringstream out;
  out << "deadlock in " << block_name() << ": no thread can go on";
  for (const auto& [key, group] : groups) {
    out << "\n  " << group.count << " wait at " << key.second << ": thread" << group.threads;
    if (group.count > kMaxNamed) out << " ...";
    out << group.absent;
  }
  if (exited > 0) out << "\n  " << exited << " have exited";
  return out.str();
}

}  // namespace simt::detail
