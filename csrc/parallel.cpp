#include "parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace hdrq {
namespace {

// Threads of the OpenMP runtime that torch brought into the process: they wait, spinning, between torch's own loops, so
// threads of ours would have to share the cores with them. No such runtime: threads are started for the call.
using Region = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
Region openmp() {
  static const auto region = reinterpret_cast<Region>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return region;
}

void start_threads(void (*work)(void*), void* context, unsigned threads, unsigned) {
  std::vector<std::thread> started;
  started.reserve(threads - 1);
  for (unsigned t = 1; t < threads; ++t) started.emplace_back(work, context);
  work(context);
  for (auto& thread : started) thread.join();
}

}  // namespace

void run_units(int64_t units, int64_t fewest, int threads, void (*body)(const void*, int64_t), const void* context) {
  const int64_t parts = std::clamp<int64_t>(units / fewest, 1, std::max(threads, 1));
  std::atomic<int64_t> next{0};
  auto run = [&] {  // as many threads as there are, a runtime may give fewer, take parts until none is left
    for (int64_t p; (p = next++) < parts;) {
      for (int64_t u = units * p / parts; u < units * (p + 1) / parts; ++u) body(context, u);
    }
  };
  if (parts == 1) return run();
  const auto call = [](void* f) { (*static_cast<decltype(run)*>(f))(); };
  (openmp() ? openmp() : start_threads)(call, &run, static_cast<unsigned>(parts), 0);
}

}  // namespace hdrq
