// Usage: test_simt --list | test_simt CASE...      Without arguments every case that passes is run.
#include <cstdio>
#include <cstring>

#include "check.h"

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "--list") == 0) {
    for (const Case& test : cases()) std::printf("%s\t%s\n", test.name.c_str(), test.report.c_str());
    return 0;
  }
  int failures = 0, runs = 0;
  for (const Case& test : cases()) {
    bool chosen = argc == 1 && test.report.empty();
    for (int i = 1; i < argc; ++i) chosen = chosen || test.name == argv[i];
    if (!chosen) continue;
    ++runs;
    try {
      test.body();
    } catch (const std::exception& error) {
      std::printf("FAILED %s: %s\n", test.name.c_str(), error.what());
      ++failures;
    }
  }
  std::printf("%d cases, %d failed\n", runs, failures);
  return failures == 0 && runs > 0 ? 0 : 1;
}
